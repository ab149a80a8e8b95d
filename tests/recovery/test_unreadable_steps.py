"""A step that the system does not let be read: it is listed with the reason, never removed or counted, and others go on."""

from __future__ import annotations

import datetime as dt
import errno
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import giantstep as gs
from giantstep.cli.main import cli
from giantstep.diagnosis import diagnose
from giantstep.errors import BadArgumentError, StoreError
from giantstep.format.names import RECORD_NAME, data_file_name, new_save_id
from giantstep.group.threads import ThreadGroup, ThreadGroups
from giantstep.manager import CheckpointManager, Keep
from giantstep.manager.ledger import Ledger
from giantstep.recovery import FindingKind, clean, inspect
from giantstep.steps import StepState, scan_steps, step_name
from giantstep.storage.base import ReadHandle
from giantstep.storage.local import LocalStore
from giantstep.testing.ranks import RanksFailedError, run_ranks

NOW = dt.datetime.now(dt.UTC)
LATER = NOW + dt.timedelta(days=9)
YESTERDAY = new_save_id(NOW - dt.timedelta(days=1), "0" * 11)
CODES = [errno.EACCES, errno.EIO, errno.ESTALE]


class Trouble:
    """Names that cannot be opened, and directories that cannot be listed."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}

    def check(self, path: str) -> None:
        for part, code in self.codes.items():
            if path.endswith(part):
                raise OSError(code, os.strerror(code), path)


@pytest.fixture
def trouble(monkeypatch: pytest.MonkeyPatch) -> Trouble:
    made = Trouble()
    opened, listed, measured, inside = LocalStore.open_read, LocalStore.names, LocalStore.size, LocalStore.folders

    def open_read(self: LocalStore, name: str, *, direct: bool = False) -> ReadHandle:
        made.check(f"{self.location}/{name}")
        return opened(self, name, direct=direct)

    def size(self: LocalStore, name: str) -> int:
        made.check(f"{self.location}/{name}")
        return measured(self, name)

    def names(self: LocalStore, folder: str) -> Iterator[str]:
        made.check(f"{self.location}/{folder}".rstrip("/"))
        return listed(self, folder)

    def folders(self: LocalStore) -> Iterator[str]:
        made.check(self.location)
        return inside(self)

    for name, function in (("open_read", open_read), ("size", size), ("names", names), ("folders", folders)):
        monkeypatch.setattr(LocalStore, name, function)
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1 to 4."""
    for step in (1, 2, 3, 4):
        gs.save({"w": torch.full((4,), float(step))}, tmp_path / step_name(step))
    return tmp_path


# What of a step cannot be read.
PARTS = [f"/{RECORD_NAME}", "", "/data"]


def states(root: Path) -> dict[int, StepState]:
    return {entry.step: entry.state for entry in scan_steps(LocalStore(root))}


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("part", PARTS)
def test_it_is_listed_with_the_reason_and_all_others_are_too(root: Path, trouble: Trouble, part: str, code: int) -> None:
    trouble.codes[step_name(2) + part] = code
    entries = scan_steps(LocalStore(root))
    assert [entry.state for entry in entries] == [
        StepState.COMMITTED,
        StepState.UNREADABLE,
        StepState.COMMITTED,
        StepState.COMMITTED,
    ]
    assert os.strerror(code) in entries[1].problem
    assert step_name(2) in entries[1].problem
    assert isinstance(entries[1].error, OSError)
    assert entries[1].record is None
    known = {one.step: one.state for one in Ledger(LocalStore(root)).look()}
    # Who only looks at records does not list directories that it has seen before.
    assert known == states(root)


def test_a_link_that_the_system_cannot_follow_is_such_a_step(root: Path) -> None:
    (root / step_name(5)).symlink_to("x" * 300)
    assert states(root)[5] is StepState.UNREADABLE
    assert diagnose(root).loads_instead == str(root / step_name(4))
    assert [problem.what for problem in diagnose(root).problems] == [f"{root / step_name(5)} cannot be read"]
    found = {finding.path: finding for finding in inspect(root)}
    assert not found[str(root / step_name(5))].removable


def test_a_root_that_cannot_be_read_is_an_error(root: Path, trouble: Trouble) -> None:
    trouble.codes[str(root)] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        scan_steps(LocalStore(root))
    with pytest.raises(StoreError, match="Input/output"):
        inspect(root)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("step", [1, 4])
