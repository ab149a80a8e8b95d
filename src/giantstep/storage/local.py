"""A directory of a local or shared POSIX file system as a store. Only this module and `local_handles` touch files.

Durability is by `fsync` of the file, then of the directory that names it; publication by `rename` after the
bytes are durable, as POSIX allows no other order to be relied upon after a power loss.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from giantstep.storage.base import NotAFileError, Store
from giantstep.storage.local_handles import NOT_SUPPORTED, LocalReadHandle, LocalWriteHandle
from giantstep.storage.medium import is_memory_backed

# There is none: nothing at all, something else, or a link that leads in a circle.
_NO_DIRECTORY = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


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
        handle = LocalReadHandle(_open_file(path), name)
        if direct and not self._in_memory(path):
            handle.open_direct(path)
        return handle

    def size(self, name: str) -> int:
        path = self._path(name)
        with _circles_are_no_files(path):
            found = path.stat()
        _check_regular(found, path)
        return found.st_size

    def names(self, folder: str) -> Iterator[str]:
        try:
            entries = os.scandir(self._root / folder)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY:
                raise
            return
        with entries:
            for entry in entries:
                if not _is_directory(entry):
                    yield f"{folder}/{entry.name}" if folder else entry.name

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def link(self, name: str, source: Store, source_name: str) -> None:
        if not isinstance(source, LocalStore):
            raise OSError(errno.EXDEV, f"{self.location} cannot share files with {source.location}")
        # A name of what a symbolic link points to: a name of the link itself would depend on that staying, and on places.
        os.link(source._path(source_name).resolve(), self._path(name), follow_symlinks=False)

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
        except OSError as error:
            if error.errno not in _NO_DIRECTORY:
                raise
            return
        with entries:
            yield from [entry.name for entry in entries if _is_directory(entry)]

    def remove_empty(self, folder: str) -> None:
        path = self._root / folder
        try:
            path.rmdir()
        except FileNotFoundError:
            return
        except FileExistsError as error:
            # Some systems say so of a directory that is not empty.
            raise OSError(errno.ENOTEMPTY, f"{path} is not empty") from error
        # Where the parent is gone too, whoever removed it has made that durable.
        with contextlib.suppress(FileNotFoundError):
            _sync_directory(path.parent)


def _is_directory(entry: os.DirEntry[str]) -> bool:
    """Whether it is one, or a link to one. Whoever looks into what cannot be told will hear of it."""
    try:
        return entry.is_dir()
    except OSError as error:
        return error.errno != errno.ELOOP


@contextlib.contextmanager
def _circles_are_no_files(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise NotAFileError(error.errno, "not a file, but a link that leads in a circle", str(path)) from error


def _check_regular(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise NotAFileError(errno.EINVAL, f"not a file, but {kind}", str(path))


def _open_file(path: Path) -> int:
    """A descriptor for reading. Whatever is no file is not waited for, as a pipe without a writer would be."""
    with _circles_are_no_files(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            # A file that another machine has on lease is waited for; a socket cannot be opened at all.
            if error.errno not in (errno.EAGAIN, errno.ENXIO):
                raise
            _check_regular(path.stat(), path)
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check_regular(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no directory flush: their servers make names durable themselves.
        if error.errno not in NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)
