"""The store whose crashes are explored makes the system calls that a local directory sees, in the same order."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.commit.remove import remove_checkpoint
from giantstep.materializing import materialize
from giantstep.storage.local import LocalStore
from giantstep.testing import store_contract
from giantstep.testing.journal_store import JournalStore

OPTIONS: dict[str, Any] = {"block_bytes": 4096, "buffer_bytes": 4096, "writer_threads": 1}
FROZEN = torch.arange(2000.0)


@pytest.mark.parametrize("check", store_contract.CHECKS)
def test_it_keeps_the_promises_of_a_store(check: Any) -> None:
    check(JournalStore())


def save(store: Any, value: float, previous: Any = None) -> None:
    options = gs.SaveOptions(**OPTIONS, previous=previous, digests=True)
    gs.save({"frozen": FROZEN, "w": torch.full((900,), value), "value": value}, store, options=options)


def several(root: Any) -> None:
    """A first save, one that links, an overwrite, and all kinds of removals."""
    save(root.folder("1"), 1.0)
    save(root.folder("2"), 2.0, root.folder("1"))
    save(root.folder("2"), 3.0)
    gs.remove_sharded_tensors(root.folder("2"), "w")
    materialize(root.folder("2"))
    for name in ("1", "2"):
        remove_checkpoint(root.folder(name))


class Recorder:
    """Notes what is changed or flushed below a folder, as methods of the model disk and paths."""

    def __init__(self, below: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self._below = f"{below}/"
        self._patch = monkeypatch
        self._wrap("mkdir", lambda path, *_: ("mkdir", path))
        self._wrap("rmdir", lambda path, *_: ("rmdir", path))
        self._wrap("unlink", lambda path, *_: ("unlink", path))
        self._wrap("rename", lambda path, new, *_: ("rename", path, new))
        self._wrap("link", lambda path, new, *_: ("link", path, new))
        self._wrap("open", lambda path, flags, *_: ("create", path) if flags & os.O_CREAT else ())
        self._wrap("posix_fallocate", lambda file, *_: ("resize", _path_of(file)))
        self._wrap("ftruncate", lambda file, *_: ("resize", _path_of(file)))
        self._wrap("pwritev", lambda file, *_: ("write", _path_of(file)))
        self._wrap("fsync", lambda file: ("sync_names" if Path(_path_of(file)).is_dir() else "sync", _path_of(file)))

    def _wrap(self, name: str, noted: Callable[..., tuple[Any, ...]]) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **named: Any) -> Any:
            found = real(*arguments, **named)
            method, *paths = noted(*arguments) or ("",)
            if method and all(f"{path}/".startswith(self._below) for path in paths):
                words = [method, *(f"{path}".removeprefix(self._below.rstrip("/")).removeprefix("/") for path in paths)]
                self.calls.append(" ".join(word for word in words if word))
            return found

        self._patch.setattr(os, name, call)


def _path_of(file: int) -> str:
    return str(Path(f"/proc/self/fd/{file}").readlink())


def comparable(calls: list[str]) -> list[str]:
    """Without ids of saves, offsets, and numbers of writes into one file."""
    found: list[str] = []
    ids: dict[str, str] = {}
    for call in calls:
        text = re.sub(r"\d{8}T\d{6}-[0-9a-f]{16}", lambda match: ids.setdefault(match[0], f"id{len(ids)}"), call)
        text = re.sub(r"^(write \S+) \d+$", r"\1", text)
        if not (found and text.startswith("write ") and found[-1] == text):
            found.append(text)
    return found


def test_the_system_calls_that_are_explored_are_those_of_the_local_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = JournalStore()
    several(model)
    with monkeypatch.context() as patch:
        recorder = Recorder(tmp_path, patch)
        several(LocalStore(tmp_path / "place"))
    expected = comparable([str(call) for call in model.journal.calls])
    assert len(expected) > 100
    assert {call.partition(" ")[0] for call in expected} == {
        *("mkdir", "rmdir", "unlink", "rename", "link", "create", "resize", "write", "sync", "sync_names")
    }
    assert comparable(recorder.calls) == expected
