"""What happens between a look and a removal, a step back, a failure and the next call: nothing that is needed goes."""

from __future__ import annotations

import itertools
import logging
import math
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import giantstep as gs
import giantstep.manager.restores
from giantstep.errors import BadArgumentError, DisagreementError, PhaseTimeoutError, StoreError
from giantstep.group.threads import ThreadGroup
from giantstep.manager import CheckpointManager, EverySecs, ForFailures, Keep, ManagerCallback, SaveRecord
from giantstep.manager.ledger import Known
from giantstep.manager.retention import Retention
from giantstep.manager.timing import Timing
from giantstep.steps import StepState, step_name
from giantstep.storage.local import LocalStore
from giantstep.storage.memory import MemoryStore
from giantstep.testing.ranks import RanksFailedError, run_ranks
from slow_store import GatedStore

_NAMES = itertools.count()


def state_of(value: float) -> dict[str, Any]:
    return {"w": torch.full((600,), float(value)), "value": value}


def steps_in(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in root.iterdir() if (path / "checkpoint.json").exists())


def saved(root: Path, *steps: int) -> None:
    with CheckpointManager(root) as manager:
        for step in steps:
            manager.save(step, state_of(step))


def damage(root: Path, step: int) -> None:
    (data,) = (root / step_name(step) / "data").iterdir()
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(content)


