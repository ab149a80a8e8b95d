"""A crash at any system call leaves the old checkpoint or the new one, never neither and never a mix."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
import torch

import giantstep as gs
import giantstep.saving
from giantstep.commit.remove import remove_checkpoint
from giantstep.errors import NotACheckpointError
from giantstep.steps import scan_steps, step_name
from giantstep.storage.base import read_all
from giantstep.storage.record_file import files_of_ours
from giantstep.testing.crash_points import CrashReport, explore, unneeded_files
from giantstep.testing.faults import CrashingStore, Loss
from giantstep.testing.ranks import run_ranks, run_ranks_collecting
from independent_reader import read_checkpoint

OPTIONS = gs.SaveOptions(block_bytes=4096, buffer_bytes=4096, writer_threads=1, timeout_secs=20)
# How many states are looked at after each system call, where the default is too many or too few.
SOME, MANY = 4, 200


def state_of(value: float, rank: int, ranks: int) -> dict[str, Any]:
    """12 KiB of `value` per rank."""
    shard = gs.ShardedTensor.from_rank_offsets("w", torch.full((3, 1024), value), (0, rank, ranks))
    return {"w": shard, "value": value}


def save(store: Any, value: float, ranks: int = 2) -> list[BaseException | None]:
    """A save; what each rank raised."""

    def rank(group: Any) -> None:
        gs.save(state_of(value, group.rank, ranks), store, process_group=group, options=OPTIONS)

    return run_ranks_collecting(ranks, rank)[1]


def saving(value: float, ranks: int = 2) -> Callable[[Any], None]:
    """A save that succeeds."""

    def operation(store: Any) -> None:
        assert save(store, value, ranks) == [None] * ranks

    return operation


def found_in(store: Any) -> float | None:
    """The value of the checkpoint, every element and the common state checked; None if there is none."""
    try:
        checkpoint = gs.open_checkpoint(store)
    except (gs.errors.CheckpointNotFoundError, NotACheckpointError):
        return None
    except gs.errors.IncompleteError:
        assert "checkpoint.json" not in store.names("")
        return None
    assert checkpoint.verify().ok
    values = set(checkpoint["w"][...].reshape(-1).tolist()) | {checkpoint.common["value"]}
    assert len(values) == 1
    record = checkpoint.record
    names = ["checkpoint.json", record.index.name, *(file.name for file in record.files)]
    read_checkpoint({name: read_all(store, name, 1 << 30) for name in names})
    (value,) = values
    return float(value)


def check_next_save(store: Any) -> None:
    """The next save over whatever is left works and leaves nothing else behind."""
    saving(5.0, ranks=1)(store)
    assert found_in(store) == 5.0
    assert unneeded_files(store) == []


def explored(report: CrashReport, outcomes: set[Any]) -> None:
    assert report.points == len(report.operations) + 1 > 20
    assert report.distinct > report.points
    assert set(report.outcomes) == outcomes


def test_crash_before_or_after_any_operation_of_a_first_save_leaves_nothing_or_the_checkpoint() -> None:
    explored(explore(saving(1.0), check=found_in, again=check_next_save), {None, 1.0})


def test_crash_before_or_after_any_operation_of_an_overwrite_leaves_old_or_new() -> None:
    explored(explore(saving(2.0), before=saving(1.0), check=found_in, again=check_next_save), {1.0, 2.0})


def test_crash_in_two_saves_one_after_the_other_leaves_each_or_the_one_before() -> None:
    # Of the first only what it flushed itself is durable when the second begins.
    report = explore(saving(1.0, ranks=1), saving(2.0, ranks=1), check=found_in, again=check_next_save)
    explored(report, {None, 1.0, 2.0})


def saving_in_background(values: list[float], ranks: int, places: Callable[[Any, float], Any]) -> Callable[[Any], None]:
    """Several saves in flight at a time."""
    options = gs.SaveOptions(block_bytes=4096, buffer_bytes=4096, writer_threads=1, timeout_secs=20, max_pending=len(values))

    def operation(store: Any) -> None:
        def rank(group: Any) -> None:
            pending = [
                gs.async_save(state_of(value, group.rank, ranks), places(store, value), process_group=group, options=options)
                for value in values
            ]
            for handle in pending:
                handle.result(60)

        run_ranks(ranks, rank)

    return operation


def test_crash_in_saves_in_the_background_to_one_path_leaves_one_of_them_whole() -> None:
    operation = saving_in_background([2.0, 3.0], 1, lambda store, _: store)
    report = explore(operation, before=saving(1.0), check=found_in, again=check_next_save, also=[2.0], states_per_point=SOME)
    explored(report, {1.0, 2.0, 3.0})


def steps_found(root: Any) -> tuple[tuple[int, float], ...]:
    """Committed steps, each with the value in all its elements."""
    found = {entry.step: found_in(root.folder(entry.name)) for entry in scan_steps(root)}
    return tuple((step, value) for step, value in found.items() if value is not None)


def place_of_step(root: Any, value: float) -> Any:
    return root.folder(step_name(int(value)))


def check_next_step(root: Any) -> None:
    """The last step can be saved again, committed or not."""
    step = place_of_step(root, 3.0)
    saving(3.0, ranks=1)(step)
    assert found_in(step) == 3.0
    assert unneeded_files(step) == []


def test_crash_in_saves_of_steps_in_flight_under_one_root_loses_no_step_before() -> None:
    operation = saving_in_background([2.0, 3.0], 1, place_of_step)
    report = explore(
        operation,
        before=lambda root: saving(1.0)(place_of_step(root, 1.0)),
        check=steps_found,
        again=check_next_step,
        also=[((1, 1.0), (2, 2.0))],
        states_per_point=SOME,
    )
    explored(report, {((1, 1.0),), ((1, 1.0), (2, 2.0)), ((1, 1.0), (2, 2.0), (3, 3.0))})


def removing_step(step: int) -> Callable[[Any], None]:
    return lambda root: remove_checkpoint(root.folder(step_name(step))) and None


def test_crash_while_the_oldest_step_is_removed_and_the_next_one_saved_loses_no_other() -> None:
    def before(root: Any) -> None:
        for value in (1.0, 2.0):
            saving(value, ranks=1)(place_of_step(root, value))

    report = explore(
        removing_step(1),
        lambda root: saving(3.0, ranks=1)(place_of_step(root, 3.0)),
        before=before,
        check=steps_found,
        again=check_next_step,
        states_per_point=SOME,
    )
    explored(report, {((1, 1.0), (2, 2.0)), ((2, 2.0),), ((2, 2.0), (3, 3.0))})


def check_removed(store: Any) -> None:
    """The next removal finishes what was left, and a save makes it a checkpoint again."""
    remove_checkpoint(store)
    assert not store.exists()
    check_next_save(store)


def test_crash_at_any_operation_of_the_removal_of_a_checkpoint_leaves_it_whole_or_gone() -> None:
    report = explore(remove_checkpoint, before=saving(1.0), check=found_in, again=check_removed)
    assert set(report.outcomes) == {1.0, None}
    assert report.sampled_points == 0


def test_crash_at_any_operation_of_a_removal_of_tensors_leaves_all_or_the_others() -> None:
    def before(store: Any) -> None:
        state = {"kept": torch.arange(900.0), "gone": torch.arange(900.0), "value": 1}
        gs.save(state, store, options=OPTIONS)

    def keys_in(store: Any) -> tuple[str, ...]:
        checkpoint = gs.open_checkpoint(store)
        assert checkpoint.verify().ok
        for key in checkpoint:
            assert checkpoint[key][...].tolist() == list(range(900))
        return tuple(checkpoint.keys())

    report = explore(
        lambda store: gs.remove_sharded_tensors(store, "gone"), before=before, check=keys_in, again=check_next_save
    )
    explored(report, {("gone", "kept"), ("kept",)})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("ranks", [1, 3])
def test_crash_in_many_more_states_of_saves_leaves_old_or_new(ranks: int, seed: int) -> None:
    report = explore(
        saving(1.0, ranks),
        saving(2.0, ranks),
        check=found_in,
        again=check_next_save,
        states_per_point=MANY,
        seed=seed,
    )
    explored(report, {None, 1.0, 2.0})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(2))
def test_crash_in_many_more_states_of_steps_in_flight_loses_no_step(seed: int) -> None:
    operation = saving_in_background([2.0, 3.0, 4.0], 2, place_of_step)
    steps = [(step, float(step)) for step in (1, 2, 3, 4)]
    report = explore(
        operation,
        removing_step(1),
        before=lambda root: saving(1.0)(place_of_step(root, 1.0)),
        check=steps_found,
        also=[tuple(steps[:2]), tuple(steps[:3])],
        states_per_point=MANY // 4,
        seed=seed,
    )
    explored(report, {tuple(steps[:count]) for count in (1, 2, 3, 4)} | {tuple(steps[1:])})


# The order in which things become durable.


def operations_of(value: float, prepared: bool) -> list[str]:
    store = CrashingStore()
    if prepared:
        assert save(store, 1.0) == [None, None]
    store.arm(None)
    assert save(store, value) == [None, None]
    return store.operations


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
    for loss in Loss:
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
