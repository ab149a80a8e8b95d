"""One file written front to back through a few large aligned buffers.

The caller's thread fills buffers; worker threads checksum and write them. Checksums are taken from the very bytes
that are handed to the store. Memory is bounded by the pool, which is reused from file to file.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from giantstep.format.digests import Checksums, block_checksums
from giantstep.storage.base import WriteHandle
from giantstep.storage.buffers import device_buffer


class BufferPool:
    """Page-aligned buffers of equal size and the threads that work on them. Owned by one save.

    Args:
        buffer_bytes: size of each buffer, a multiple of the block size.
        threads: number of worker threads; there are two buffers more.
    """

    def __init__(self, buffer_bytes: int, threads: int) -> None:
        self.buffer_bytes = buffer_bytes
        self._free: queue.SimpleQueue[NDArray[np.uint8]] = queue.SimpleQueue()
        for _ in range(threads + 2):
            self._free.put(device_buffer(buffer_bytes))
        self.executor = ThreadPoolExecutor(threads, thread_name_prefix="giantstep-write")

    def take(self) -> NDArray[np.uint8]:
        """A buffer that nobody else uses; waits until there is one."""
        return self._free.get()

    def give(self, buffer: NDArray[np.uint8]) -> None:
        """Return a buffer taken."""
        self._free.put(buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.executor.shutdown(wait=True, cancel_futures=True)


class BlockStream:
    """Bytes appended to one file. Used as a context manager; `finish` must be called for the checksums.

    Args:
        handle: the file, open for writing; closing it is the caller's.
        pool: buffers and threads.
        block_bytes: size of the checksummed blocks.
    """

    def __init__(self, handle: WriteHandle, pool: BufferPool, block_bytes: int) -> None:
        self._handle = handle
        self._pool = pool
        self._block_bytes = block_bytes
        self._buffer: NDArray[np.uint8] | None = None
        self._filled = 0
        self._position = 0
        self._writes: list[Future[Checksums]] = []

    def append(self, pieces: Iterable[NDArray[np.uint8]]) -> None:
        """Write the pieces one after another; each is copied before the next is asked for."""
        for piece in pieces:
            done = 0
            while done < len(piece):
                if self._buffer is None:
                    self._buffer = self._pool.take()
                count = min(len(piece) - done, len(self._buffer) - self._filled)
                self._buffer[self._filled : self._filled + count] = piece[done : done + count]
                self._filled += count
                done += count
                if self._filled == len(self._buffer):
                    self._submit()

    def _submit(self) -> None:
        if self._buffer is None:
            return
        buffer, count, offset = self._buffer, self._filled, self._position
        self._buffer, self._filled, self._position = None, 0, offset + count
        # An earlier failure ends the stream here, not after the last byte.
        for write in self._writes:
            if write.done():
                write.result()
        self._writes.append(self._pool.executor.submit(self._write, buffer, count, offset))

    def _write(self, buffer: NDArray[np.uint8], count: int, offset: int) -> Checksums:
        try:
            data = buffer.data[:count]
            checksums = block_checksums(data, self._block_bytes)
            direct = self._handle.direct_bytes
            whole = count // direct * direct if direct else 0
            if whole:
                self._handle.write_at(offset, data[:whole])
            if whole < count:
                self._handle.write_at(offset + whole, data[whole:])
            return checksums
        finally:
            self._pool.give(buffer)

    def finish(self) -> Checksums:
        """Wait until all bytes are written; return the checksums of all blocks. Raises the first failure."""
        self._submit()
        parts = [write.result() for write in self._writes]
        return np.concatenate([np.empty(0, np.uint64), *parts])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # No thread may still write when the caller closes the file.
        if self._buffer is not None:
            self._pool.give(self._buffer)
            self._buffer = None
        for write in self._writes:
            write.cancel() or write.exception()