def test_inspect_finds_it_and_clean_leaves_it(root: Path, trouble: Trouble, step: int, part: str, code: int) -> None:
    left = root / step_name(2) / data_file_name(YESTERDAY, 0, 0)
    (root / step_name(2) / RECORD_NAME).unlink()
    left.write_bytes(b"left")
    trouble.codes[step_name(step) + part] = code
    findings = inspect(root, now=LATER)
    kinds = {Path(finding.path).name: finding.kind for finding in findings}
    assert kinds == {step_name(step): FindingKind.UNREADABLE, step_name(2): FindingKind.PARTLY_REMOVED}
    (found,) = [finding for finding in findings if finding.kind is FindingKind.UNREADABLE]
    assert not found.removable
    assert os.strerror(code) in found.words
    clean(findings)
    assert not (root / step_name(2)).exists()
    trouble.codes.clear()
    assert states(root) == dict.fromkeys((1, 3, 4), StepState.COMMITTED)


def test_of_links_nothing_goes_that_may_be_of_a_step_that_cannot_be_read(root: Path, trouble: Trouble) -> None:
    """An incremental save after step 4 begins with links to its files; who cannot read step 4 must not take them for old."""
    (name,) = [f"data/{path.name}" for path in (root / step_name(4) / "data").iterdir()]
    (root / step_name(5) / "data").mkdir(parents=True)
    os.link(root / step_name(4) / name, root / step_name(5) / name)
    os.link(root / step_name(4) / name, root / step_name(1) / name)
    assert not any(finding.removable for finding in inspect(root, now=LATER))
    trouble.codes[f"{step_name(4)}/{RECORD_NAME}"] = errno.EACCES
    findings = inspect(root, now=LATER)
    assert sorted(Path(finding.path).name for finding in findings) == [step_name(step) for step in (1, 4, 5)]
    assert not any(finding.removable for finding in findings)


def test_a_place_that_cannot_be_cleaned_keeps_no_other_from_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        (root / step_name(step) / data_file_name(YESTERDAY, 0, 0)).write_bytes(b"left")
    delete = LocalStore.delete

    def refuse(self: LocalStore, name: str) -> None:
        if step_name(2) in self.location:
            raise PermissionError(errno.EACCES, "Permission denied", name)
        delete(self, name)

    monkeypatch.setattr(LocalStore, "delete", refuse)
    findings = inspect(root, now=LATER)
    assert [finding.removable for finding in findings] == [True] * 3
    with pytest.raises(StoreError, match=r"step_00000002 cannot be .*Permission denied") as caught:
        clean(findings)
    assert caught.value.__notes__ == ["2 files and directories were removed."]
    assert [Path(finding.path).name for finding in inspect(root, now=LATER)] == [step_name(2)]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("part", PARTS)
def test_diagnose_of_a_root_goes_on_and_says_so_of_a_newer_one(root: Path, trouble: Trouble, part: str, code: int) -> None:
    trouble.codes[step_name(2) + part] = code
    found = diagnose(root)
    assert found.healthy
    assert "unreadable: 2" in found.notes[-1].why
    trouble.codes[step_name(4) + part] = code
    found = diagnose(root)
    (problem,) = found.problems
    assert step_name(4) in problem.what
    assert os.strerror(code) in problem.why
    assert found.location == str(root / step_name(3))
    assert diagnose(root / step_name(4)).loads_instead == str(root / step_name(3))
    assert diagnose(root / step_name(2)).loads_instead == str(root / step_name(1))


def test_a_fallback_passes_older_ones_by_and_does_not_take_one_for_damaged(root: Path, trouble: Trouble) -> None:
    def load(group: ThreadGroup) -> Any:
        state = {"w": torch.zeros(4)}
        return gs.load(state, root / step_name(4), process_group=group, on_corrupt="fallback")["w"].tolist()

    (root / step_name(4) / RECORD_NAME).write_text("{}")
    trouble.codes[f"{step_name(2)}/{RECORD_NAME}"] = errno.EIO
    assert run_ranks(2, load) == [[3.0] * 4] * 2
    for step in (3, 4):
        trouble.codes[f"{step_name(step)}/{RECORD_NAME}"] = errno.EIO
        with pytest.raises(RanksFailedError) as caught:
            run_ranks(2, load)
        assert [type(error) for error in caught.value.errors] == [StoreError] * 2
        assert len({str(error) for error in caught.value.errors}) == 1
        assert step_name(step) in str(caught.value.errors[0])


