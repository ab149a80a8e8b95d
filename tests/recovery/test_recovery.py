"""What `inspect` finds, what `clean` removes, and that no good checkpoint is touched, whatever happens in between."""

from __future__ import annotations

import datetime as dt
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.commit.remove import remove_leftovers
from giantstep.errors import BadArgumentError, CheckpointNotFoundError, CorruptionError, NotACheckpointError, StoreError
from giantstep.format.digests import anchor_digest
from giantstep.format.names import data_file_name, index_file_name, new_save_id
from giantstep.materializing import materialize
from giantstep.recovery import Finding, FindingKind, begun_at, clean, inspect
from giantstep.steps import scan_steps, step_name
from giantstep.storage.base import Store
from giantstep.storage.local import LocalStore
from giantstep.testing.faults import CrashError, CrashingStore, Loss

NOW = dt.datetime.now(dt.UTC)
LATER = NOW + dt.timedelta(days=2)
YESTERDAY = new_save_id(NOW - dt.timedelta(days=1), "0" * 11)
TOMORROW = new_save_id(NOW + dt.timedelta(days=1), "0" * 11)


def save(root: Path, *steps: int, **options: Any) -> None:
    for step in steps:
        gs.save({"w": torch.full((4,), float(step)), "n": step}, root / step_name(step), **options)


def put(path: Path, *names: str) -> None:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"left")


def all_files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def kinds(findings: list[Finding]) -> list[tuple[FindingKind, bool]]:
    return [(finding.kind, finding.removable) for finding in findings]


def committed_values(root: Store) -> dict[int, list[float]]:
    """Values of each committed step, each checked to the last byte."""
    found = {}
    for entry in scan_steps(root):
        if entry.record is not None:
            checkpoint = gs.open_checkpoint(root.folder(entry.name))
            assert checkpoint.verify().ok
            found[entry.step] = checkpoint["w"][...].tolist()
    return found


def test_nothing_is_found_among_good_steps_of_which_some_are_incremental_or_pinned(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    save(tmp_path, 3, options=gs.SaveOptions(previous=tmp_path / step_name(2)))
    put(tmp_path / step_name(2), "pinned")
    put(tmp_path, "train.log")
    assert inspect(tmp_path, now=LATER) == []
    assert inspect(tmp_path / step_name(3), now=LATER) == []


def test_a_crashed_save_is_found_described_and_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    place = tmp_path / step_name(2)
    put(place, data_file_name(TOMORROW, 0, 0), data_file_name(TOMORROW, 1, 0))
    before = all_files(tmp_path)
    (finding,) = inspect(tmp_path, now=LATER)
    assert (finding.path, finding.kind, finding.save_id) == (str(place), FindingKind.LEFTOVER, TOMORROW)
    assert finding.begun == begun_at(TOMORROW)
    assert abs((finding.begun or NOW) - NOW - dt.timedelta(days=1)) < dt.timedelta(seconds=1)
    assert (finding.bytes, finding.removable, len(finding.files)) == (8, True, 2)
    assert "never committed" in finding.words
    assert "no commit record needs it" in finding.why
    assert inspect(place, now=LATER) == [finding]
    assert all_files(tmp_path) == before
    assert clean([finding]) == [f"{place}/{name}" for name in sorted(finding.files)] + [str(place)]
    assert not place.exists()
    assert inspect(tmp_path, now=LATER) == []
    assert clean([finding]) == []


def test_a_save_that_may_be_running_is_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    # A second later than all that was committed.
    begun = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=1)
    put(tmp_path / step_name(2), data_file_name(new_save_id(begun, "0" * 11), 0, 0))
    for secs, running in ((3600, True), (59 * 60, False)):
        (finding,) = inspect(tmp_path, older_than_secs=secs, now=begun + dt.timedelta(minutes=59, seconds=30))
        assert finding.removable is not running
    (finding,) = inspect(tmp_path)
    assert "it may be running" in finding.why
    assert clean([finding]) == []
    assert (tmp_path / step_name(2)).exists()


def test_a_save_of_no_known_time_is_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    put(tmp_path / step_name(2), data_file_name("20269999T999999-" + "0" * 16, 0, 0))
    (finding,) = inspect(tmp_path, now=LATER)
    assert (finding.begun, finding.removable) == (None, False)
    assert "cannot be told" in finding.why


