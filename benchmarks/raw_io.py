"""The raw paths: one file per rank, written and read by plain system calls from a few threads; and a plain copy.

Used by `methods.py`, `interference.py` and `bytes_read.py`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from states import Memory

_BLOCK_BYTES = 8 << 20
_THREADS = 2


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _in_blocks(memory: Memory, transfer: Callable[[memoryview, int], int]) -> None:
    """Move all of `memory` block by block; `transfer` moves some bytes at an offset and says how many."""
    view = memory.data

    def block(start: int) -> None:
        stop = min(start + _BLOCK_BYTES, len(view))
        while start < stop:
            count = transfer(view[start:stop], start)
            if count == 0:
                raise OSError(errno.EIO, f"the file ends at byte {start}")
            start += count

    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(block, range(0, len(view), _BLOCK_BYTES)):
            pass


def write_file(path: Path, memory: Memory, *, direct: bool) -> None:
    """Write a new file and flush it; `direct` allocates it first and writes past the page cache."""
    with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0)) as descriptor:
        if direct:
            os.posix_fallocate(descriptor, 0, len(memory))
        _in_blocks(memory, lambda view, offset: os.pwrite(descriptor, view, offset))
        os.fsync(descriptor)


def read_file(path: Path, memory: Memory, *, direct: bool) -> None:
    """Fill `memory` from a file."""
    with _opened(path, os.O_RDONLY | (os.O_DIRECT if direct else 0)) as descriptor:
        _in_blocks(memory, lambda view, offset: os.preadv(descriptor, [view], offset))


def knows_direct(folder: Path, name: str) -> bool:
    """Whether files of this folder can be opened past the page cache; `name` is free for trying."""
    path = folder / name
    try:
        with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT):
            return True
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return False
    finally:
        path.unlink(missing_ok=True)


def drop_cached_pages(folder: Path) -> None:
    """Flush all files under `folder` and drop their pages, so that the next read comes from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with _opened(path, os.O_RDONLY) as descriptor:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def warm_pages(folder: Path) -> None:
    """Read all files under `folder`, so that their pages are in the cache."""
    block = bytearray(_BLOCK_BYTES)
    for path in folder.rglob("*"):
        if path.is_file():
            with _opened(path, os.O_RDONLY) as descriptor:
                while os.readv(descriptor, [block]):
                    pass


def flush_files(paths: Iterable[Path]) -> None:
    """Make files durable that somebody else wrote."""
    for path in paths:
        with _opened(path, os.O_RDONLY) as descriptor:
            os.fsync(descriptor)


def copy_memory(source: Memory, copy: Memory) -> None:
    """A copy by one thread, by NumPy: memcpy for memory without gaps."""
    np.copyto(copy, source)
