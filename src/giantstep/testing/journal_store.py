"""`JournalStore`: a store in memory that makes the system calls `LocalStore` would, on a model disk, and notes each of them.

The calls can be done again on a copy of the disk as it was before, up to any of them. Called by `crash_points`; stores that
make a mistake on purpose derive from it.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from giantstep.storage.base import Buffer, ReadHandle, Store, WriteHandle
from giantstep.testing.power_loss import Disk, File, Folder

# The store lies in a folder of this name, so that the folder itself can be lost.
_PLACE = "place"


@dataclass(frozen=True, slots=True)
class Call:
    """A system call: a method of `Disk` with its arguments, and the paths that it is about, for people."""

    method: str
    arguments: tuple[Any, ...]
    about: str

    def __str__(self) -> str:
        return f"{self.method} {self.about}".rstrip()


class Journal:
    """A disk and the calls that were made on it, in order.

    Attributes:
        disk: as processes see it now.
        calls: since the journal was made or `restart` was called.
        lock: held while a call is made.
    """

    def __init__(self, disk: Disk | None = None) -> None:
        self.disk = disk if disk is not None else Disk()
        self.lock = threading.RLock()
        self.restart()

    def restart(self) -> None:
        """Make all that is there durable, and forget the calls."""
        with self.lock:
            self.disk.settle()
            self._begin = self.disk.copy()
            self.calls: list[Call] = []

    def call(self, method: str, *arguments: Any, about: str) -> Any:
        """Make a call, unless it fails, and note it."""
        with self.lock:
            found = getattr(self.disk, method)(*arguments)
            self.calls.append(Call(method, arguments, about))
            return found

    def replay(self) -> Iterator[Disk]:
        """The disk before the first call, between any two, and after the last: one object, which changes."""
        disk = self._begin.copy()
        yield disk
        for call in list(self.calls):
            getattr(disk, call.method)(*call.arguments)
            yield disk


class JournalStore:
    """A store on the disk of a journal."""

    def __init__(self, journal: Journal | None = None, base: str = f"{_PLACE}/") -> None:
        self.journal = journal if journal is not None else Journal()
        # Where this place begins on the disk; ends in "/".
        self._base = base

    @property
    def location(self) -> str:
        return f"memory://journal/{self._base}".rstrip("/")

    def _path(self, name: str) -> str:
        return (self._base + name).rstrip("/")

    def _call(self, method: str, *arguments: Any, about: str) -> Any:
        return self.journal.call(method, *arguments, about=about)

    def exists(self) -> bool:
        with self.journal.lock:
            return self.journal.disk.number_at(self._path("")) is not None

    def prepare(self, folder: str) -> None:
        wanted = self._path(folder)
        parents = [wanted[:end] for end, sign in enumerate(wanted) if sign == "/"]
        made = []
        with self.journal.lock:
            for path in [*parents, wanted]:
                if self.journal.disk.number_at(path) is None:
                    self._call("mkdir", path, about=path)
                    made.append(path)
        for path in dict.fromkeys((wanted, self._path(""), *made)):
            self.flush_parent(path)

    def flush_parent(self, path: str) -> None:
        """Make the name of a folder durable."""
        parent = path.rpartition("/")[0]
        self._call("sync_names", parent, about=parent)

    def create(self, name: str, size: int, *, direct: bool) -> JournalHandle:
        path = self._path(name)
        number = self._call("create", path, about=path)
        if size:
            self._call("resize", number, size, about=path)
        return JournalHandle(self, name, number)

    def sync_names(self, folder: str) -> None:
        path = self._path(folder)
        self._call("sync_names", path, about=path)

    def publish(self, name: str, data: bytes, temporary: str) -> None:
        handle = self.create(temporary, len(data), direct=False)
        handle.write_at(0, data)
        handle.sync()
        self.rename(temporary, name)
        self.sync_names("")

    def rename(self, name: str, new: str) -> None:
        """Give a file another name."""
        path, target = self._path(name), self._path(new)
        self._call("rename", path, target, about=f"{path} {target}")

    def sync_file(self, name: str, number: int) -> None:
        """Make the bytes of a file durable."""
        self._call("sync", number, about=self._path(name))

    def open_read(self, name: str, *, direct: bool = False) -> JournalHandle:
        with self.journal.lock:
            return JournalHandle(self, name, self.journal.disk.file_at(self._path(name)))

    def size(self, name: str) -> int:
        return self.open_read(name).size

    def names(self, folder: str) -> Iterator[str]:
        yield from self._inside(folder, File)

    def _inside(self, folder: str, kind: type[File | Folder]) -> list[str]:
        with self.journal.lock:
            disk = self.journal.disk
            number = disk.number_at(self._path(folder))
            item = None if number is None else disk.items[number]
            if not isinstance(item, Folder):
                return []
            before = f"{folder}/" if folder else ""
            return [before + name for name, inner in item.names.items() if isinstance(disk.items[inner], kind)]

    def delete(self, name: str) -> None:
        path = self._path(name)
        with self.journal.lock:
            if self.journal.disk.number_at(path) is not None:
                self._call("unlink", path, about=path)

    def link(self, name: str, source: Store, source_name: str) -> None:
        if not isinstance(source, JournalStore) or source.journal is not self.journal:
            raise OSError(errno.EXDEV, f"{self.location} cannot share files with {source.location}")
        old, new = source._path(source_name), self._path(name)
        self._call("link", old, new, about=f"{old} {new}")

    def free_bytes(self) -> int | None:
        return None

    def folder(self, name: str) -> Store:
        return type(self)(self.journal, f"{self._base}{name}/")

    def folders(self) -> Iterator[str]:
        yield from self._inside("", Folder)

    def remove_empty(self, folder: str) -> None:
        path = self._path(folder)
        with self.journal.lock:
            if self.journal.disk.number_at(path) is None:
                return
            self._call("rmdir", path, about=path)
        self.flush_parent(path)


class JournalHandle(ReadHandle, WriteHandle):
    """A file of a `JournalStore`."""

    direct_bytes = 0

    def __init__(self, store: JournalStore, name: str, number: int) -> None:
        self._store = store
        self._name = name
        self._number = number

    @property
    def size(self) -> int:
        with self._store.journal.lock:
            return len(self._store.journal.disk.file(self._number).data)

    def write_at(self, offset: int, data: Buffer) -> None:
        found = bytes(memoryview(data).cast("B"))
        # The first part alone: a crash may come in the middle of a write.
        cut = len(found) // 2
        for start, part in ((offset, found[:cut]), (offset + cut, found[cut:])):
            if part:
                about = f"{self._store._path(self._name)} {start}"
                self._store._call("write", self._number, start, part, about=about)

    def read_into(self, offset: int, target: memoryview) -> None:
        view = target.cast("B")
        with self._store.journal.lock:
            data = self._store.journal.disk.file(self._number).data
            if offset + len(view) > len(data):
                raise OSError(errno.EIO, f"{self._name} ends at byte {len(data)}")
            view[:] = bytes(data[offset : offset + len(view)])

    def sync(self) -> None:
        self._store.sync_file(self._name, self._number)

    def close(self) -> None:
        """Nothing to release."""
