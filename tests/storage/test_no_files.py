"""Names of a directory that lead to no file: they are told from files, and nothing waits for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import giantstep as gs
from giantstep.diagnosis import diagnose
from giantstep.errors import NotACheckpointError
from giantstep.manager.pins import is_pinned
from giantstep.recovery import inspect
from giantstep.steps import scan_steps, step_name
from giantstep.storage.base import NotAFileError
from giantstep.storage.local import LocalStore

KINDS = {
    "directory": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Holds nothing that is a file."""
    for name, make in KINDS.items():
        make(tmp_path / name)
    return tmp_path


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_file_is_neither_opened_nor_measured(place: Path, name: str) -> None:
    store, before = LocalStore(place), open_files()
    for direct in (False, True):
        with pytest.raises(NotAFileError, match="not a file, but a"):
            store.open_read(name, direct=direct)
    with pytest.raises(NotAFileError, match="not a file, but a"):
        store.size(name)
    assert open_files() == before


def test_a_link_in_a_circle_is_listed_as_no_directory_and_stops_no_listing(place: Path) -> None:
    store = LocalStore(place)
    assert sorted(store.folders()) == ["directory"]
    assert sorted(store.names("")) == ["device", "loop", "pipe"]


def test_a_root_with_such_names_is_scanned_inspected_and_diagnosed(place: Path) -> None:
    gs.save({"w": torch.ones(3)}, place / step_name(1))
    for name, make in KINDS.items():
        make(place / step_name(1) / name)
    (place / step_name(2)).symlink_to(step_name(2))
    assert [entry.step for entry in scan_steps(LocalStore(place))] == [1]
    assert diagnose(place).healthy
    (found,) = inspect(place)
    assert not found.removable


@pytest.mark.parametrize("name", ["loop", "pipe", "device"])
def test_a_path_to_no_directory_is_diagnosed_as_such(place: Path, name: str) -> None:
    assert not diagnose(place / name).healthy
    assert not diagnose(place).healthy


@pytest.mark.parametrize("kind", KINDS)
def test_no_save_replaces_a_record_that_is_no_file(tmp_path: Path, kind: str) -> None:
    record = tmp_path / "checkpoint.json"
    KINDS[kind](record)
    before = record.lstat()
    with pytest.raises(NotACheckpointError, match=r"checkpoint\.json is not a file"):
        gs.save({"w": torch.ones(3)}, tmp_path)
    assert record.lstat() == before
    assert not any((tmp_path / "data").iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_called_pinned_keeps_a_step(tmp_path: Path, kind: str) -> None:
    (tmp_path / step_name(1)).mkdir()
    KINDS[kind](tmp_path / step_name(1) / "pinned")
    assert is_pinned(LocalStore(tmp_path), 1)
    assert not is_pinned(LocalStore(tmp_path), 2)


def test_an_incremental_save_writes_anew_what_is_no_file_any_more(tmp_path: Path) -> None:
    state = {"w": torch.arange(5000.0)}
    gs.save(state, tmp_path / "a", options=gs.SaveOptions(digests=True))
    (data,) = (tmp_path / "a" / "data").iterdir()
    data.unlink()
    os.mkfifo(data)
    gs.save(state, tmp_path / "b", options=gs.SaveOptions(previous=tmp_path / "a"))
    assert gs.open_checkpoint(tmp_path / "b").verify().ok