def run_elsewhere(function: Callable[[], Any]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


# Removal.


def test_nothing_is_removed_while_restore_looks_for_a_step_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest looks good until it has been read; the one before is what is left then."""
    saved(tmp_path, 1, 2)
    damage(tmp_path, 2)
    load = giantstep.manager.restores.load
    with CheckpointManager(tmp_path, keep=1) as manager:

        def load_slowly(*arguments: Any, **settings: Any) -> Any:
            run_elsewhere(manager._job.retention.run_once)
            return load(*arguments, **settings)

        monkeypatch.setattr(giantstep.manager.restores, "load", load_slowly)
        restored = manager.restore(state_of(0))
        assert restored is not None
        assert (restored.step, restored.state["value"]) == (1, 1)
        assert steps_in(tmp_path) == [1, 2]
        manager.save(3, state_of(3))
    assert steps_in(tmp_path) == [3]


def test_what_was_not_removed_meanwhile_is_removed_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1, 2)
    load = giantstep.manager.restores.load
    with CheckpointManager(tmp_path, keep=1) as manager:

        def load_slowly(*arguments: Any, **settings: Any) -> Any:
            run_elsewhere(manager._job.retention.run_once)
            return load(*arguments, **settings)

        monkeypatch.setattr(giantstep.manager.restores, "load", load_slowly)
        assert manager.restore(state_of(0)) is not None
    assert steps_in(tmp_path) == [2]


@pytest.mark.parametrize("act", ["save", "pin", "lose the newest"])
def test_a_step_that_something_has_happened_to_since_the_scan_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    saved(tmp_path, 1, 2)
    with CheckpointManager(tmp_path, keep=1) as manager:
        retention = manager._job.retention
        find = retention._removable

        def find_and_wait(entries: Any) -> Any:
            found = find(entries)
            monkeypatch.setattr(retention, "_removable", find)
            monkeypatch.setattr(retention, "ask", lambda *_: None)
            if act == "save":
                manager.save(1, state_of(7), overwrite=True)
            elif act == "pin":
                manager.pin(1)
            else:
                (tmp_path / step_name(2) / "checkpoint.json").unlink()
            return found

        monkeypatch.setattr(retention, "_removable", find_and_wait)
        assert retention.run_once() is None
        assert 1 in steps_in(tmp_path)
        assert gs.open_checkpoint(tmp_path / step_name(1)).common["value"] == (7 if act == "save" else 1)


def test_a_pinned_step_stays_also_if_it_was_found_not_to_load(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    damage(tmp_path, 3)
    with CheckpointManager(tmp_path, keep=1) as manager:
        manager.pin(3)
        restored = manager.restore(state_of(0))
        assert restored is not None
        assert restored.step == 2
        manager.save(4, state_of(4))
    assert steps_in(tmp_path) == [3, 4]


def test_a_newest_step_that_lost_its_files_is_not_the_one_for_whose_sake_others_go(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 1, 2, 3)
    for path in (tmp_path / step_name(3) / "data").iterdir():
        path.unlink()
    with CheckpointManager(tmp_path, keep=1) as manager:
        manager._job.retention.run_once()
    assert steps_in(tmp_path) == [2, 3]
    assert "step 3 is not taken for a good one" in caplog.text


def test_a_job_that_went_back_keeps_what_it_saved_last_and_is_told_of_newer_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 5, 9)
    with CheckpointManager(tmp_path, keep=1) as manager:
        restored = manager.restore(state_of(0), 5)
        assert restored is not None
        for step in (6, 7):
            manager.save(step, state_of(step))
            manager._job.retention.run_once()
            assert steps_in(tmp_path) == [step, 9]
        manager.save(8, state_of(8), asynchronous=True)
    assert steps_in(tmp_path) == [8, 9]
    assert caplog.text.count("goes on from there") == 1


def test_of_newer_steps_that_the_manager_itself_saves_there_is_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 2, 4)
    retention = Retention(LocalStore(tmp_path), None, "20990101T000000-0000000000000000", lambda _: None)
    retention.take(4)
    retention.saved(2)
    retention.run_once()
    retention.saved(4)
    retention.release(4)
    # A save that began earlier and was noted later.
    retention.saved(2)
    retention.run_once()
    assert caplog.text == ""
    saved(tmp_path, 9)
    retention.run_once()
    retention.run_once()
    assert caplog.text.count("step 2 was saved, but the newest step is 9") == 1


class Stubborn(LocalStore):
    """Deletes nothing of the first step; and gets into trouble when it is told to."""

    trouble = False

    def folder(self, name: str) -> Stubborn:
        return Stubborn(Path(self.location) / name)

    def folders(self) -> Any:
        if Stubborn.trouble:
            raise ValueError("a mistake of the store's")
        return super().folders()

    def delete(self, name: str) -> None:
        if self.location.endswith(step_name(1)):
            raise PermissionError(1, "not now")
        super().delete(name)


def test_a_step_that_cannot_be_removed_does_not_keep_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, 1, 2, 3, 4)
    with CheckpointManager(Stubborn(tmp_path), keep=1) as manager:
        manager._job.retention.run_once()
    assert steps_in(tmp_path) == [1, 4]
    assert "step 1: [Errno 1] not now" in caplog.text


def test_a_mistake_of_a_store_ends_neither_the_job_nor_later_removals(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 2)
    with CheckpointManager(Stubborn(tmp_path), keep=1) as manager:
        monkeypatch.setattr(Stubborn, "trouble", True)
        manager.save(3, state_of(3))
        while "a mistake of the store's" not in caplog.text:
            assert manager._job.retention._thread is not None
            manager._job.retention._thread.join(0.01)
        monkeypatch.setattr(Stubborn, "trouble", False)
        manager.save(4, state_of(4))
    assert steps_in(tmp_path) == [4]


def _known(step: int, state: StepState, old: bool) -> Known:
    return Known(step, state, b"", (f"{'2020' if old else '2999'}0101T000000-{step:016x}",))


STEPS = st.lists(
    st.builds(_known, st.integers(0, 30), st.sampled_from(StepState), st.booleans()), unique_by=lambda one: one.step
)


@given(
    steps=STEPS,
    keep=st.one_of(st.none(), st.builds(lambda last: Keep(last=last), st.integers(0, 4))),
    bad=st.sets(st.integers(0, 30)),
    lost=st.sets(st.integers(0, 30)),
    last=st.one_of(st.none(), st.integers(0, 30)),
)
def test_whatever_lies_under_a_root_only_superseded_steps_and_dead_leftovers_are_removed(
    steps: list[Known], keep: Keep | None, bad: set[int], lost: set[int], last: int | None
) -> None:
    retention = Retention(MemoryStore(f"nowhere-{next(_NAMES)}"), keep, "20250101T000000-0000000000000000", lambda _: None)
    retention._is_whole = lambda step: step not in lost  # type: ignore[method-assign]
    for step in bad:
        retention.found_bad(step)
    if last is not None:
        retention.saved(last)
    steps = sorted(steps, key=lambda one: one.step)
    known_good = [one.step for one in steps if one.state is StepState.COMMITTED and (one.step not in bad or one.step == last)]
    good = [step for step in known_good if step not in lost]
    newest, doomed = retention._removable(steps)
    assert (None if newest is None else newest.step) == max(good, default=None)
    if newest is None:
        assert doomed == []
        return
    assert last not in [one.step for one in doomed if one.state is StepState.COMMITTED]
    for one in doomed:
        assert one.step < newest.step
        assert one.state in (StepState.COMMITTED, StepState.UNFINISHED)
        if one.state is StepState.UNFINISHED:
            assert one.save_ids[0].startswith("2020")
        else:
            assert keep is not None


def test_a_removal_reads_whole_records_of_new_steps_alone(tmp_path: Path) -> None:
    """With thousands of ranks a record is large, and to take all of them apart keeps training waiting."""
    read: list[str] = []

    class Counting(LocalStore):
        def folder(self, name: str) -> Counting:
            return Counting(Path(self.location) / name)

        def open_read(self, name: str, *, direct: bool = False) -> Any:
            handle = super().open_read(name, direct=direct)
            read_into = handle.read_into

            def noted(offset: int, target: memoryview) -> None:
                if offset == 0 and name == "checkpoint.json":
                    read.append(Path(self.location).name)
                read_into(offset, target)

            handle.read_into = noted  # type: ignore[method-assign]
            return handle

    saved(tmp_path, *range(1, 7))
    retention = Retention(Counting(tmp_path), Keep(last=6), "20990101T000000-0000000000000000", lambda _: None)
    retention.run_once()
    assert set(read) == {step_name(step) for step in range(1, 7)}
    read.clear()
    retention.run_once()
    assert read == [step_name(6)], "whether it has all its files is looked at each time"
    read.clear()
    saved(tmp_path, 7, 8)
    with CheckpointManager(tmp_path) as manager:
        manager.save(3, state_of(33), overwrite=True)
    retention.run_once()
    assert steps_in(tmp_path) == [3, 4, 5, 6, 7, 8]
    assert {step_name(3), step_name(7), step_name(8)} <= set(read) <= {step_name(step) for step in (1, 2, 3, 7, 8)}


# Going back, and time.


def test_after_a_step_back_ranks_talk_again_and_steps_are_saved_again(tmp_path: Path) -> None:
    now = [0.0]

    def steps(manager: CheckpointManager, numbers: range) -> list[int]:
        found = []
        for step in numbers:
            now[0] += 0.02
            if manager.should_save(step):
                manager.save(step, state_of(step), overwrite=True)
                found.append(step)
        return found

    with CheckpointManager(tmp_path, save_when=EverySecs(2), clock=lambda: now[0]) as manager:
        first = steps(manager, range(1, 1000))
        assert len(first) >= 8
        assert manager.restore(state_of(0), first[0]) is not None
        assert steps(manager, range(first[0] + 1, 1000))[0] <= first[0] + 160
    with CheckpointManager(tmp_path, save_when=5, keep=1) as manager:
        assert steps(manager, range(1, 6)) == [5]
        assert not manager.should_save(5)
        assert manager.restore(state_of(0), 5) is not None
        assert steps(manager, range(1, 6)) == [5], "the job goes its way once more"


def test_the_time_that_restoring_takes_is_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)
    now = [0.0]
    load = giantstep.manager.restores.load

    def load_slowly(*arguments: Any, **settings: Any) -> Any:
        now[0] += 1000
        return load(*arguments, **settings)

    monkeypatch.setattr(giantstep.manager.restores, "load", load_slowly)
    with CheckpointManager(tmp_path, save_when=EverySecs(100), clock=lambda: now[0]) as manager:
        assert manager.restore(state_of(0)) is not None
        now[0] += 1
        assert not manager.should_save(2)
        now[0] += 100
        assert manager.should_save(3)


def test_steps_that_become_slow_are_noticed_within_a_hundred_of_them() -> None:
    now = [0.0]
    timing = Timing(EverySecs(1e6), notices=True, clock=lambda: now[0])
    for step in range(1000):
        now[0] += 1e-6
        timing.see(step)
    assert timing.talk_after() == 100


def test_what_a_save_in_the_background_has_not_committed_yet_counts_as_lost() -> None:
    def expected(total_secs: float) -> float:
        timing = Timing(ForFailures(mtbf_secs=3600, restart_secs=60), notices=False, clock=lambda: 0.0)
        timing.cost(1.0, total_secs)
        found = timing.expectation()
        assert found is not None
        assert found.goodput is not None
        return found.goodput

    # Intervals are the same, 84 s, since saves take less; 60 s more are lost per failure, of which there is one in 3600 s.
    assert expected(1.0) - expected(61.0) == pytest.approx(60 / 3600, rel=0.1)


def test_restoring_waits_for_saves_that_are_under_way() -> None:
    store = GatedStore()
    with CheckpointManager(_Root(store), asynchronous=True) as manager:
        manager.save(1, state_of(1))
        threading.Timer(0.2, store.gate.set).start()
        target = state_of(0)
        restored = manager.restore(target)
        assert restored is not None
        assert (restored.step, restored.state["value"], target["w"][0]) == (1, 1, 1)


class _Root(MemoryStore):
    """A root whose only step is in another store."""

    def __init__(self, step: MemoryStore) -> None:
        super().__init__(f"root-{next(_NAMES)}")
        self._step = step

    def folder(self, name: str) -> MemoryStore:
        return self._step

    def folders(self) -> Any:
        return iter([step_name(1)] if self._step.exists() else [])


def test_the_newest_step_is_found_without_reading_all_of_them(tmp_path: Path) -> None:
    opened: list[str] = []

    class Counting(LocalStore):
        def folder(self, name: str) -> Counting:
            return Counting(Path(self.location) / name)

        def open_read(self, name: str, *, direct: bool = False) -> Any:
            opened.append(f"{Path(self.location).name}/{name}")
            return super().open_read(name, direct=direct)

    saved(tmp_path, *range(1, 9))
    with CheckpointManager(Counting(tmp_path)) as manager:
        assert manager.latest() == 8
    assert opened == [f"{step_name(8)}/checkpoint.json"]


# Failures, and the next call.


class Full(LocalStore):
    """Commits nothing while it is full."""

    full = False

    def folder(self, name: str) -> Full:
        return Full(Path(self.location) / name)

    def publish(self, name: str, data: bytes, temporary: str) -> None:
        if Full.full:
            raise OSError(28, "no space left")
        super().publish(name, data, temporary)


def test_a_failure_in_the_background_is_raised_by_the_next_save_that_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rank(group: ThreadGroup) -> list[str]:
        told = []
        with CheckpointManager(Full(tmp_path), process_group=group) as manager:
            pending = manager.save(1, state_of(1), asynchronous=True)
            assert isinstance(pending, gs.PendingSave)
            pending.wait()
            run_ranks_barrier.wait()
            monkeypatch.setattr(Full, "full", False)
            try:
                manager.save(2, state_of(2))
            except StoreError as error:
                told += error.__notes__[-1:]
            manager.save(2, state_of(2))
        return told

    run_ranks_barrier = threading.Barrier(2)
    monkeypatch.setattr(Full, "full", True)
    for told in run_ranks(2, rank):
        assert re.search("Step 2 was not saved: call save again", told[0])
    assert steps_in(tmp_path) == [2]


def test_a_failure_of_which_the_handle_told_is_not_raised_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(Full(tmp_path)) as manager:
        monkeypatch.setattr(Full, "full", True)
        pending = manager.save(1, state_of(1), asynchronous=True)
        assert isinstance(pending, gs.PendingSave)
        with pytest.raises(StoreError):
            pending.result()
        monkeypatch.setattr(Full, "full", False)
        manager.save(2, state_of(2))
    assert steps_in(tmp_path) == [2]


def test_before_the_end_the_last_step_is_saved_and_the_failure_of_an_earlier_one_is_told_by_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(Full(tmp_path), save_when=EverySecs(1e6), asynchronous=True)
    monkeypatch.setattr(Full, "full", True)
    pending = manager.save(1, state_of(1))
    assert isinstance(pending, gs.PendingSave)
    pending.wait()
    monkeypatch.setattr(Full, "full", False)
    manager.stop()
    assert manager.should_save(2)
    assert isinstance(manager.save(2, state_of(2)), gs.SaveReport)
    with pytest.raises(StoreError, match="no space left"):
        manager.close()
    manager.close()
    assert steps_in(tmp_path) == [2]


# The beginning.


@pytest.mark.parametrize(
    ("name", "values", "error"),
    [
        ("save_when", (10, 20), DisagreementError),
        ("keep", (Keep(last=1), Keep(last=2)), DisagreementError),
        ("asynchronous", (False, True), DisagreementError),
        ("save_options", (None, gs.SaveOptions(max_pending=2)), DisagreementError),
        ("keep", (1, -1), BadArgumentError),
        ("signals", ((), (signal.SIGUSR2,)), BadArgumentError),
    ],
)
def test_ranks_that_make_it_with_other_arguments_all_hear_of_it(
    tmp_path: Path, name: str, values: tuple[Any, Any], error: type[Exception]
) -> None:
    def rank(group: ThreadGroup) -> None:
        settings: dict[str, Any] = {name: values[group.rank]}
        CheckpointManager(tmp_path, process_group=group, **settings)

    with pytest.raises(RanksFailedError) as caught:
        run_ranks(2, rank)
    assert all(isinstance(found, error) for found in caught.value.errors)
    assert len({str(found) for found in caught.value.errors}) == 1


def test_what_killed_jobs_left_of_measuring_is_removed_and_a_measurement_that_fails_puts_handlers_back(tmp_path: Path) -> None:
    (tmp_path / "giantstep-speed-0123456789abcdef.tmp").write_bytes(b"x")
    (tmp_path / "giantstep-speed-notes.tmp").write_bytes(b"mine")
    CheckpointManager(tmp_path, measure_raw=True).close()
    assert [path.name for path in tmp_path.iterdir()] == ["giantstep-speed-notes.tmp"]

    class Broken(LocalStore):
        def create(self, name: str, size: int, *, direct: bool) -> Any:
            raise OSError(28, "no space left")

    before = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(StoreError, match="no space left"):
        CheckpointManager(Broken(tmp_path), measure_raw=True, signals=[signal.SIGUSR2])
    assert signal.getsignal(signal.SIGUSR2) is before


def test_records_state_the_goodput_to_be_expected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found: list[SaveRecord] = []

    class Watch(ManagerCallback):
        def on_save(self, record: SaveRecord) -> None:
            found.append(record)

    caplog.set_level(logging.INFO, "giantstep")
    with CheckpointManager(tmp_path, save_when=ForFailures(mtbf_secs=1e5), callbacks=[Watch()]) as manager:
        manager.save(1, state_of(1))
        assert found[0].expected == manager.expectation
    assert found[0].expected is not None
    assert found[0].expected.goodput is not None
    assert not math.isnan(found[0].expected.goodput)
    assert re.search(r"step 1: saved .* expected goodput 9\d\.\d\d %", caplog.text)


# The end.


def test_a_signal_that_came_since_ranks_last_talked_makes_the_save_of_that_step_the_last_and_a_blocking_one(
    tmp_path: Path,
) -> None:
    def rank(group: ThreadGroup) -> tuple[str, bool]:
        options = gs.SaveOptions(max_pending=3)
        with CheckpointManager(
            tmp_path, save_when=1, asynchronous=True, incremental=True, save_options=options, process_group=group
        ) as manager:
            for step in (1, 2):
                assert isinstance(manager.save(step, state_of(step)), gs.PendingSave)
            if group.rank == 1:
                manager.stop()
            result = manager.save(3, state_of(3))
            assert steps_in(tmp_path) == [1, 2, 3], "in order, and all of them"
            return type(result).__name__, manager.stopping

    assert run_ranks(2, rank) == [("SaveReport", True)] * 2


def test_a_rank_that_does_not_come_is_not_waited_for_beyond_the_deadline(tmp_path: Path) -> None:
    absent = threading.Event()

    def rank(group: ThreadGroup) -> float:
        manager = CheckpointManager(tmp_path, save_when=EverySecs(1e6), process_group=group, deadline_secs=1.5)
        manager.stop()
        assert manager.should_save(1)
        if group.rank == 1:
            absent.wait(30)
            return 0.0
        begin = time.monotonic()
        try:
            with pytest.raises(PhaseTimeoutError, match="rank 1"):
                manager.save(1, state_of(1))
        finally:
            absent.set()
        return time.monotonic() - begin

    assert 0.5 < run_ranks(2, rank)[0] < 10


def test_a_save_that_is_not_through_at_the_deadline_is_named_by_all_ranks() -> None:
    store = GatedStore()
    root = _Root(store)

    def rank(group: ThreadGroup) -> str:
        manager = CheckpointManager(root, save_when=EverySecs(1e6), process_group=group, deadline_secs=0.5, asynchronous=True)
        manager.save(1, state_of(1))
        manager.stop()
        assert manager.should_save(2)
        try:
            with pytest.raises(PhaseTimeoutError) as caught:
                manager.save(2, state_of(2))
            return str(caught.value)
        finally:
            both.wait()
            store.gate.set()
            manager.close()

    both = threading.Barrier(2)
    first, second = run_ranks(2, rank)
    assert first == second
    assert "the save of step 1 has not finished in the time that is left; step 2 is not saved" in first
