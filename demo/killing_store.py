"""A store that kills its own process in the middle of a write: what a power loss or the OOM killer does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

from giantstep.storage.base import Buffer, ReadHandle, Store, WriteHandle


class KillingStore:
    """A `Store` that passes everything on, until `after_bytes` bytes of data were written. Then SIGKILL."""

    def __init__(self, store: Store, after_bytes: int) -> None:
        self._store = store
        self.left_bytes = after_bytes
        self.lock = threading.Lock()

    @property
    def location(self) -> str:
        """That of the store behind: all ranks must name the same place."""
        return self._store.location

    def exists(self) -> bool:
        """As in `Store`."""
        return self._store.exists()

    def prepare(self, folder: str) -> None:
        """As in `Store`."""
        self._store.prepare(folder)

    def create(self, name: str, size: int, *, direct: bool) -> WriteHandle:
        """As in `Store`, with a handle that counts what is written."""
        return _KillingHandle(self._store.create(name, size, direct=direct), self)

    def sync_names(self, folder: str) -> None:
        """As in `Store`."""
        self._store.sync_names(folder)

    def publish(self, name: str, data: bytes, temporary: str) -> None:
        """As in `Store`."""
        self._store.publish(name, data, temporary)

    def open_read(self, name: str) -> ReadHandle:
        """As in `Store`."""
        return self._store.open_read(name)

    def size(self, name: str) -> int:
        """As in `Store`."""
        return self._store.size(name)

    def names(self) -> Iterator[str]:
        """As in `Store`."""
        return self._store.names()

    def delete(self, name: str) -> None:
        """As in `Store`."""
        self._store.delete(name)


class _KillingHandle(WriteHandle):
    """A `WriteHandle` whose process dies when its store's allowance is used up."""

    def __init__(self, handle: WriteHandle, store: KillingStore) -> None:
        self._handle = handle
        self._store = store

    @property
    def direct_bytes(self) -> int:
        """As in `WriteHandle`."""
        return self._handle.direct_bytes

    def write_at(self, offset: int, data: Buffer) -> None:
        """Write what is allowed, and die if that is not all of it."""
        view = memoryview(data).cast("B")
        # Several threads write at once; one at a time makes the place of death the same in every run.
        with self._store.lock:
            allowed = min(len(view), self._store.left_bytes)
            self._handle.write_at(offset, view[:allowed])
            self._store.left_bytes -= allowed
            if allowed < len(view):
                os.kill(os.getpid(), signal.SIGKILL)

    def sync(self) -> None:
        """As in `WriteHandle`."""
        self._handle.sync()

    def close(self) -> None:
        """As in `WriteHandle`."""
        self._handle.close()
