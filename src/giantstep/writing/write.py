"""`write`: a rank's entries to its data files, durable when it returns. Called by `save` and `removal`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.format.data_file import DataFilePlan
from giantstep.format.digests import Checksums
from giantstep.format.names import DATA_DIR, data_file_name
from giantstep.options import SaveOptions, Threads
from giantstep.shards.region import Int64s
from giantstep.storage.base import Store, WriteHandle
from giantstep.writing.memory import Memory
from giantstep.writing.running import RunningDigests
from giantstep.writing.stream import BlockStream, BufferPool

# Below this a file is not worth bypassing the page cache.
_DIRECT_FROM_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """Where the bytes of entries come from.

    Attributes:
        bytes: [entries] size of each.
        address: [entries] where in host memory all of its bytes lie in order; 0 where `pieces` must be asked for them. This
            memory must not change until `write` returns.
        owner: what keeps that memory alive. Threads that read it refer to this, whatever becomes of the caller.
        pieces: gives the bytes of an entry in order, as one-dimensional uint8 arrays. Each keeps its bytes as long as it is
            referred to: they are checksummed and written later, in other threads, and mostly without a copy.
    """

    bytes: Int64s
    address: Int64s
    owner: object
    pieces: Callable[[int], Iterable[NDArray[np.uint8]]]


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A data file as it lies in the store: name, size, and the checksum of each block."""

    name: str
    bytes: int
    checksums: Checksums


@dataclass(frozen=True, slots=True)
class Written:
    """All that one rank wrote.

    Attributes:
        files: its data files.
        file, start: per source, row in `files` and first byte.
        digest: [sources, 2] as of `contents.digests_of`; zeros if none were asked for.
    """

    files: list[WrittenFile]
    file: Int64s
    start: Int64s
    digest: NDArray[np.uint64]


def write(
    store: Store,
    save_id: str,
    rank: int,
    plans: Sequence[DataFilePlan],
    sources: Sources,
    options: SaveOptions,
    threads: Threads,
    check: Callable[[], None] = lambda: None,
    *,
    numbers: Sequence[int] | None = None,
    digests: bool = False,
) -> Written:
    """Write a rank's data files and flush them.

    When it returns, bytes and names are durable. When it raises, files of `save_id` may be left; no other save
    uses their names.

    Args:
        store, save_id, rank: which files are written, and where.
        plans: of the files.
        sources: of their entries.
        options, threads: how.
        check: called now and then; raises if nothing more is to be written.
        numbers: in the names of the files; None: from 0 on.
        digests: take digests of the entries as they are written. What `pieces` gives may then be held until the end.

    Raises:
        OSError: a storage operation failed.
        Exception: what `check` raises.
    """
    entries = len(sources.bytes)
    digest = np.zeros((entries, 2), dtype=np.uint64)
    written = Written([], np.zeros(entries, dtype=np.int64), np.zeros(entries, dtype=np.int64), digest)
    if not plans:
        return written
    with ExitStack() as stack:
        pools: dict[int, BufferPool] = {}

        def pool_of(count: int) -> BufferPool:
            if count not in pools:
                pools[count] = stack.enter_context(BufferPool(options.buffer_bytes, count))
            return pools[count]

        for row, plan in enumerate(plans):
            name = data_file_name(save_id, rank, row if numbers is None else numbers[row])
            direct = options.direct_io == "auto" and plan.bytes >= _DIRECT_FROM_BYTES
            running = RunningDigests(len(plan.header), sources.bytes[plan.order]) if digests else None
            with closing(store.create(name, plan.bytes, direct=direct)) as handle:
                pool = pool_of(threads.device if handle.direct_bytes or not handle.nearby else threads.memory)
                checksums = _write_file(handle, plan, sources, pool, options.block_bytes, check, running)
            written.files.append(WrittenFile(name, plan.bytes, checksums))
            written.file[plan.order], written.start[plan.order] = row, plan.starts
            if running is not None:
                digest[plan.order] = running.finish()
    store.sync_names(DATA_DIR)
    return written


def _write_file(
    handle: WriteHandle,
    plan: DataFilePlan,
    sources: Sources,
    pool: BufferPool,
    block_bytes: int,
    check: Callable[[], None],
    digests: RunningDigests | None,
) -> Checksums:
    with BlockStream(handle, pool, block_bytes, check, digests) as stream:
        stream.append([np.frombuffer(plan.header, dtype=np.uint8)])
        for rows in _runs(plan.order, sources.address):
            if sources.address[rows[0]]:
                stream.append_memory(Memory(sources.address[rows], sources.bytes[rows], sources.owner))
            else:
                for position in rows.tolist():
                    stream.append(sources.pieces(position))
        checksums = stream.finish()
    handle.sync()
    return checksums


def _runs(order: Int64s, address: Int64s) -> list[Int64s]:
    """The order cut where entries that lie in memory and entries that do not follow each other."""
    borders = np.flatnonzero(np.diff(address[order] > 0)) + 1
    return np.split(order, borders) if len(order) else []