@pytest.mark.parametrize("part", PARTS)
def test_a_manager_restores_past_older_ones_and_never_goes_back_for_one_that_may_be_good(
    root: Path, trouble: Trouble, part: str
) -> None:
    def restore(group: ThreadGroup) -> Any:
        with CheckpointManager(root, process_group=group) as manager:
            trouble.codes[step_name(2) + part] = errno.EACCES
            found = manager.restore({"w": torch.zeros(4)})
            assert found is not None
            first, latest = found.step, manager.latest()
            trouble.codes[step_name(4) + part] = errno.EACCES
            with pytest.raises(StoreError, match=r"step 4 may be the newest good one: .*Permission denied"):
                manager.restore({"w": torch.zeros(4)})
            found = manager.restore({"w": torch.zeros(4)}, 3)
            assert found is not None
            return first, latest, found.step, manager.latest()

    assert restore(ThreadGroups(1).rank(0)) == (4, 4, 3, 3)


def test_a_manager_does_not_begin_anew_where_all_it_finds_cannot_be_read(root: Path, trouble: Trouble) -> None:
    trouble.codes[RECORD_NAME] = errno.EACCES

    def restore(group: ThreadGroup) -> None:
        with CheckpointManager(root, process_group=group) as manager:
            with pytest.raises(StoreError, match=r"no step of .* is restored, .*step_00000004 cannot be read"):
                manager.restore({"w": torch.zeros(4)})
            with pytest.raises(StoreError, match="Permission denied"):
                manager.restore({"w": torch.zeros(4)}, 2)
            with pytest.raises(StoreError, match="Permission denied"):
                manager.pin(2)
            with pytest.raises(StoreError, match="step 2 is not overwritten"):
                manager.save(2, {"w": torch.zeros(4)}, overwrite=True)

    run_ranks(2, restore)
    trouble.codes.clear()
    assert states(root) == dict.fromkeys((1, 2, 3, 4), StepState.COMMITTED)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("part", PARTS)
def test_a_manager_removes_others_and_neither_it_nor_one_too_many(
    root: Path, trouble: Trouble, part: str, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    trouble.codes[step_name(2) + part] = code
    trouble.codes[step_name(4) + part] = code
    with caplog.at_level(logging.WARNING, "giantstep"), CheckpointManager(root, keep=Keep(last=2)) as manager:
        for step in (5, 6):
            manager.save(step, {"w": torch.full((4,), float(step))}, asynchronous=False)
        with pytest.raises(BadArgumentError):
            manager.save(5, {"w": torch.zeros(4)})
    trouble.codes.clear()
    assert states(root) == dict.fromkeys((2, 4, 5, 6), StepState.COMMITTED)
    assert caplog.text.count("step 2 stays, and is not counted") == 1


@pytest.mark.parametrize("name", ["data", "pinned"])
def test_a_newest_step_of_which_files_cannot_be_looked_at_is_not_the_good_one(root: Path, trouble: Trouble, name: str) -> None:
    (data,) = (root / step_name(4) / "data").iterdir()
    trouble.codes[f"{step_name(4)}/{'data/' + data.name if name == 'data' else name}"] = errno.EIO
    manager = CheckpointManager(root, keep=Keep(last=1))
    manager._job.retention.run_once()
    manager.close()
    trouble.codes.clear()
    # Step 3 is the newest that is known to be whole where step 4 is not; step 4 itself stays in any case.
    assert sorted(states(root)) == ([3, 4] if name == "data" else [4])


def test_the_commands_say_so(root: Path, trouble: Trouble) -> None:
    trouble.codes[f"{step_name(2)}/{RECORD_NAME}"] = errno.EACCES
    found = CliRunner().invoke(cli, ["recover", str(root), "--yes", "--json"])
    assert found.exit_code == 0
    (finding,) = json.loads(found.output)["findings"]
    assert (finding["kind"], finding["removable"]) == ("unreadable", False)
    assert "Permission denied" in finding["words"]
    assert CliRunner().invoke(cli, ["doctor", str(root)]).exit_code == 0
    trouble.codes[f"{step_name(4)}/{RECORD_NAME}"] = errno.EACCES
    bad = CliRunner().invoke(cli, ["doctor", str(root)])
    assert bad.exit_code == 1
    assert "permission to read all of" in bad.output
