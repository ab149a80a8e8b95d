"""Stores that fail on purpose: crash points, power loss, and errors at a chosen operation.

`CrashingStore` keeps what a file system would: bytes written, bytes made durable, names made, names made durable.
After the crash `after_power_loss` gives the store as a reader may find it then.
"""

from __future__ import annotations

import enum
import errno
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from giantstep.storage.base import Buffer, ReadHandle, Store, WriteHandle


class CrashError(BaseException):
    """The process ends here. No `Exception`, so that no handler of the code under test runs after a crash."""


class Loss(enum.Enum):
    """What a power loss takes away."""

    NOTHING = "nothing"
    """The process was killed; the system lived on."""
    UNSYNCED = "unsynced"
    """Everything that was not flushed is gone: bytes, and names made since the last flush of their folder."""
    TORN = "torn"
    """Names survived, and of unflushed bytes every second 512-byte sector did."""


@dataclass(slots=True)
class _File:
    data: bytearray
    durable: bytes = b""


@dataclass(slots=True)
class _Disk:
    files: dict[str, _File] = field(default_factory=dict)
    durable_names: dict[str, _File] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    crash_at: int | None = None
    after: bool = False
    fail_with: int | None = None
    crashed: bool = False
    operations: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)


class CrashingStore:
    """A store in memory that crashes before or after its n-th operation.

    Args:
        crash_at: number of the operation, from 0; None never crashes.
        after: crash after the operation took effect instead of before.
        fail_with: raise this errno as `OSError` at the operation instead of crashing, and go on working.
    """

    def __init__(self, crash_at: int | None = None, *, after: bool = False, fail_with: int | None = None) -> None:
        self._disk = _Disk(crash_at=crash_at, after=after, fail_with=fail_with)
        # Where this place begins on the disk: "" or a name that ends in "/".
        self._base = ""

    @property
    def location(self) -> str:
        return f"memory://crashing/{self._base}".rstrip("/")

    def arm(self, crash_at: int | None, *, after: bool = False, fail_with: int | None = None) -> None:
        """Count operations from 0 again and crash at another one."""
        disk = self._disk
        with disk.lock:
            disk.operations = []
            disk.crash_at, disk.after, disk.fail_with, disk.crashed = crash_at, after, fail_with, False

    @property
    def operations(self) -> list[str]:
        """What was done since the store was made or armed."""
        return self._disk.operations

    @property
    def crashed(self) -> bool:
        """Whether the crash has happened."""
        return self._disk.crashed

    def _operation(self, name: str, effect: Callable[[], None]) -> None:
        disk = self._disk
        with disk.lock:
            if disk.crashed:
                raise CrashError
            here = len(disk.operations) == disk.crash_at
            disk.operations.append(name)
            if here and disk.fail_with is not None:
                raise OSError(disk.fail_with, f"injected at {name}")
            if here and not disk.after:
                disk.crashed = True
                raise CrashError
            effect()
            if here:
                disk.crashed = True
                raise CrashError

    def after_power_loss(self, loss: Loss) -> CrashingStore:
        """A working store with what is left."""
        found = CrashingStore()
        found._disk.folders = set(self._disk.folders)
        names = self._disk.durable_names if loss is Loss.UNSYNCED else self._disk.files
        left: dict[int, _File] = {}
        for name, file in names.items():
            if loss is Loss.NOTHING:
                data = bytes(file.data)
            elif loss is Loss.UNSYNCED:
                data = file.durable
            else:
                data = _torn(file)
            # Names that shared a file still do.
            survivor = left.setdefault(id(file), _File(bytearray(data), data))
            found._disk.files[name] = found._disk.durable_names[name] = survivor
        return found

    # The Store protocol.

    def exists(self) -> bool:
        return self._base in self._disk.folders

    def prepare(self, folder: str) -> None:
        def effect() -> None:
            path = f"{self._base}{folder}/" if folder else self._base
            self._disk.folders |= {"", *(path[: end + 1] for end, sign in enumerate(path) if sign == "/")}

        self._operation(f"prepare {self._base}{folder}", effect)

    def create(self, name: str, size: int, *, direct: bool) -> CrashingHandle:
        path = self._base + name

        def effect() -> None:
            if path in self._disk.files:
                raise FileExistsError(errno.EEXIST, path)
            self._disk.files[path] = _File(bytearray(size))

        self._operation(f"create {path}", effect)
        return CrashingHandle(self, path, self._disk.files[path])

    def sync_names(self, folder: str) -> None:
        path = (self._base + folder).rstrip("/")
        self._operation(f"sync_names {path}", lambda: self._make_durable(path))

    def _make_durable(self, folder: str) -> None:
        inside = {name: file for name, file in self._disk.files.items() if name.rpartition("/")[0] == folder}
        kept = {name: file for name, file in self._disk.durable_names.items() if name.rpartition("/")[0] != folder}
        self._disk.durable_names = {**kept, **inside}

    def publish(self, name: str, data: bytes, temporary: str) -> None:
        handle = self.create(temporary, len(data), direct=False)
        handle.write_at(0, data)
        handle.sync()

        def rename() -> None:
            self._disk.files[self._base + name] = self._disk.files.pop(self._base + temporary)

        self._operation(f"rename {self._base}{temporary} {self._base}{name}", rename)
        self.sync_names("")

    def open_read(self, name: str, *, direct: bool = False) -> CrashingHandle:
        path = self._base + name
        if path not in self._disk.files:
            raise FileNotFoundError(errno.ENOENT, path)
        return CrashingHandle(self, path, self._disk.files[path])

    def size(self, name: str) -> int:
        return self.open_read(name).size

    def names(self, folder: str) -> Iterator[str]:
        within = (self._base + folder).rstrip("/")
        yield from [name.removeprefix(self._base) for name in self._disk.files if name.rpartition("/")[0] == within]

    def delete(self, name: str) -> None:
        path = self._base + name
        self._operation(f"delete {path}", lambda: (self._disk.files.pop(path, None), None)[1])

    def link(self, name: str, source: Store, source_name: str) -> None:
        if not isinstance(source, CrashingStore) or source._disk is not self._disk:
            raise OSError(errno.EXDEV, f"{self.location} cannot share files with {source.location}")
        path, old = self._base + name, source._base + source_name
        if old not in self._disk.files:
            raise FileNotFoundError(errno.ENOENT, old)

        def effect() -> None:
            if path in self._disk.files:
                raise FileExistsError(errno.EEXIST, path)
            self._disk.files[path] = self._disk.files[old]

        self._operation(f"link {old} {path}", effect)

    def free_bytes(self) -> int | None:
        return None

    def folder(self, name: str) -> CrashingStore:
        found = CrashingStore()
        found._disk, found._base = self._disk, f"{self._base}{name}/"
        return found

    def folders(self) -> Iterator[str]:
        inside = {path.removeprefix(self._base) for path in self._disk.folders if path.startswith(self._base)}
        yield from sorted({path.partition("/")[0] for path in inside} - {""})

    def remove_empty(self, folder: str) -> None:
        path = f"{self._base}{folder}/" if folder else self._base

        def effect() -> None:
            if any(name.startswith(path) for name in self._disk.files) or any(
                name != path and name.startswith(path) for name in self._disk.folders
            ):
                raise OSError(errno.ENOTEMPTY, path)
            self._disk.folders.discard(path)
            gone = {name for name in self._disk.durable_names if name.startswith(path)}
            self._disk.durable_names = {name: file for name, file in self._disk.durable_names.items() if name not in gone}

        self._operation(f"remove_empty {path}", effect)