def test_files_of_a_replaced_checkpoint_go_and_the_one_in_force_stays(tmp_path: Path) -> None:
    save(tmp_path, 1)
    place = tmp_path / step_name(1)
    first = gs.open_checkpoint(place).record
    old = all_files(place)
    save(tmp_path, 1)
    for name in (first.index.name, first.files[0].name):
        (place / name).write_bytes(old[name])
    put(place, data_file_name(YESTERDAY, 0, 0), f"checkpoint.json.{TOMORROW}.tmp")
    before = gs.open_checkpoint(place).verify()
    findings = inspect(place, now=LATER)
    assert [(finding.kind, finding.save_id) for finding in findings] == [
        (FindingKind.LEFTOVER, YESTERDAY),
        (FindingKind.SUPERSEDED, first.save_id),
        (FindingKind.LEFTOVER, TOMORROW),
    ]
    assert all(finding.removable for finding in findings)
    assert gs.open_checkpoint(place).verify() == before
    assert len(clean(findings)) == 4
    assert gs.open_checkpoint(place).verify() == before
    assert before.ok
    assert len(all_files(place)) == 3


def test_the_temporary_record_of_the_checkpoint_itself_is_told_from_a_save_that_never_committed(tmp_path: Path) -> None:
    """A loss of power may bring back the name that the record had before it was renamed."""
    save(tmp_path, 1)
    materialize(tmp_path / step_name(1), tmp_path / step_name(2))
    place = tmp_path / step_name(2)
    name = f"checkpoint.json.{gs.open_checkpoint(place).record.save_id}.tmp"
    (place / name).write_bytes((place / "checkpoint.json").read_bytes())
    (finding,) = inspect(tmp_path, now=LATER)
    assert (finding.kind, finding.removable, finding.files) == (FindingKind.LEFTOVER, True, (name,))
    assert "of the commit of this checkpoint" in finding.words
    assert clean([finding]) == [f"{place}/{name}"]
    assert committed_values(LocalStore(tmp_path)) == {1: [1.0] * 4, 2: [1.0] * 4}
    assert inspect(tmp_path, now=LATER) == []


def test_beside_a_checkpoint_nothing_goes_while_a_newer_save_may_run(tmp_path: Path) -> None:
    save(tmp_path, 1)
    place = tmp_path / step_name(1)
    put(place, data_file_name(YESTERDAY, 0, 0), data_file_name(new_save_id(NOW, "f" * 11), 0, 0))
    findings = inspect(place)
    assert kinds(findings) == [(FindingKind.LEFTOVER, False)] * 2
    assert clean(findings) == []


@pytest.mark.parametrize(("step", "removable"), [(1, True), (4, False)])
def test_links_of_earlier_saves_may_be_the_beginning_of_an_incremental_save(tmp_path: Path, step: int, removable: bool) -> None:
    save(tmp_path, 2, 3)
    name = gs.open_checkpoint(tmp_path / step_name(2)).record.files[0].name
    (tmp_path / step_name(step) / "data").mkdir(parents=True)
    os.link(tmp_path / step_name(2) / name, tmp_path / step_name(step) / name)
    findings = inspect(tmp_path, now=LATER)
    assert kinds(findings) == [(FindingKind.LEFTOVER, removable)]
    assert bool(clean(findings)) is removable
    assert committed_values(LocalStore(tmp_path)) == {2: [2.0] * 4, 3: [3.0] * 4}


def test_links_of_another_step_beside_a_checkpoint_stay(tmp_path: Path) -> None:
    save(tmp_path, 2, 3)
    name = gs.open_checkpoint(tmp_path / step_name(2)).record.files[0].name
    os.link(tmp_path / step_name(2) / name, tmp_path / step_name(3) / name)
    findings = inspect(tmp_path, now=LATER)
    assert kinds(findings) == [(FindingKind.LEFTOVER, False)]
    assert "an incremental save may have begun" in findings[0].why


@pytest.mark.parametrize(("step", "removable"), [(1, True), (5, False)])
def test_a_step_that_has_all_but_its_record_goes_only_where_a_newer_one_is_committed(
    tmp_path: Path, step: int, removable: bool
) -> None:
    save(tmp_path, step, 3)
    (tmp_path / step_name(step) / "checkpoint.json").unlink()
    findings = inspect(tmp_path, now=LATER)
    assert kinds(findings) == [(FindingKind.PARTLY_REMOVED, removable)]
    assert bool(clean(findings)) is removable
    assert (tmp_path / step_name(step)).exists() is not removable


def test_the_only_files_there_are_stay_where_no_root_is_known(tmp_path: Path) -> None:
    gs.save({"w": torch.ones(2)}, tmp_path / "model")
    (tmp_path / "model" / "checkpoint.json").unlink()
    assert kinds(inspect(tmp_path / "model", now=LATER)) == [(FindingKind.PARTLY_REMOVED, False)]
    (tmp_path / "empty").mkdir()
    assert kinds(inspect(tmp_path / "empty", now=LATER)) == [(FindingKind.EMPTY, False)]
    put(tmp_path / "crashed", data_file_name(YESTERDAY, 0, 0))
    assert kinds(inspect(tmp_path / "crashed", now=LATER)) == [(FindingKind.LEFTOVER, True)]


