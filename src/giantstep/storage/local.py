"""A directory of a local or shared POSIX file system as a store. The only module that touches files.

Durability is by `fsync` of the file, then of the directory that names it; publication by `rename` after the
bytes are durable, as POSIX allows no other order to be relied upon after a power loss.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from giantstep.format.digests import cut_parts
from giantstep.storage.base import Access, Buffer, ReadHandle, Store, WriteHandle
from giantstep.storage.buffers import address_of
from giantstep.storage.medium import is_memory_backed

# Alignment that O_DIRECT needs on every file system in use (logical block size is 512 or 4096).
_DIRECT_ALIGNMENT = 4096
# Smaller reads are not worth a look at the page cache.
_DIRECT_FROM_BYTES = 256 << 10
# How many parts one system call takes (IOV_MAX of Linux).
_MOST_PARTS = 1024
# Errors by which file systems say that they have no such operation.
_NOT_SUPPORTED = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS})


class LocalStore:
    """Files under `root`. Makes nothing until `prepare`."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root).absolute()
        # By device number, of the devices that this store met.
        self._memory_backed: dict[int, bool] = {}

    @property
    def location(self) -> str:
        return str(self._root)

    def _path(self, name: str) -> Path:
        return self._root / name

    def _in_memory(self, path: Path) -> bool:
        """Whether a file lies in a file system that has no device."""
        device = path.stat().st_dev
        found = self._memory_backed.get(device)
        if found is None:
            found = self._memory_backed[device] = is_memory_backed(os.major(device), os.minor(device))
        return found

    def exists(self) -> bool:
        return self._root.exists()

    def prepare(self, folder: str) -> None:
        wanted = self._root / folder
        made = [path for path in (wanted, *wanted.parents) if not path.exists()]
        wanted.mkdir(parents=True, exist_ok=True)
        # A directory is durable when its parent is synced after its creation. Ours are synced also if they were there:
        # a save that was killed may have made them and no more.
        for path in dict.fromkeys((wanted, self._root, *made)):
            # Where a parent may not be read, this process has made nothing in it either.
            with contextlib.suppress(PermissionError):
                _sync_directory(path.parent)

    def create(self, name: str, size: int, *, direct: bool) -> LocalWriteHandle:
        path = self._path(name)
        handle = LocalWriteHandle(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        try:
            # Files in memory have nothing to bypass, and allocating their pages beforehand doubles the work.
            if self._in_memory(path):
                handle.set_size(size)
                return handle
            handle.reserve(size)
            if direct:
                handle.open_direct(path)
        except OSError:
            handle.close()
            raise
        return handle

    def sync_names(self, folder: str) -> None:
        _sync_directory(self._root / folder)

    def publish(self, name: str, data: bytes, temporary: str) -> None:
        handle = self.create(temporary, len(data), direct=False)
        try:
            handle.write_at(0, data)
            # Invariant: the bytes are durable before the name points to them.
            handle.sync()
        finally:
            handle.close()
        self._path(temporary).rename(self._path(name))
        _sync_directory(self._root)

    def open_read(self, name: str, *, direct: bool = False) -> LocalReadHandle:
        path = self._path(name)
        handle = LocalReadHandle(os.open(path, os.O_RDONLY | os.O_CLOEXEC), name)
        if direct and not self._in_memory(path):
            handle.open_direct(path)
        return handle

    def size(self, name: str) -> int:
        return self._path(name).stat().st_size

    def names(self, folder: str) -> Iterator[str]:
        try:
            entries = os.scandir(self._root / folder)
        except (FileNotFoundError, NotADirectoryError):
            return
        with entries:
            for entry in entries:
                if not entry.is_dir():
                    yield f"{folder}/{entry.name}" if folder else entry.name

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def link(self, name: str, source: Store, source_name: str) -> None:
        if not isinstance(source, LocalStore):
            raise OSError(errno.EXDEV, f"{self.location} cannot share files with {source.location}")
        os.link(source._path(source_name), self._path(name), follow_symlinks=False)

    def free_bytes(self) -> int | None:
        there = next(path for path in (self._root, *self._root.parents) if path.exists())
        found = os.statvfs(there)
        # Some blocks are for root alone. File systems that have none do not tell.
        blocks = found.f_bfree if os.geteuid() == 0 else found.f_bavail
        return blocks * found.f_frsize if found.f_blocks else None

    def folder(self, name: str) -> LocalStore:
        return LocalStore(self._path(name))

    def folders(self) -> Iterator[str]:
        try:
            entries = os.scandir(self._root)
        except (FileNotFoundError, NotADirectoryError):
            return
        with entries:
            yield from [entry.name for entry in entries if entry.is_dir()]

    def remove_empty(self, folder: str) -> None:
        path = self._root / folder
        try:
            path.rmdir()
        except FileNotFoundError:
            return
        except FileExistsError as error:
            # Some systems say so of a directory that is not empty.
            raise OSError(errno.ENOTEMPTY, f"{path} is not empty") from error
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no directory flush: their servers make names durable themselves.
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


class LocalWriteHandle(WriteHandle):
    """A file open for writing, through the page cache and, once `open_direct` was called, past it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._direct: int | None = None

    @property
    def direct_bytes(self) -> int:
        return 0 if self._direct is None else _DIRECT_ALIGNMENT

    @property
    def nearby(self) -> bool:
        return True

    def reserve(self, size: int) -> None:
        """Allocate the blocks now: a full disk is noticed before the first byte, and writes need no allocation."""
        if size:
            try:
                os.posix_fallocate(self._descriptor, 0, size)
            except OSError as error:
                if error.errno not in _NOT_SUPPORTED:
                    raise
                self.set_size(size)

    def set_size(self, size: int) -> None:
        """Make the file this long, without allocating anything."""
        os.ftruncate(self._descriptor, size)

    def open_direct(self, path: Path) -> None:
        """Open a second descriptor past the page cache, if the file system knows that."""
        self._direct = _open_direct(path, os.O_WRONLY)

    def write_at(self, offset: int, data: Buffer) -> None:
        self.write_parts(offset, [memoryview(data)])

    def write_parts(self, offset: int, parts: Sequence[memoryview]) -> None:
        left = [part.cast("B") for part in parts if part.nbytes]
        # Whatever wants another alignment than we know of, or is continued after a short write, takes the page cache.
        direct = self._direct
        if direct is not None and _aligned_bytes(offset, left) < sum(map(len, left)):
            direct = None
        while left:
            batch = left[:_MOST_PARTS]
            try:
                written = os.pwritev(self._descriptor if direct is None else direct, batch, offset)
            except OSError as error:
                if direct is None or error.errno != errno.EINVAL:
                    raise
                direct = None
                continue
            if written == 0:
                raise OSError(errno.EIO, f"nothing of {sum(map(len, left))} bytes was written at byte {offset}")
            offset += written
            left = _after(left, written)
            if written % _DIRECT_ALIGNMENT:
                direct = None

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        _close_all(self._direct, self._descriptor)
        self._direct, self._descriptor = None, -1


def _open_direct(path: Path, mode: int) -> int | None:
    try:
        return os.open(path, mode | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        return None


def _close_all(*descriptors: int | None) -> None:
    for descriptor in descriptors:
        if descriptor is not None and descriptor >= 0:
            # Bytes were made durable before, or do not matter; there is nothing to do about a failing close.
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _aligned_bytes(offset: int, parts: Sequence[memoryview]) -> int:
    """How many leading bytes of the parts may pass the page cache: up to an end, or a part's end, that is not aligned."""
    total = 0
    for part in parts:
        if (offset + total | address_of(np.frombuffer(part, dtype=np.uint8))) % _DIRECT_ALIGNMENT:
            break
        whole = len(part) // _DIRECT_ALIGNMENT * _DIRECT_ALIGNMENT
        total += whole
        if whole < len(part):
            break
    return total


def _before(parts: Sequence[memoryview], count: int) -> Sequence[memoryview]:
    """The first `count` bytes of all parts."""
    return next(cut_parts(parts, count))


def _after(parts: Sequence[memoryview], count: int) -> list[memoryview]:
    """The parts without their first `count` bytes."""
    for number, part in enumerate(parts):
        if count < len(part):
            return [part[count:], *parts[number + 1 :]]
        count -= len(part)
    return []


class LocalReadHandle(ReadHandle):
    """A file open for reading, through the page cache and, once `open_direct` was called, past it."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._direct: int | None = None
        self._name = name
        self._size = os.fstat(descriptor).st_size

    @property
    def size(self) -> int:
        return self._size

    def open_direct(self, path: Path) -> None:
        """Open a second descriptor past the page cache, if the file system knows that."""
        self._direct = _open_direct(path, os.O_RDONLY)

    def read_into(self, offset: int, target: memoryview) -> None:
        self.read_parts(offset, [target], self.access_at(offset))

    def read_parts(self, offset: int, targets: Sequence[memoryview], access: Access) -> None:
        direct = self._direct if access.alignment_bytes > 1 else None
        # Mostly one call is enough, and then nothing is to be done part by part.
        done = os.preadv(self._descriptor, targets, offset) if direct is None and 0 < len(targets) <= _MOST_PARTS else 0
        if done and done == sum([target.nbytes for target in targets]):
            return
        left = _after([target.cast("B") for target in targets if target.nbytes], done)
        offset += done
        while left:
            batch = left[:_MOST_PARTS]
            aligned = _aligned_bytes(offset, batch) if direct is not None else 0
            if direct is not None and aligned >= _DIRECT_FROM_BYTES:
                count = os.preadv(direct, _before(batch, aligned), offset)
                self._forget_look(offset)
            else:
                count = os.preadv(self._descriptor, batch, offset)
            if count == 0:
                missing = sum(map(len, left))
                raise OSError(errno.EIO, f"{self._name} ends at byte {offset}, {missing} bytes too early")
            offset += count
            left = _after(left, count)

    def access_at(self, offset: int) -> Access:
        # Without a way past the page cache everything goes through this machine's memory, and is read ahead.
        return Access(nearby=True) if self._is_cached(offset) else Access(_DIRECT_ALIGNMENT)

    def _forget_look(self, offset: int) -> None:
        """Drop the page that `_is_cached` had the system read: it would let the bytes look cached next time."""
        with contextlib.suppress(OSError):
            # Only a hint, which may be refused.
            os.posix_fadvise(self._descriptor, offset, _DIRECT_ALIGNMENT, os.POSIX_FADV_DONTNEED)

    def _is_cached(self, offset: int) -> bool:
        """Whether the byte at `offset` is in the page cache: bytes behind it are then likely to be, too."""
        if self._direct is None:
            return True
        try:
            # Reads a byte only if it is there. If not, the system begins to read its page, in the background.
            return os.preadv(self._descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            return True

    def close(self) -> None:
        _close_all(self._direct, self._descriptor)
        self._direct, self._descriptor = None, -1
