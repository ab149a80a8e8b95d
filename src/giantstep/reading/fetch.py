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
from giantstep.planning.load_plan import ChunkTable, Piece, Read
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


def fetch(source: Source, reads: Sequence[Read], sinks: Sequence[Sink] | None, threads: int) -> Fetched:
    """Carry out all reads.

    Args:
        source: what to read from.
        reads: from `plan_load`.
        sinks: per wanted region; None verifies and drops the bytes.
        threads: how many reads are in flight.

    Raises:
        CorruptionError: a block's checksum does not fit; names tensor, file, byte offset and writing rank.
        IncompleteError: a data file is missing.
        OSError: reading failed.
    """
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
                return _carry_out(source, files, read, sinks, buffer)
            except Exception:
                failed.set()
                raise
            finally:
                buffers.put(buffer)

        with ThreadPoolExecutor(workers, thread_name_prefix="giantstep-read") as pool:
            return Fetched(sum(pool.map(run, reads)))


def _carry_out(source: Source, files: DataFiles, read: Read, sinks: Sequence[Sink] | None, buffer: NDArray[np.uint8]) -> int:
    entry = source.record.files[read.file]
    stop = min(read.stop, entry.bytes)
    data = buffer[: stop - read.start]
    files.get(read.file).read_into(read.start, data.data)
    if source.checksums is not None:
        _verify(source, read, data)
    if sinks is not None:
        for piece in read.pieces:
            sinks[piece.wanted].put(piece.offset, piece.size, _bits(source.chunks, piece, read, data))
    return len(data)


def _bits(chunks: ChunkTable, piece: Piece, read: Read, data: NDArray[np.uint8]) -> Bits:
    """The piece's box inside the buffer, strided as the chunk is; no copy."""
    chunk_size = chunks.size[piece.chunk].tolist()
    tensor = int(np.searchsorted(chunks.ends, piece.chunk, side="right")) - 1
    item_bytes = int(chunks.item_bytes[tensor])
    strides = [item_bytes] * len(chunk_size)
    for axis in range(len(chunk_size) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * chunk_size[axis + 1]
    return np.ndarray(piece.size, WORDS[item_bytes], data, piece.start - read.start, strides)


def _verify(source: Source, read: Read, data: NDArray[np.uint8]) -> None:
    if source.checksums is None:
        return
    size = source.record.block_bytes
    first = read.start // size
    found = block_checksums(data.data, size)
    expected = source.checksums(read.file, first, first + len(found))
    wrong = np.flatnonzero(found != expected)
    if len(wrong):
        start = (first + int(wrong[0])) * size
        raise _block_error(source, read, start, min(start + size, read.start + len(data)), len(wrong))


def _block_error(source: Source, read: Read, start: int, stop: int, count: int) -> CorruptionError:
    entry = source.record.files[read.file]
    keys = sorted({source.key_of(piece.chunk) for piece in read.pieces if piece.start < stop and piece.stop > start})
    shown = ", ".join(repr(key) for key in keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
    return CorruptionError(
        f"{source.noun}{'s' if len(keys) > 1 else ''} {shown or '(header)'}: bytes {start} to {stop} of "
        f"{source.store.location}/{entry.name}, written by rank {entry.rank}, are not what was written (checksum differs"
        + (f"; {count} blocks of this read" if count > 1 else "")
        + "). Restore the file from a copy, or load another step."
    )
