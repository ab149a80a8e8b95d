"""Steps under a root are found by their commit records; removing one leaves it whole or gone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import giantstep as gs
from giantstep.commit.remove import remove_checkpoint
from giantstep.errors import BadArgumentError, NotACheckpointError
from giantstep.steps import StepState, scan_steps, step_name, step_of
from giantstep.storage.local import LocalStore
from giantstep.testing.faults import CrashError, CrashingStore, Loss


def test_names_sort_as_steps_do_and_only_their_own_spelling_is_a_step() -> None:
    steps = [0, 7, 99_999_999, 100_000_000, 10**17]
    assert [step_of(step_name(step)) for step in steps] == steps
    assert [step_of(name) for name in ("step_7", "step_000000007", "step_0000000x", "xstep_00000001", "latest")] == [None] * 5
    for bad in (-1, 10**18, True, 1.0):
        with pytest.raises(BadArgumentError, match="expected an int from 0"):
            step_name(bad)  # type: ignore[arg-type]


def test_a_scan_tells_committed_unfinished_damaged_newer_and_foreign_directories(tmp_path: Path) -> None:
    root = tmp_path / "run"
    assert scan_steps(LocalStore(root)) == []
    for step in (1, 2, 3, 4):
        gs.save({"w": torch.full((4,), float(step))}, root / step_name(step))
    (root / step_name(2) / "checkpoint.json").unlink()
    record = root / step_name(3) / "checkpoint.json"
    record.write_bytes(record.read_bytes().replace(b'"world_size": 1', b'"world_size": 2'))
    _make_newer(root / step_name(4) / "checkpoint.json")
    (root / step_name(5)).mkdir()
    (root / step_name(5) / "notes.txt").write_text("mine")
    (root / step_name(6) / "data").mkdir(parents=True)
    (root / "step_7").mkdir()
    found = scan_steps(LocalStore(root))
    assert [(entry.step, entry.state) for entry in found] == [
        (1, StepState.COMMITTED),
        (2, StepState.UNFINISHED),
        (3, StepState.DAMAGED),
        (4, StepState.NEWER),
        (5, StepState.FOREIGN),
        (6, StepState.UNFINISHED),
    ]
    assert [entry.record is not None for entry in found] == [True, False, False, False, False, False]
    assert all(entry.problem for entry in found[1:])


def _make_newer(path: Path) -> None:
    """Write the record as a later major version would: intact, with a digest that fits."""
    from giantstep.format.digests import anchor_digest

    data = path.read_bytes().replace(b'"format_version": "1.', b'"format_version": "9.')
    signed = data[: data.rindex(b'  "digest"')]
    path.write_bytes(signed + b'  "digest": "' + anchor_digest(signed).encode() + b'"\n}\n')


@pytest.mark.parametrize("loss", list(Loss))
@pytest.mark.parametrize("after", [False, True])
def test_crash_at_any_operation_of_a_removal_leaves_the_checkpoint_whole_or_gone(after: bool, loss: Loss) -> None:
    def saved() -> CrashingStore:
        store = CrashingStore()
        gs.save({"w": torch.arange(3000.0), "n": 1}, store)
        store.arm(None)
        return store

    whole = saved()
    remove_checkpoint(whole)
    assert not whole.exists()
    assert len(whole.operations) > 5
    outcomes = set()
    for position in range(len(whole.operations)):
        store = saved()
        store.arm(position, after=after)
        with pytest.raises(CrashError):
            remove_checkpoint(store)
        left = store.after_power_loss(loss)
        try:
            checkpoint = gs.open_checkpoint(left)
        except gs.errors.OpenError:
            outcomes.add("gone")
        else:
            assert checkpoint.verify().ok
            assert checkpoint["w"][...].tolist() == list(range(3000))
            outcomes.add("whole")
        remove_checkpoint(left)
        assert not left.exists()
    # The very first operation removes the record: only a loss of it can bring it back.
    assert outcomes == ({"gone"} if after and loss is not Loss.UNSYNCED else {"whole", "gone"})


def test_a_removal_leaves_foreign_files_and_refuses_a_record_that_is_not_ours(tmp_path: Path) -> None:
    gs.save({"w": torch.ones(2)}, tmp_path / "a")
    (tmp_path / "a" / "data" / "notes.txt").write_text("mine")
    removed = remove_checkpoint(LocalStore(tmp_path / "a"))
    assert len(removed) == 3
    assert [str(path.relative_to(tmp_path / "a")) for path in sorted((tmp_path / "a").rglob("*"))] == ["data", "data/notes.txt"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "checkpoint.json").write_text("{}")
    with pytest.raises(NotACheckpointError):
        remove_checkpoint(LocalStore(tmp_path / "b"))
    assert (tmp_path / "b" / "checkpoint.json").read_text() == "{}"
