"""Recovering where others work at the same time, through links, and at paths that cannot be."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import giantstep as gs
from giantstep.commit.remove import remove_checkpoint
from giantstep.diagnosis import diagnose
from giantstep.errors import BadArgumentError, IncompleteError
from giantstep.format.names import data_file_name, index_file_name, new_save_id
from giantstep.manager import CheckpointManager, Keep
from giantstep.recovery import FindingKind, clean, inspect
from giantstep.steps import step_name
from giantstep.storage.local import LocalStore
from giantstep.testing.ranks import run_ranks

YESTERDAY = new_save_id(dt.datetime.now(dt.UTC) - dt.timedelta(days=1), "0" * 11)


def litter(step: Path, files: int = 1, *, index: bool = False) -> None:
    """What a save left that crashed."""
    (step / "data").mkdir(parents=True)
    for rank in range(files):
        (step / data_file_name(YESTERDAY, rank, 0)).write_bytes(b"left")
    if index:
        (step / index_file_name(YESTERDAY)).write_bytes(b"left")


def test_several_processes_may_recover_one_root_at_once(tmp_path: Path) -> None:
    for turn in range(10):
        root = tmp_path / str(turn)
        gs.save({"w": torch.ones(4)}, root / step_name(50))
        for step in range(8):
            litter(root / step_name(step), step % 4, index=step % 3 == 0)
        gate = threading.Barrier(4)
        removed = []

        def recover(root: Path, gate: threading.Barrier, removed: list[list[str]]) -> None:
            findings = inspect(root)
            gate.wait()
            removed.append(clean(findings))

        run_ranks(4, lambda _, root=root, gate=gate, removed=removed: recover(root, gate, removed))  # type: ignore[misc]
        assert len(removed) == 4
        assert [path.name for path in root.iterdir()] == [step_name(50)]
        assert gs.open_checkpoint(root / step_name(50)).verify().ok


@pytest.mark.parametrize("gone", ["data", ""])
def test_a_place_that_another_process_removes_meanwhile_is_no_error(
    tmp_path: Path, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is through with a folder when this one flushes its names."""
    sync = LocalStore.sync_names

    def late(self: LocalStore, folder: str) -> None:
        for path in sorted((tmp_path / "c" / gone).rglob("*"), reverse=True):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()
        (tmp_path / "c" / gone).rmdir()
        monkeypatch.setattr(LocalStore, "sync_names", sync)
        sync(self, folder)

    gs.save({"w": torch.ones(4)}, tmp_path / "c")
    monkeypatch.setattr(LocalStore, "sync_names", late)
    remove_checkpoint(LocalStore(tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_steps_that_are_links_are_removed_neither_by_a_manager_nor_by_recover(tmp_path: Path) -> None:
    """A checkpoint of another run, linked to go on from, belongs to that run."""
    base, run = tmp_path / "base", tmp_path / "run"
    gs.save({"w": torch.ones(4)}, base / step_name(7))
    litter(base / step_name(8))
    run.mkdir()
    (run / step_name(1)).symlink_to(base / step_name(7))
    (run / step_name(2)).symlink_to(base / step_name(8))
    with CheckpointManager(run, keep=Keep(last=1)) as manager:
        for step in (3, 4):
            manager.save(step, {"w": torch.zeros(4)}, asynchronous=False)
    assert sorted(path.name for path in run.iterdir()) == [step_name(step) for step in (1, 2, 4)]
    assert gs.open_checkpoint(base / step_name(7)).verify().ok
    (found,) = inspect(run)
    assert (found.kind, found.removable) == (FindingKind.LEFTOVER, False)
    assert "a link to a directory elsewhere" in found.why
    assert clean([found]) == []
    assert (base / step_name(8) / data_file_name(YESTERDAY, 0, 0)).exists()


def test_a_step_whose_data_are_linked_is_not_removed(tmp_path: Path) -> None:
    """Two steps whose data lie in one directory: to remove one by its directory would take the other's."""
    (tmp_path / "fast").mkdir()
    for step in (1, 2):
        (tmp_path / "run" / step_name(step)).mkdir(parents=True)
        (tmp_path / "run" / step_name(step) / "data").symlink_to(tmp_path / "fast")
    gs.save({"w": torch.ones(4)}, tmp_path / "run" / step_name(1))
    before = sorted((tmp_path / "fast").iterdir())
    with CheckpointManager(tmp_path / "run", keep=Keep(last=1)) as manager:
        for step in (3, 4):
            manager.save(step, {"w": torch.zeros(4)}, asynchronous=False)
    assert sorted((tmp_path / "fast").iterdir()) == before
    assert gs.open_checkpoint(tmp_path / "run" / step_name(1)).verify().ok


def test_a_link_that_is_named_is_followed_and_judged_by_what_lies_beside_its_directory(tmp_path: Path) -> None:
    gs.save({"w": torch.ones(4)}, tmp_path / "run" / step_name(9))
    litter(tmp_path / "run" / step_name(3), index=True)
    (tmp_path / "link").symlink_to(tmp_path / "run" / step_name(3))
    findings = inspect(tmp_path / "link")
    assert [(found.kind, found.removable, found.path) for found in findings] == [
        (FindingKind.PARTLY_REMOVED, True, str(tmp_path / "run" / step_name(3)))
    ]
    clean(findings)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [step_name(9)]
    (tmp_path / "root").symlink_to(tmp_path / "run")
    litter(tmp_path / "run" / step_name(3))
    assert clean(inspect(tmp_path / "root"))
    assert diagnose(tmp_path / "root").healthy


@pytest.mark.parametrize("path", ["\0", "runs/a\0b", "file:///runs/a%00b/step_00000001"])
def test_a_path_with_a_null_character_can_never_be(path: str) -> None:
    for call in (
        lambda: inspect(path),
        lambda: diagnose(path),
        lambda: gs.save({}, path),
        lambda: gs.load({}, path),
        lambda: gs.load({}, path, on_corrupt="fallback"),
    ):
        with pytest.raises(BadArgumentError, match="null character"):
            call()


def test_of_a_path_below_a_file_the_diagnosis_says_that_it_is_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / step_name(1), tmp_path / "file" / "deep" / step_name(1)):
        (problem,) = diagnose(path).problems
        assert problem.why == f"{tmp_path / 'file'} is a file"


@pytest.mark.parametrize("name", ["a b", "ü\u202e", "new\nline", "%41", "[glob]*", "-x", "memory:", os.fsdecode(b"\xff\xfe")])
def test_names_of_any_characters_are_recovered_and_diagnosed(tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    gs.save({"w": torch.ones(4)}, root / step_name(2))
    litter(root / step_name(1))
    (root / step_name(2) / name).write_text("x")
    for command in (["doctor"], ["recover", "--json"], ["recover", "--yes"]):
        done = subprocess.run(
            [sys.executable, "-m", "giantstep.cli.main", *command, "--", str(root)],
            capture_output=True,
            check=False,
            timeout=120,
        )
        assert done.stderr == b""
        assert done.returncode == (command[-1] == "--json")
    assert not (root / step_name(1)).exists()


def test_a_step_that_is_removed_while_it_is_diagnosed_is_not_called_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a job does that saves and keeps a few steps; the root is looked at anew."""
    gs.save({"w": torch.ones(4)}, tmp_path / step_name(1))
    size = LocalStore.size

    def late(self: LocalStore, name: str) -> int:
        if name.startswith("data/"):
            monkeypatch.setattr(LocalStore, "size", size)
            gs.save({"w": torch.zeros(4)}, tmp_path / step_name(2))
            remove_checkpoint(LocalStore(tmp_path / step_name(1)))
        return size(self, name)

    monkeypatch.setattr(LocalStore, "size", late)
    found = diagnose(tmp_path)
    assert found.healthy
    assert found.location == str(tmp_path / step_name(2))


def test_a_step_that_changes_all_the_time_is_diagnosed_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, looks = LocalStore.size, []

    def save() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(LocalStore, "size", size)
            gs.save({"w": torch.ones(4)}, tmp_path / "c")

    def late(self: LocalStore, name: str) -> int:
        if name.startswith("data/"):
            looks.append(name)
            save()
        return size(self, name)

    save()
    monkeypatch.setattr(LocalStore, "size", late)
    assert not diagnose(tmp_path / "c").healthy
    assert 1 < len(looks) < 10


def test_a_save_whose_index_is_taken_away_before_it_commits_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever recovers without regard for saves that run."""
    gs.save({"w": torch.ones(4)}, tmp_path / "c")
    sync = LocalStore.sync_names

    def recover(self: LocalStore, folder: str) -> None:
        sync(self, folder)
        with monkeypatch.context() as patched:
            patched.setattr(LocalStore, "sync_names", sync)
            for path in tmp_path.glob("c/*.index.safetensors"):
                if path.name != gs.open_checkpoint(tmp_path / "c").record.index.name:
                    path.unlink()

    monkeypatch.setattr(LocalStore, "sync_names", recover)
    with pytest.raises(IncompleteError, match=r"index .* is gone"):
        gs.save({"w": torch.zeros(4)}, tmp_path / "c")
    monkeypatch.setattr(LocalStore, "sync_names", sync)
    assert gs.open_checkpoint(tmp_path / "c")["w"][...].tolist() == [1.0] * 4
    gs.save({"w": torch.zeros(4)}, tmp_path / "c")
    assert gs.open_checkpoint(tmp_path / "c").verify().ok


@pytest.mark.parametrize("there", [False, True])
def test_a_cleaning_ends_where_a_save_commits_meanwhile(tmp_path: Path, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it deletes the first of the files that it found, the save to which the others belong commits."""
    gs.save({"w": torch.ones(4)}, tmp_path / step_name(9))
    place, delete = tmp_path / step_name(1), LocalStore.delete
    if there:
        gs.save({"w": torch.ones(4)}, place)
        (place / data_file_name(YESTERDAY, 0, 0)).write_bytes(b"left")
    else:
        litter(place)
    (place / f"checkpoint.json.{YESTERDAY}.tmp").write_bytes(b"left")
    findings = inspect(tmp_path)
    assert [found.removable for found in findings] == [True]

    def late(self: LocalStore, name: str) -> None:
        monkeypatch.setattr(LocalStore, "delete", delete)
        delete(self, name)
        # What the save had written until it was looked at, and what it wrote since.
        shutil.copytree(tmp_path / step_name(9), place, dirs_exist_ok=True)

    monkeypatch.setattr(LocalStore, "delete", late)
    assert clean(findings) == [str(place / f"checkpoint.json.{YESTERDAY}.tmp")]
    assert (place / data_file_name(YESTERDAY, 0, 0)).exists()
    assert gs.open_checkpoint(place).verify().ok
