"""`fetch`: planned reads, verified, handed piece by piece to where they belong.

Pieces that lie in one row in the file and where they are wanted are read to there; others to a buffer, from which they
are copied. Reads are shared by a few threads, each with one buffer, so memory is bounded. The
calls that move bytes (read, checksum, copy) release the GIL. See decision 0023.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import CorruptionError
from giantstep.format.digests import cut_parts, digests_of_parts
from giantstep.format.record import CommitRecord
from giantstep.options import Threads
from giantstep.planning.load_plan import LoadPlan, Read
from giantstep.planning.load_tables import ChunkTable
from giantstep.reading.data_files import DataFiles
from giantstep.reading.placing import WORDS, Bits, Bytes, Placing, Sink, Sinks, bits
from giantstep.storage.base import Access, ReadHandle, Store
from giantstep.storage.buffers import device_buffer

__all__ = ["WORDS", "Bits", "ChecksumsOf", "Fetched", "Sink", "Sinks", "Source", "bits", "fetch", "read_verified"]

# About as much as the cache of one processor core holds of what was just read.
_CACHE_BYTES = 1 << 20

ChecksumsOf = Callable[[int, int, int], NDArray[np.uint64]]
"""(file, first block, last block) to checksums."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a fetch reads from.

    Attributes:
        store, record: the checkpoint.
        checksums: where block checksums come from; None reads without verifying.
        chunks: chunk table that the pieces of the reads refer to.
        key_of: key of the tensor or object to which a chunk belongs, for errors.
        noun: what such a key names, for errors.
        direct: read past the page cache what is not in it; good where nobody else reads the same bytes.
    """

    store: Store
    record: CommitRecord
    checksums: ChecksumsOf | None
    chunks: ChunkTable
    key_of: Callable[[int], str]
    noun: str = "tensor"
    direct: bool = True


@dataclass(frozen=True, slots=True)
class Fetched:
    """Bytes read from the store."""

    bytes_read: int


def fetch(source: Source, plan: LoadPlan, sinks: Sinks | None, threads: Threads) -> Fetched:
    """Carry out all reads.

    Args:
        source: what to read from.
        plan: from `plan_load`.
        sinks: per wanted region; None verifies and drops the bytes.
        threads: how many reads are in flight at most.

    Raises:
        CorruptionError: a block's checksum does not fit; names tensor, file, byte offset and writing rank.
        IncompleteError: a data file is missing.
        OSError: reading failed.
    """
    reads = plan.reads
    if not reads:
        return Fetched(0)
    sizes = [file.bytes for file in source.record.files]
    largest = max(min(read.stop, sizes[read.file]) - read.start for read in reads)
    buffers: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
    failed = threading.Event()
    placing = None if sinks is None else Placing(plan, sinks)

    with DataFiles(source.store, source.record, direct=source.direct) as files:

        def run(read: Read) -> int:
            if failed.is_set():
                return 0
            buffer = buffers.get()
            try:
                length = min(read.stop, sizes[read.file]) - read.start
                handle = files.get(read.file)
                access = handle.access_at(read.start)
                if placing is None:
                    _read_parts(source, handle, read.file, read.start, [buffer.data[:length]], access)
                else:
                    placed = placing.place(read, length, buffer, access.alignment_bytes)
                    _read_parts(source, handle, read.file, read.start, placed.parts, access)
                    placing.finish(read, placed, buffer)
            except Exception:
                failed.set()
                raise
            else:
                return length
            finally:
                buffers.put(buffer)

        # Where the first one is others are, mostly.
        nearby = files.get(reads[0].file).access_at(reads[0].start).nearby
        workers = min(threads.memory if nearby else threads.device, len(reads))
        for _ in range(workers):
            buffers.put(device_buffer(largest))
        with ThreadPoolExecutor(workers, thread_name_prefix="giantstep-read") as pool:
            return Fetched(sum(pool.map(run, reads)))


def read_verified(source: Source, files: DataFiles, file: int, start: int, stop: int, buffer: Bytes) -> Bytes:
    """Bytes [start, stop) of a file, or to its end, at the beginning of `buffer`; `start` is that of a block.

    Raises: as `fetch`.
    """
    data = buffer[: min(stop, source.record.files[file].bytes) - start]
    handle = files.get(file)
    _read_parts(source, handle, file, start, [data.data], handle.access_at(start))
    return data


def _read_parts(source: Source, handle: ReadHandle, file: int, start: int, parts: Sequence[memoryview], access: Access) -> None:
    """Fill all parts, one after another, with whole blocks that begin at byte `start` of a file.

    Raises: as `fetch`.
    """
    size, length = source.record.block_bytes, sum(map(len, parts))
    # What comes from memory is checked while it is in the processor's cache; others are asked for much at a time.
    step = max(1, _CACHE_BYTES // size) * size if access.nearby else length
    found: list[int] = []
    offset = start
    for group in cut_parts(parts, step):
        handle.read_parts(offset, group, access)
        offset += step
        if source.checksums is not None:
            found += digests_of_parts(group, size)
    if source.checksums is not None:
        first = start // size
        wrong = np.flatnonzero(np.array(found, dtype=np.uint64) != source.checksums(file, first, first + len(found)))
        if len(wrong):
            low = start + int(wrong[0]) * size
            raise _block_error(source, file, low, min(low + size, start + length), len(wrong))


def _block_error(source: Source, file: int, start: int, stop: int, count: int) -> CorruptionError:
    entry = source.record.files[file]
    keys = sorted({source.key_of(chunk) for chunk in source.chunks.within(file, start, stop)})
    shown = ", ".join(repr(key) for key in keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
    return CorruptionError(
        f"{source.noun}{'s' if len(keys) > 1 else ''} {shown or '(header)'}: bytes {start} to {stop} of "
        f"{source.store.location}/{entry.name}, written by rank {entry.rank}, are not what was written (checksum differs"
        + (f"; {count} blocks of this read" if count > 1 else "")
        + "). Restore the file from a copy, or load another step."
    )
