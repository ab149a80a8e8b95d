"""`fetch`: planned reads, verified, handed piece by piece to where they belong.

Reads are shared by a few threads, each with one buffer, so memory is bounded. The calls that move bytes (read,
checksum, copy) release the GIL.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import CorruptionError
from giantstep.format.digests import block_checksums
from giantstep.format.record import CommitRecord
from giantstep.planning.load_plan import Box, LoadPlan, Read, boxes
from giantstep.planning.load_tables import ChunkTable
from giantstep.reading.data_files import DataFiles
from giantstep.storage.base import Store
from giantstep.storage.buffers import device_buffer

Bits = NDArray[Any]
"""An array of elements as plain words of their size, whatever they mean."""

WORDS: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int16),
    4: np.dtype(np.int32),
    8: np.dtype(np.int64),
    16: np.dtype(np.complex128),
}


class Sink(Protocol):
    """Takes the elements of one wanted region."""

    def put(self, offset: tuple[int, ...], size: tuple[int, ...], bits: Bits) -> None:
        """Take the box of `size` at `offset` of the global tensor, both padded in front to the table's width.

        `bits` has shape `size`, any strides, and is valid until the call returns. Called from several threads,
        never twice for one element.
        """
        ...


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


def fetch(source: Source, plan: LoadPlan, sinks: Sequence[Sink] | None, threads: int) -> Fetched:
    """Carry out all reads.

    Args:
        source: what to read from.
        plan: from `plan_load`.
        sinks: per wanted region; None verifies and drops the bytes.
        threads: how many reads are in flight.

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
    buffers: queue.SimpleQueue[NDArray[np.uint8]] = queue.SimpleQueue()
    workers = min(threads, len(reads))
    for _ in range(workers):
        buffers.put(device_buffer(largest))
    failed = threading.Event()

    with DataFiles(source.store, source.record, direct=source.direct) as files:

        def run(read: Read) -> int:
            if failed.is_set():
                return 0
            buffer = buffers.get()
            try:
                data = read_verified(source, files, read.file, read.start, read.stop, buffer)
                if sinks is not None:
                    for box in boxes(plan.chunks, plan.pieces, read.first, read.last):
                        sinks[box.wanted].put(box.offset, box.size, bits(box, data, read.position))
                return len(data)
            except Exception:
                failed.set()
                raise
            finally:
                buffers.put(buffer)

        with ThreadPoolExecutor(workers, thread_name_prefix="giantstep-read") as pool:
            return Fetched(sum(pool.map(run, reads)))


def read_verified(
    source: Source, files: DataFiles, file: int, start: int, stop: int, buffer: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Bytes [start, stop) of a file, or to its end, at the beginning of `buffer`; `start` is that of a block.

    Raises: as `fetch`.
    """
    data = buffer[: min(stop, source.record.files[file].bytes) - start]
    files.get(file).read_into(start, data.data)
    if source.checksums is not None:
        _verify(source, source.checksums, file, start, data)
    return data


def bits(box: Box, data: NDArray[np.uint8], position: int) -> Bits:
    """A piece inside bytes that begin at `position`, strided as its chunk is; no copy."""
    return np.ndarray(box.size, WORDS[box.item_bytes], data, box.position - position, box.strides)


def _verify(source: Source, checksums: ChecksumsOf, file: int, start: int, data: NDArray[np.uint8]) -> None:
    size = source.record.block_bytes
    first = start // size
    found = block_checksums(data.data, size)
    wrong = np.flatnonzero(found != checksums(file, first, first + len(found)))
    if len(wrong):
        low = start + int(wrong[0]) * size
        raise _block_error(source, file, low, min(low + size, start + len(data)), len(wrong))


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