class CrashingHandle(ReadHandle, WriteHandle):
    """A file of a `CrashingStore`."""

    direct_bytes = 0

    def __init__(self, store: CrashingStore, name: str, file: _File) -> None:
        self._store = store
        self._name = name
        self._file = file

    @property
    def size(self) -> int:
        return len(self._file.data)

    def write_at(self, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")

        def effect() -> None:
            memoryview(self._file.data)[offset : offset + len(view)] = view

        self._store._operation(f"write_at {self._name} {offset}", effect)

    def read_into(self, offset: int, target: memoryview) -> None:
        view = target.cast("B")
        if offset + len(view) > len(self._file.data):
            raise OSError(errno.EIO, f"{self._name} ends at byte {len(self._file.data)}")
        view[:] = memoryview(self._file.data)[offset : offset + len(view)]

    def sync(self) -> None:
        self._store._operation(f"sync {self._name}", lambda: setattr(self._file, "durable", bytes(self._file.data)))

    def close(self) -> None:
        """Nothing to release."""


def _torn(file: _File) -> bytes:
    """Durable bytes, with every second sector of the newer ones over them."""
    result = bytearray(len(file.data))
    result[: len(file.durable)] = file.durable[: len(result)]
    for start in range(0, len(file.data), 1024):
        result[start : start + 512] = file.data[start : start + 512]
    return bytes(result)
