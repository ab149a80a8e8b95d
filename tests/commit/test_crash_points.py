"""A crash at any storage operation leaves the old checkpoint or the new one, never neither and never a mix."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import torch

import giantstep as gs
import giantstep.saving
from giantstep.errors import NotACheckpointError
from giantstep.format.names import save_id_of
from giantstep.storage.base import read_all
from giantstep.storage.record_file import files_of_ours
from giantstep.testing.faults import CrashingStore, Loss
from giantstep.testing.ranks import run_ranks, run_ranks_collecting
from independent_reader import read_checkpoint

OPTIONS = gs.SaveOptions(block_bytes=4096, buffer_bytes=4096, writer_threads=1, timeout_secs=20)
LOSSES = list(Loss)


def save(store: CrashingStore, value: float, ranks: int = 2) -> list[BaseException | None]:
    """A save of 12 KiB of `value` per rank; what each rank raised."""

    def rank(group: Any) -> None:
        shard = gs.ShardedTensor.from_rank_offsets("w", torch.full((3, 1024), value), (0, group.rank, ranks))
        gs.save({"w": shard, "value": value}, store, process_group=group, options=OPTIONS)

    return run_ranks_collecting(ranks, rank)[1]


def found_in(store: CrashingStore) -> float | None:
    """The value of the checkpoint, every element and the common state checked; None if there is none."""
    try:
        checkpoint = gs.open_checkpoint(store)
    except (gs.errors.CheckpointNotFoundError, gs.errors.IncompleteError, NotACheckpointError):
        return None
    assert checkpoint.verify().ok
    values = set(checkpoint["w"][...].reshape(-1).tolist()) | {checkpoint.common["value"]}
    assert len(values) == 1
    record = checkpoint.record
    names = ["checkpoint.json", record.index.name, *(file.name for file in record.files)]
    read_checkpoint({name: read_all(store, name, 1 << 30) for name in names})
    (value,) = values
    return float(value)


def operations_of(value: float, prepared: bool) -> list[str]:
    store = CrashingStore()
    if prepared:
        assert save(store, 1.0) == [None, None]
    store.arm(None)
    assert save(store, value) == [None, None]
    return store.operations


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("after", [False, True])
def test_crash_before_or_after_any_operation_of_a_first_save_leaves_nothing_or_the_checkpoint(after: bool, loss: Loss) -> None:
    count = len(operations_of(1.0, prepared=False))
    assert count > 15
    outcomes = []
    for position in range(count):
        store = CrashingStore(position, after=after)
        save(store, 1.0)
        assert store.crashed
        left = store.after_power_loss(loss)
        outcomes.append(found_in(left))
        # The next save over whatever is left works and leaves nothing else behind.
        assert save(left, 5.0) == [None, None]
        assert found_in(left) == 5.0
        assert len({save_id_of(name) for name in files_of_ours(left)} - {None}) == 1
    assert set(outcomes) <= {None, 1.0}
    assert None in outcomes


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("after", [False, True])
def test_crash_before_or_after_any_operation_of_an_overwrite_leaves_old_or_new(after: bool, loss: Loss) -> None:
    count = len(operations_of(2.0, prepared=True))
    outcomes = []
    for position in range(count):
        store = CrashingStore()
        assert save(store, 1.0) == [None, None]
        store.arm(position, after=after)
        save(store, 2.0)
        assert store.crashed
        left = store.after_power_loss(loss)
        outcomes.append(found_in(left))
        assert save(left, 5.0) == [None, None]
        assert found_in(left) == 5.0
    assert None not in outcomes
    assert set(outcomes) == {1.0, 2.0}


def test_data_files_are_durable_before_the_index_and_the_index_before_the_record() -> None:
    operations = operations_of(1.0, prepared=False)

    def positions(kind: str, part: str) -> list[int]:
        return [n for n, operation in enumerate(operations) if operation.startswith(kind) and part in operation]

    assert len(positions("sync ", "data/")) == 2
    data_durable = max(positions("sync ", "data/") + positions("sync_names data", ""))
    index_created, index_durable = positions("create ", ".index.")[0], positions("sync ", ".index.")[0]
    record_durable, renamed = positions("sync ", "checkpoint.json")[0], positions("rename ", "")[0]
    names_after_index = [n for n in positions("sync_names ", "") if index_durable < n < renamed]
    assert max(positions("write_at ", "data/")) < data_durable < index_created < index_durable < names_after_index[0]
    assert names_after_index[0] < record_durable < renamed < positions("sync_names ", "")[-1]


def test_lost_and_torn_unsynced_bytes_leave_old_or_new() -> None:
    """Power fails right after the rename, before its directory is flushed: old if the name was lost, new if it was not."""
    operations = operations_of(2.0, prepared=True)
    rename = next(n for n, operation in enumerate(operations) if operation.startswith("rename"))
    outcomes = {}
    for loss in LOSSES:
        store = CrashingStore()
        save(store, 1.0)
        store.arm(rename, after=True)
        save(store, 2.0)
        outcomes[loss] = found_in(store.after_power_loss(loss))
    assert outcomes == {Loss.NOTHING: 2.0, Loss.UNSYNCED: 1.0, Loss.TORN: 2.0}


def test_next_save_over_leftovers_commits_and_removes_them() -> None:
    operations = operations_of(1.0, prepared=False)
    publish = next(n for n, operation in enumerate(operations) if operation.startswith("rename"))
    store = CrashingStore(publish)
    save(store, 1.0)
    left = store.after_power_loss(Loss.NOTHING)
    foreign = left.create("data/notes.safetensors", 3, direct=False)
    foreign.write_at(0, b"abc")
    assert found_in(left) is None
    with pytest.raises(gs.errors.IncompleteError, match="never committed"):
        gs.open_checkpoint(left)
    reports = []

    def rank(group: Any) -> None:
        reports.append(gs.save({"w": torch.ones(4)}, left, process_group=group, options=OPTIONS))

    run_ranks(2, rank)
    removed = next(report.removed for report in reports if report.removed)
    assert len(removed) == 4
    assert "data/notes.safetensors" in set(files_of_ours(left))
    assert read_all(left, "data/notes.safetensors", 10) == b"abc"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_operation_is_told_to_all_ranks_and_the_old_checkpoint_stays(code: int) -> None:
    operations = operations_of(2.0, prepared=True)
    for position, operation in enumerate(operations):
        store = CrashingStore()
        assert save(store, 1.0) == [None, None]
        names = set(files_of_ours(store))
        store.arm(position, fail_with=code)
        errors = save(store, 2.0)
        store.arm(None)
        if operation.startswith("delete") or position == len(operations) - 1:
            # After the commit point: the save succeeded, cleaning up is tried again by the next one.
            assert errors == [None, None]
            assert found_in(store) == 2.0
        elif errors == [None, None]:
            # Flushing deletions.
            assert operation.startswith("sync_names")
            assert found_in(store) == 2.0
        else:
            assert {type(error) for error in errors} == {gs.errors.StoreError}
            assert len({str(error) for error in errors}) == 1
            assert "injected at" in str(errors[0])
            assert found_in(store) in (1.0, 2.0)
            if "phase write" in str(errors[0]):
                # Given up by agreement: nothing is left of it.
                assert found_in(store) == 1.0
                assert set(files_of_ours(store)) == names
        assert save(store, 3.0) == [None, None]
        assert found_in(store) == 3.0


def test_a_save_that_was_overtaken_by_another_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    store = CrashingStore()
    assert save(store, 1.0) == [None, None]

    original = giantstep.saving.write
    others = [0.0]

    def write(*arguments: Any) -> Any:
        written = original(*arguments)
        if others:
            gs.save({"w": torch.full((1,), others.pop())}, store)
        return written

    monkeypatch.setattr(giantstep.saving, "write", write)
    with pytest.raises(gs.errors.StoreError, match="another save was committed"):
        gs.save({"w": torch.ones(1)}, store)
    assert gs.open_checkpoint(store)["w"][...].tolist() == [0.0]
