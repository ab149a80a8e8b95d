"""One file written front to back, without copying what can be written where it lies.

The caller's thread only cuts the file into stretches of `buffer_bytes`; worker threads gather, checksum and write them.
Checksums are taken from the very bytes that are handed to the store. Memory is bounded by the pool, which serves file
after file. See decision 0023. Called by `write`.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from giantstep.format.digests import Checksums
from giantstep.storage.base import WriteHandle
from giantstep.storage.buffers import device_buffer
from giantstep.writing.memory import Memory
from giantstep.writing.running import RunningDigests
from giantstep.writing.stretch import write_stretch

Bytes = NDArray[np.uint8]
# Bytes of a stretch: a view, or what makes views of them in the thread that writes them.
_Part = memoryview | Callable[[], list[memoryview]]

# Stretches that wait while every thread has one: enough that a thread never waits for the caller.
_WAITING = 2


class BufferPool:
    """Threads with a page-aligned buffer each, and a bound on what waits for them. Owned by one save.

    Args:
        buffer_bytes: size of each buffer, a multiple of the block size.
        threads: number of threads, and of buffers.
    """

    def __init__(self, buffer_bytes: int, threads: int) -> None:
        self.buffer_bytes = buffer_bytes
        self._free: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        for _ in range(threads):
            self._free.put(device_buffer(buffer_bytes))
        self._room = threading.Semaphore(threads + _WAITING)
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="giantstep-write")

    def submit(self, work: Callable[[Bytes], Checksums]) -> Future[Checksums]:
        """Have a thread do `work` with a buffer; waits while enough is waiting."""
        self._room.acquire()
        try:
            future = self._executor.submit(self._run, work)
        except RuntimeError:
            # The interpreter is ending, and gives no more threads: a last save is carried out all the same.
            future = Future()
            try:
                future.set_result(self._run(work))
            except Exception as error:  # noqa: BLE001 - as a thread's, it is the future's
                future.set_exception(error)
        except BaseException:
            self._room.release()
            raise
        # Also called for what is cancelled.
        future.add_done_callback(lambda _: self._room.release())
        return future

    def _run(self, work: Callable[[Bytes], Checksums]) -> Checksums:
        buffer = self._free.get()
        try:
            return work(buffer)
        finally:
            self._free.put(buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


class BlockStream:
    """Bytes appended to one file. Used as a context manager; `finish` must be called for the checksums.

    Args:
        handle: the file, open for writing; closing it is the caller's.
        pool: buffers and threads.
        block_bytes: size of the checksummed blocks.
        check: called before each stretch; raises if nothing more is to be written.
        digests: of what the file holds; are told of all bytes.
    """

    def __init__(
        self,
        handle: WriteHandle,
        pool: BufferPool,
        block_bytes: int,
        check: Callable[[], None] = lambda: None,
        digests: RunningDigests | None = None,
    ) -> None:
        self._check = check
        self._digests = digests
        self._handle = handle
        self._pool = pool
        self._block_bytes = block_bytes
        self._parts: list[_Part] = []
        self._filled = 0
        self._position = 0
        self._writes: deque[Future[Checksums]] = deque()
        self._checksums: list[Checksums] = []

    def append(self, pieces: Iterable[Bytes]) -> None:
        """Write the pieces one after another. Each must keep its bytes as long as it is referred to."""
        whole = self._pool.buffer_bytes
        for piece in pieces:
            rest = piece.data
            while len(rest) >= whole - self._filled:
                cut = whole - self._filled
                self._parts.append(rest[:cut])
                self._filled = whole
                self._submit()
                rest = rest[cut:]
            if rest:
                self._parts.append(rest)
                self._filled += len(rest)

    def append_memory(self, memory: Memory) -> None:
        """Write memory where it lies. It must stay alive and unchanged until the stream is left."""
        start = 0
        while start < memory.bytes:
            stop = min(memory.bytes, start + self._pool.buffer_bytes - self._filled)
            self._parts.append(partial(memory.views, start, stop))
            self._filled += stop - start
            if self._filled == self._pool.buffer_bytes:
                self._submit()
            start = stop

    def _submit(self) -> None:
        self._check()
        parts, offset = self._parts, self._position
        self._parts, self._filled, self._position = [], 0, offset + self._filled
        # An earlier failure ends the stream here, not after the last byte.
        while self._writes and self._writes[0].done():
            self._checksums.append(self._writes.popleft().result())
        handle, block_bytes, digests = self._handle, self._block_bytes, self._digests
        self._writes.append(
            self._pool.submit(lambda buffer: write_stretch(handle, offset, _views(parts), buffer, block_bytes, digests))
        )

    def finish(self) -> Checksums:
        """Wait until all bytes are written; return the checksums of all blocks. Raises the first failure."""
        if self._parts:
            self._submit()
        while self._writes:
            self._checksums.append(self._writes.popleft().result())
        return np.concatenate([np.empty(0, np.uint64), *self._checksums])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # No thread may still write when the caller closes the file.
        self._parts = []
        for write in self._writes:
            write.cancel() or write.exception()


def _views(parts: Iterable[_Part]) -> list[memoryview]:
    found: list[memoryview] = []
    for part in parts:
        if isinstance(part, memoryview):
            found.append(part)
        else:
            found += part()
    return found
