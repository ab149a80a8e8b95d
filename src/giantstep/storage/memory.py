"""A store in this process's memory: `memory://name`. For tests, and for state that need not outlive a process.

Stores of one name share their files. Not durable, and not visible to other processes.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator

from giantstep.storage.base import Access, Buffer, ReadHandle, Store, WriteHandle

# The medium itself, as a disk is for `LocalStore`: files by the name of the store.
_MEDIA: dict[str, dict[str, bytearray]] = {}
_LOCK = threading.Lock()


class MemoryStore:
    """Files of the in-process medium `name`."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def location(self) -> str:
        return f"memory://{self._name}"

    def _files(self) -> dict[str, bytearray]:
        with _LOCK:
            found = _MEDIA.get(self._name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, f"{self.location} does not exist")
        return found

    def exists(self) -> bool:
        with _LOCK:
            return self._name in _MEDIA

    def prepare(self, folder: str) -> None:
        with _LOCK:
            _MEDIA.setdefault(self._name, {})

    def create(self, name: str, size: int, *, direct: bool) -> MemoryHandle:
        files = self._files()
        data = bytearray(size)
        if files.setdefault(name, data) is not data:
            raise FileExistsError(errno.EEXIST, f"{name} exists in {self.location}")
        return MemoryHandle(data)

    def sync_names(self, folder: str) -> None:
        self._files()

    def publish(self, name: str, data: bytes, temporary: str) -> None:
        self._files()[name] = bytearray(data)

    def open_read(self, name: str, *, direct: bool = False) -> MemoryHandle:
        found = self._files().get(name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, f"{name} is not in {self.location}")
        return MemoryHandle(found)

    def size(self, name: str) -> int:
        return self.open_read(name).size

    def names(self, folder: str) -> Iterator[str]:
        with _LOCK:
            names = list(_MEDIA.get(self._name, ()))
        yield from [name for name in names if name.rpartition("/")[0] == folder]

    def delete(self, name: str) -> None:
        self._files().pop(name, None)

    def link(self, name: str, source: Store, source_name: str) -> None:
        if not isinstance(source, MemoryStore):
            raise OSError(errno.EXDEV, f"{self.location} cannot share files with {source.location}")
        found = source._files().get(source_name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, f"{source_name} is not in {source.location}")
        files = self._files()
        with _LOCK:
            if name in files:
                raise FileExistsError(errno.EEXIST, f"{name} exists in {self.location}")
            files[name] = found

    def free_bytes(self) -> int | None:
        return None

    def folder(self, name: str) -> MemoryStore:
        return MemoryStore(f"{self._name}/{name}")

    def folders(self) -> Iterator[str]:
        inside = f"{self._name}/"
        with _LOCK:
            found = {name.removeprefix(inside).partition("/")[0] for name in _MEDIA if name.startswith(inside)}
        yield from sorted(found)

    def remove_empty(self, folder: str) -> None:
        with _LOCK:
            files = _MEDIA.get(self._name, {})
            below = any(name.startswith(f"{self._name}/") for name in _MEDIA)
            if any(name.startswith(f"{folder}/") for name in files) if folder else files or below:
                raise OSError(errno.ENOTEMPTY, f"{self.location}/{folder} is not empty")
            if not folder:
                _MEDIA.pop(self._name, None)

    def clear(self) -> None:
        """Forget the medium and all its files."""
        with _LOCK:
            _MEDIA.pop(self._name, None)


class MemoryHandle(ReadHandle, WriteHandle):
    """A file of a `MemoryStore`, for reading and writing."""

    direct_bytes = 0
    nearby = True

    def __init__(self, data: bytearray) -> None:
        self._data = data

    @property
    def size(self) -> int:
        return len(self._data)

    def write_at(self, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        if offset + len(view) > len(self._data):
            raise OSError(errno.EFBIG, f"write of {len(view)} bytes at {offset} into a file of {len(self._data)}")
        memoryview(self._data)[offset : offset + len(view)] = view

    def read_into(self, offset: int, target: memoryview) -> None:
        view = target.cast("B")
        if offset + len(view) > len(self._data):
            raise OSError(errno.EIO, f"file ends at byte {len(self._data)}")
        view[:] = memoryview(self._data)[offset : offset + len(view)]

    def access_at(self, offset: int) -> Access:
        return Access(nearby=True)

    def sync(self) -> None:
        """Nothing outlives the process."""

    def close(self) -> None:
        """Nothing to release."""