def test_damaged_newer_foreign_and_pinned_directories_are_named_and_stay(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 9)
    record = tmp_path / step_name(1) / "checkpoint.json"
    record.write_bytes(record.read_bytes()[:-9])
    record = tmp_path / step_name(2) / "checkpoint.json"
    signed = record.read_bytes().replace(b'"format_version": "1.', b'"format_version": "9.')
    signed = signed[: signed.rindex(b'  "digest"')]
    record.write_bytes(signed + b'  "digest": "' + anchor_digest(signed).encode() + b'"\n}\n')
    put(tmp_path / step_name(3), "checkpoint.json", "model.bin")
    put(tmp_path / step_name(4), "pinned", data_file_name(YESTERDAY, 0, 0))
    put(tmp_path / step_name(5), data_file_name(YESTERDAY, 0, 0), "notes.txt", "logs/run.txt")
    put(tmp_path / step_name(9), *(f"{number}.txt" for number in range(7)))
    (tmp_path / step_name(6) / "data").mkdir(parents=True)
    findings = inspect(tmp_path, now=LATER)
    assert kinds(findings) == [
        (FindingKind.DAMAGED, False),
        (FindingKind.NEWER, False),
        (FindingKind.FOREIGN, False),
        (FindingKind.LEFTOVER, False),
        (FindingKind.LEFTOVER, True),
        (FindingKind.FOREIGN, False),
        (FindingKind.EMPTY, True),
        (FindingKind.FOREIGN, False),
    ]
    assert findings[0].files[0] == "checkpoint.json"
    assert findings[0].bytes > 4000
    assert "pinned" in findings[3].why
    assert findings[5].words == "not written by giantstep: notes.txt, logs/"
    assert findings[7].words.endswith("4.txt and 2 more")
    before = all_files(tmp_path)
    removed = clean(findings)
    gone = f"{step_name(5)}/{data_file_name(YESTERDAY, 0, 0)}"
    assert removed == [f"{tmp_path}/{gone}", str(tmp_path / step_name(6))]
    assert all_files(tmp_path) == {name: data for name, data in before.items() if name != gone}


def test_a_root_that_holds_a_checkpoint_itself_is_looked_at_too(tmp_path: Path) -> None:
    gs.save({"w": torch.ones(2)}, tmp_path)
    save(tmp_path, 1)
    put(tmp_path, data_file_name(YESTERDAY, 0, 0))
    findings = inspect(tmp_path, now=LATER)
    assert [(finding.path, finding.kind) for finding in findings] == [(str(tmp_path), FindingKind.LEFTOVER)]
    assert len(clean(findings)) == 1
    assert gs.open_checkpoint(tmp_path).verify().ok


def test_a_place_that_changed_since_it_was_inspected_is_not_cleaned(tmp_path: Path) -> None:
    save(tmp_path, 1, 9)
    put(tmp_path / step_name(1), data_file_name(YESTERDAY, 0, 0))
    put(tmp_path / step_name(2), data_file_name(YESTERDAY, 0, 0))
    put(tmp_path / step_name(3), data_file_name(YESTERDAY, 0, 0))
    findings = inspect(tmp_path, now=LATER)
    assert kinds(findings) == [(FindingKind.LEFTOVER, True)] * 3
    save(tmp_path, 1, 2)
    put(tmp_path / step_name(3), data_file_name(new_save_id(NOW, "0" * 11), 0, 0))
    before = all_files(tmp_path)
    assert clean(findings) == []
    assert all_files(tmp_path) == before


def test_what_a_record_names_is_never_deleted_and_beside_a_damaged_one_nothing_is(tmp_path: Path) -> None:
    save(tmp_path, 1)
    place = tmp_path / step_name(1)
    store, names = LocalStore(place), [*all_files(place), "notes.txt", data_file_name(YESTERDAY, 0, 0)]
    put(place, *names[-2:])
    assert remove_leftovers(store, names) == names[-1:]
    assert gs.open_checkpoint(place).verify().ok
    (place / "checkpoint.json").write_bytes((place / "checkpoint.json").read_bytes()[:-9])
    before = all_files(place)
    with pytest.raises(CorruptionError):
        remove_leftovers(store, names)
    assert all_files(place) == before


def write(store: Store, *names: str) -> None:
    store.prepare("data")
    for name in names:
        handle = store.create(name, 4, direct=False)
        handle.write_at(0, b"left")
        handle.sync()
        handle.close()
    store.sync_names("")
    store.sync_names("data")


