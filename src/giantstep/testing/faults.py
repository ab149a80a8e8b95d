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

from giantstep.storage.base import Buffer, ReadHandle, WriteHandle


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
    named: bool = False


@dataclass(slots=True)
class _Disk:
    files: dict[str, _File] = field(default_factory=dict)
    durable_names: dict[str, _File] = field(default_factory=dict)
    made: bool = False


class CrashingStore:
    """A store in memory that crashes before or after its n-th operation.

    Args:
        crash_at: number of the operation, from 0; None never crashes.
        after: crash after the operation took effect instead of before.
        fail_with: raise this errno as `OSError` at the operation instead of crashing, and go on working.
    """

    def __init__(self, crash_at: int | None = None, *, after: bool = False, fail_with: int | None = None) -> None:
        self._disk = _Disk()
        self._lock = threading.RLock()
        self._crash_at = crash_at
        self._after = after
        self._fail_with = fail_with
        self._crashed = False
        self.operations: list[str] = []

    location = "memory://crashing"

    def arm(self, crash_at: int | None, *, after: bool = False, fail_with: int | None = None) -> None:
        """Count operations from 0 again and crash at another one."""
        with self._lock:
            self.operations = []
            self._crash_at, self._after, self._fail_with, self._crashed = crash_at, after, fail_with, False

    @property
    def crashed(self) -> bool:
        """Whether the crash has happened."""
        return self._crashed

    def _operation(self, name: str, effect: Callable[[], None]) -> None:
        with self._lock:
            if self._crashed:
                raise CrashError
            here = len(self.operations) == self._crash_at
            self.operations.append(name)
            if here and self._fail_with is not None:
                raise OSError(self._fail_with, f"injected at {name}")
            if here and not self._after:
                self._crashed = True
                raise CrashError
            effect()
            if here:
                self._crashed = True
                raise CrashError

    def after_power_loss(self, loss: Loss) -> CrashingStore:
        """A working store with what is left."""
        found = CrashingStore()
        found._disk.made = self._disk.made
        names = self._disk.durable_names if loss is Loss.UNSYNCED else self._disk.files
        for name, file in names.items():
            if loss is Loss.NOTHING:
                data = bytes(file.data)
            elif loss is Loss.UNSYNCED:
                data = file.durable
            else:
                data = _torn(file)
            left = _File(bytearray(data), data, named=True)
            found._disk.files[name] = found._disk.durable_names[name] = left
        return found

    # The Store protocol.

    def exists(self) -> bool:
        return self._disk.made

    def prepare(self, folder: str) -> None:
        self._operation(f"prepare {folder}", lambda: setattr(self._disk, "made", True))

    def create(self, name: str, size: int, *, direct: bool) -> CrashingHandle:
        def effect() -> None:
            if name in self._disk.files:
                raise FileExistsError(errno.EEXIST, name)
            self._disk.files[name] = _File(bytearray(size))

        self._operation(f"create {name}", effect)
        return CrashingHandle(self, name, self._disk.files[name])

    def sync_names(self, folder: str) -> None:
        self._operation(f"sync_names {folder}", lambda: self._make_durable(folder))

    def _make_durable(self, folder: str) -> None:
        inside = {name: file for name, file in self._disk.files.items() if name.rpartition("/")[0] == folder}
        kept = {name: file for name, file in self._disk.durable_names.items() if name.rpartition("/")[0] != folder}
        self._disk.durable_names = {**kept, **inside}

    def publish(self, name: str, data: bytes, temporary: str) -> None:
        handle = self.create(temporary, len(data), direct=False)
        handle.write_at(0, data)
        handle.sync()

        def rename() -> None:
            self._disk.files[name] = self._disk.files.pop(temporary)

        self._operation(f"rename {temporary} {name}", rename)
        self._operation("sync_names ", lambda: self._make_durable(""))

    def open_read(self, name: str, *, direct: bool = False) -> CrashingHandle:
        if name not in self._disk.files:
            raise FileNotFoundError(errno.ENOENT, name)
        return CrashingHandle(self, name, self._disk.files[name])

    def size(self, name: str) -> int:
        return self.open_read(name).size

    def names(self, folder: str) -> Iterator[str]:
        yield from [name for name in self._disk.files if name.rpartition("/")[0] == folder]

    def delete(self, name: str) -> None:
        self._operation(f"delete {name}", lambda: (self._disk.files.pop(name, None), None)[1])


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
