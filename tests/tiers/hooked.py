"""A directory whose operations are told of before they happen; what is raised then is what they fail with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from giantstep.storage.base import ReadHandle
from giantstep.storage.local import LocalStore

Hook = Callable[[str, str], None]


class HookedStore(LocalStore):
    """A `LocalStore`, and those of its folders.

    Args:
        root: the directory.
        hook: is called with "create", "open", "read", "publish" or "prepare", and the path.
    """

    def __init__(self, root: str | os.PathLike[str], hook: Hook) -> None:
        super().__init__(root)
        self._hook = hook

    def _tell(self, operation: str, name: str) -> None:
        self._hook(operation, f"{self.location}/{name}")

    def prepare(self, folder: str) -> None:
        self._tell("prepare", folder)
        super().prepare(folder)

    def create(self, name: str, size: int, *, direct: bool) -> Any:
        self._tell("create", name)
        return super().create(name, size, direct=direct)

    def publish(self, name: str, data: bytes, temporary: str) -> None:
        self._tell("publish", name)
        super().publish(name, data, temporary)

    def open_read(self, name: str, *, direct: bool = False) -> Any:
        self._tell("open", name)
        return _Read(super().open_read(name, direct=direct), lambda: self._tell("read", name))

    def folder(self, name: str) -> HookedStore:
        return HookedStore(Path(self.location) / name, self._hook)


class _Read:
    def __init__(self, handle: ReadHandle, tell: Callable[[], None]) -> None:
        self._handle, self._tell = handle, tell

    def read_into(self, offset: int, target: memoryview) -> None:
        self._tell()
        self._handle.read_into(offset, target)

    def read_parts(self, *arguments: Any) -> Any:
        self._tell()
        return self._handle.read_parts(*arguments)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