def littered() -> CrashingStore:
    """Two committed steps, and leftovers of all removable kinds."""
    root = CrashingStore()
    root.prepare("")
    for step in (2, 5):
        gs.save({"w": torch.full((4,), float(step))}, root.folder(step_name(step)))
    old = data_file_name(YESTERDAY, 0, 0), data_file_name(YESTERDAY, 0, 1)
    write(root.folder(step_name(1)), *old)
    write(root.folder(step_name(2)), *old, index_file_name(YESTERDAY), f"checkpoint.json.{YESTERDAY}.tmp")
    write(root.folder(step_name(3)), *old, index_file_name(YESTERDAY))
    root.folder(step_name(4)).prepare("data")
    write(root.folder(step_name(6)), data_file_name(TOMORROW, 0, 0))
    root.arm(None)
    return root


@pytest.mark.parametrize("loss", list(Loss))
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_operation_of_a_cleaning_leaves_every_committed_step_whole(after: bool, loss: Loss) -> None:
    values = {2: [2.0] * 4, 5: [5.0] * 4}
    root = littered()
    findings = inspect(root, now=LATER)
    assert [finding.kind for finding in findings] == [
        FindingKind.LEFTOVER,
        FindingKind.SUPERSEDED,
        FindingKind.PARTLY_REMOVED,
        FindingKind.EMPTY,
        FindingKind.LEFTOVER,
    ]
    assert clean(findings)
    assert committed_values(root) == values
    assert inspect(root, now=LATER) == []
    count = len(root.operations)
    assert count > 20
    for position in range(count):
        root = littered()
        findings = inspect(root, now=LATER)
        root.arm(position, after=after)
        with pytest.raises(CrashError):
            clean(findings)
        left = root.after_power_loss(loss)
        assert committed_values(left) == values
        clean(inspect(left, now=LATER))
        assert committed_values(left) == values
        assert not any(finding.removable for finding in inspect(left, now=LATER))


def test_a_save_that_crashed_anywhere_leaves_nothing_after_cleaning_or_is_committed() -> None:
    def rooted() -> CrashingStore:
        root = CrashingStore()
        root.prepare("")
        gs.save({"w": torch.full((4,), 1.0)}, root.folder(step_name(1)))
        root.arm(None)
        return root

    def save_second(root: CrashingStore) -> None:
        gs.save({"w": torch.full((4,), 2.0)}, root.folder(step_name(2)))

    whole = rooted()
    save_second(whole)
    for position in range(len(whole.operations)):
        root = rooted()
        root.arm(position)
        with pytest.raises(CrashError):
            save_second(root)
        left = root.after_power_loss(Loss.NOTHING)
        before = committed_values(left)
        assert clean(inspect(left)) == [], "it may still run"
        clean(inspect(left, now=LATER))
        assert committed_values(left) == before
        stays = {FindingKind.EMPTY, FindingKind.PARTLY_REMOVED}
        assert {finding.kind for finding in inspect(left, now=LATER)} <= stays
        save_second(left)
        assert committed_values(left) == {1: [1.0] * 4, 2: [2.0] * 4}
        assert inspect(left, now=LATER) == []


def test_failures_of_storage_and_wrong_arguments_are_errors_of_ours(tmp_path: Path) -> None:
    root = littered()
    findings = inspect(root, now=LATER)
    root.arm(0, fail_with=errno.EIO)
    with pytest.raises(StoreError, match="injected"):
        clean(findings)
    with pytest.raises(CheckpointNotFoundError):
        inspect(tmp_path / "no")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotACheckpointError, match="is a file"):
        inspect(tmp_path / "file")
    for bad in (-1, float("nan"), True, "1"):
        with pytest.raises(BadArgumentError, match="older_than_secs"):
            inspect(tmp_path, older_than_secs=bad)  # type: ignore[arg-type]
    for wrong in (NOW.replace(tzinfo=None), 3, "now"):
        with pytest.raises(BadArgumentError, match="now="):
            inspect(tmp_path, now=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("secs", [1e12, 1e300, float("inf")])
def test_of_saves_that_may_run_for_ever_nothing_goes(tmp_path: Path, secs: float) -> None:
    save(tmp_path, 9)
    for step, save_id in enumerate((YESTERDAY, "00010101T000000-" + "0" * 16, "99991231T235959-" + "f" * 16)):
        put(tmp_path / step_name(step), data_file_name(save_id, 0, 0))
    for now in (NOW, dt.datetime.min.replace(tzinfo=dt.UTC), dt.datetime.max.replace(tzinfo=dt.UTC)):
        assert kinds(inspect(tmp_path, older_than_secs=secs, now=now)) == [(FindingKind.LEFTOVER, False)] * 3
