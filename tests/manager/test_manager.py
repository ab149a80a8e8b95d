"""A manager saves when it is due, keeps what it must, and goes on with the newest step that loads; on all ranks alike."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import (
    BadArgumentError,
    CheckpointNotFoundError,
    CorruptionError,
    DisagreementError,
    NotACheckpointError,
    StoreError,
    VersionError,
)
from giantstep.group.threads import ThreadGroup
from giantstep.manager import (
    CheckpointManager,
    DeleteRecord,
    EverySecs,
    ForFailures,
    Keep,
    LoadRecord,
    ManagerCallback,
    SaveRecord,
    opentelemetry,
    tensorboard,
)
from giantstep.steps import StepState, step_name
from giantstep.storage.local import LocalStore
from giantstep.storage.memory import MemoryStore
from giantstep.testing.ranks import RanksFailedError, run_ranks

_NAMES = itertools.count()


class Clock:
    """Seconds that go by when a test says so."""

    def __init__(self, start: float = 0.0) -> None:
        self.now = start

    def __call__(self) -> float:
        return self.now


class Heard(ManagerCallback):
    def __init__(self) -> None:
        self.saves: list[SaveRecord] = []
        self.loads: list[LoadRecord] = []
        self.deletes: list[DeleteRecord] = []

    def on_save(self, record: SaveRecord) -> None:
        self.saves.append(record)

    def on_load(self, record: LoadRecord) -> None:
        self.loads.append(record)

    def on_delete(self, record: DeleteRecord) -> None:
        self.deletes.append(record)


def state_of(value: float, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    return {
        "w": gs.ShardedTensor.from_rank_offsets("w", torch.full((12 // ranks, 50), float(value)), (0, rank, ranks)),
        "value": value,
    }


def value_of(state: Any) -> float:
    """The one value that all of it has."""
    found = {*state["w"].flatten().tolist(), state["value"]}
    assert len(found) == 1, "a mix"
    (value,) = found
    return float(value)


def steps_in(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in root.iterdir() if (path / "checkpoint.json").exists())


# When.


def test_by_steps_no_rank_talks_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(tmp_path, save_when=5) as manager:
        monkeypatch.setattr(manager._job.group, "exchange", None)
        assert [step for step in range(1, 16) if manager.should_save(step)] == [5, 10, 15]


def test_by_time_all_ranks_save_at_the_same_steps_whatever_their_clocks_say(tmp_path: Path) -> None:
    def rank(group: ThreadGroup) -> list[int]:
        clock = Clock(1000.0 * group.rank)
        saved = []
        with CheckpointManager(tmp_path, save_when=EverySecs(10), process_group=group, clock=clock) as manager:
            for step in range(1, 60):
                # Other ranks' clocks run at other speeds: rank 0's counts.
                clock.now += 0.9 * (1 + 3 * group.rank)
                if manager.should_save(step):
                    manager.save(step, state_of(step, group.rank, group.size))
                    saved.append(step)
        return saved

    first, *others = run_ranks(3, rank)
    assert all(other == first for other in others)
    gaps = [b - a for a, b in itertools.pairwise([0, *first])]
    assert len(first) >= 4
    assert all(10 <= gap * 0.9 <= 13 for gap in gaps), gaps


def test_for_failures_the_interval_follows_from_what_saves_cost(tmp_path: Path) -> None:
    clock = Clock()
    policy = ForFailures(mtbf_secs=3600, first_secs=5, restart_secs=60)
    with CheckpointManager(tmp_path, save_when=policy, clock=clock) as manager:
        assert manager.expectation is None
        saved = []
        for step in range(1, 400):
            clock.now += 1.0
            if manager.should_save(step):
                manager.save(step, state_of(step))
                # As if it had taken 2 seconds.
                manager._timing._cost_secs = manager._timing._save_secs = 2.0
                saved.append(step)
        found = manager.expectation
    assert found is not None
    assert found.goodput is not None
    assert saved[0] == pytest.approx(5, abs=2)
    assert saved[2] - saved[1] == pytest.approx(found.interval_secs, rel=0.12)
    assert found.interval_secs == pytest.approx(math.sqrt(2 * 2 * 3600), rel=0.05)
    assert 0.95 < found.goodput < 1
    assert "expected goodput" in str(found)


def test_ranks_that_ask_about_different_steps_all_hear_of_it(tmp_path: Path) -> None:
    def ask(group: ThreadGroup) -> None:
        with CheckpointManager(tmp_path, save_when=EverySecs(1), process_group=group) as manager:
            manager.should_save(1 + group.rank)

    def save(group: ThreadGroup) -> None:
        with CheckpointManager(tmp_path, process_group=group) as manager:
            manager.save(1 + group.rank, state_of(1, group.rank, group.size))

    for call in (ask, save):
        with pytest.raises(RanksFailedError) as caught:
            run_ranks(2, call)
        assert all(isinstance(error, DisagreementError) for error in caught.value.errors)
    assert steps_in(tmp_path) == []


# Saving and going on.


def test_a_job_goes_on_from_the_newest_step_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    def train(group: ThreadGroup) -> None:
        with CheckpointManager(tmp_path, save_when=2, process_group=group) as manager:
            assert manager.restore(state_of(0, group.rank, group.size)) is None
            for step in range(1, 8):
                if manager.should_save(step):
                    manager.save(step, state_of(step, group.rank, group.size))
            assert manager.latest() == 6
            assert [(entry.step, entry.state) for entry in manager.steps()] == [(s, StepState.COMMITTED) for s in (2, 4, 6)]

    run_ranks(2, train)

    def resume(group: ThreadGroup, step: int | None) -> tuple[int, float]:
        with CheckpointManager(tmp_path, process_group=group) as manager:
            restored = manager.restore(state_of(0, group.rank, group.size), step)
            assert restored is not None
            assert restored.skipped == ()
            return restored.step, value_of(restored.state)

    for ranks in (1, 3):
        assert run_ranks(ranks, lambda group: resume(group, None)) == [(6, 6.0)] * ranks
        assert run_ranks(ranks, lambda group: resume(group, 2)) == [(2, 2.0)] * ranks
    with pytest.raises(CheckpointNotFoundError, match="Committed steps: 2, 4, 6"):
        CheckpointManager(tmp_path).restore(state_of(0), 5)


def test_a_step_that_is_there_is_not_overwritten_unless_one_says_so(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state_of(1))
        with pytest.raises(BadArgumentError, match="overwrite=True"):
            manager.save(1, state_of(2))
        manager.save(1, state_of(3), overwrite=True)
        restored = manager.restore(state_of(0))
    assert restored is not None
    assert value_of(restored.state) == 3


def test_metrics_are_stored_with_the_step_and_by_them_the_best_stay_also_in_a_later_job(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 1.0, 3: math.nan, 4: 2.0, 5: 9.0}
    with CheckpointManager(tmp_path) as manager:
        for step, loss in losses.items():
            manager.save(step, state_of(step), metrics={"loss": loss, "acc": 1}, content_metadata={"tokens": step})
    opened = gs.open_checkpoint(tmp_path / step_name(3))
    assert math.isnan(opened.metrics["loss"])
    assert (opened.metrics["acc"], opened.content_metadata) == (1.0, {"tokens": 3})
    with CheckpointManager(tmp_path, keep=Keep(best=2, metric="loss")) as manager:
        manager.save(6, state_of(6), metrics={"loss": 3.0})
    assert steps_in(tmp_path) == [2, 4, 6]
    with pytest.raises(BadArgumentError, match="names to numbers"), CheckpointManager(tmp_path) as manager:
        manager.save(7, state_of(7), metrics={"loss": "low"})  # type: ignore[dict-item]
    with pytest.raises(BadArgumentError, match="names to numbers"):
        gs.save({}, tmp_path / "x", metrics={"loss": torch.ones(1)})  # type: ignore[dict-item]


def damage_data(step: Path) -> None:
    (data,) = (step / "data").iterdir()
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(content)


def lose_data(step: Path) -> None:
    for path in (step / "data").iterdir():
        path.unlink()


def damage_record(step: Path) -> None:
    record = step / "checkpoint.json"
    record.write_bytes(record.read_bytes().replace(b'"world_size": 1', b'"world_size": 7'))


def lose_record(step: Path) -> None:
    (step / "checkpoint.json").unlink()


@pytest.mark.parametrize("strict", [gs.StrictHandling.RAISE_ALL, gs.StrictHandling.LOG_ALL])
@pytest.mark.parametrize("harm", [damage_data, lose_data, damage_record, lose_record])
def test_a_newest_step_that_does_not_load_is_passed_over_by_all_ranks(
    tmp_path: Path, harm: Callable[[Path], None], strict: gs.StrictHandling, caplog: pytest.LogCaptureFixture
) -> None:
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(step, state_of(step))
    harm(tmp_path / step_name(3))

    def resume(group: ThreadGroup) -> tuple[int, float, list[int]]:
        with CheckpointManager(tmp_path, process_group=group) as manager:
            restored = manager.restore(state_of(0, group.rank, group.size), strict=strict)
            assert restored is not None
            return restored.step, value_of(restored.state), [one.step for one in restored.skipped]

    with caplog.at_level(logging.WARNING, "giantstep"):
        found = run_ranks(3, resume)
    # Without a record it is no step at all.
    assert found == [(2, 2.0, [] if harm is lose_record else [3])] * 3
    assert caplog.text.count("step 2 is restored, since newer ones do not load") == (0 if harm is lose_record else 1)
    with pytest.raises((CorruptionError, gs.errors.OpenError)), CheckpointManager(tmp_path) as manager:
        manager.restore(state_of(0), 3)


def test_where_no_step_loads_all_ranks_raise_the_same(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, state_of(step))
    damage_data(tmp_path / step_name(2))
    damage_record(tmp_path / step_name(1))

    def resume(group: ThreadGroup) -> None:
        with CheckpointManager(tmp_path, process_group=group) as manager:
            manager.restore(state_of(0, group.rank, group.size))

    with pytest.raises(RanksFailedError) as caught:
        run_ranks(2, resume)
    assert all(isinstance(error, CorruptionError) and "00000002" in str(error) for error in caught.value.errors)


def test_a_newest_step_of_a_newer_version_is_an_error_and_not_passed_over(tmp_path: Path) -> None:
    from giantstep.format.digests import anchor_digest

    with CheckpointManager(tmp_path, keep=1) as manager:
        manager.save(1, state_of(1))
        manager.save(2, state_of(2))
        record = tmp_path / step_name(9) / "checkpoint.json"
        record.parent.mkdir()
        signed = (
            (tmp_path / step_name(2) / "checkpoint.json")
            .read_bytes()
            .replace(b'"format_version": "1.', b'"format_version": "9.')
        )
        signed = signed[: signed.rindex(b'  "digest"')]
        record.write_bytes(signed + b'  "digest": "' + anchor_digest(signed).encode() + b'"\n}\n')
        for step in (None, 9):
            with pytest.raises(VersionError):
                manager.restore(state_of(0), step)
        with pytest.raises(VersionError):
            manager.save(9, state_of(9), overwrite=True)
        assert manager.restore(state_of(0), 2) is not None
        manager.save(3, state_of(3))
    assert record.exists(), "removal leaves it alone"


# What stays.


def test_foreign_newer_damaged_and_running_directories_are_never_removed(tmp_path: Path) -> None:
    (tmp_path / step_name(1)).mkdir(parents=True)
    (tmp_path / step_name(1) / "notes.txt").write_text("mine")
    (tmp_path / "step_2").mkdir()
    (tmp_path / "other").mkdir()
    with CheckpointManager(tmp_path) as manager:
        manager.save(3, state_of(3))
        manager.save(4, state_of(4))
    damage_record(tmp_path / step_name(3))
    with CheckpointManager(tmp_path, keep=1) as manager:
        # Began after this manager: somebody else's save, which may be running.
        (tmp_path / step_name(2) / "data").mkdir(parents=True)
        (tmp_path / step_name(2) / "data" / "29990101T000000-00000000000aaaaa-r00000-0.safetensors").write_bytes(b"x")
        # Began long before: crashed.
        (tmp_path / step_name(0) / "data").mkdir(parents=True)
        (tmp_path / step_name(0) / "data" / "20200101T000000-00000000000aaaaa-r00000-0.safetensors").write_bytes(b"x")
        with pytest.raises(NotACheckpointError):
            manager.save(1, state_of(1), overwrite=True)
        manager.save(5, state_of(5))
        manager.save(6, state_of(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [step_name(1), "step_2", "other", step_name(3), step_name(2), step_name(6)]
    )
    assert (tmp_path / step_name(1) / "notes.txt").read_text() == "mine"


def test_pinned_steps_stay_also_under_other_managers_and_go_once_they_are_unpinned(tmp_path: Path) -> None:
    def train(group: ThreadGroup, first: int, act: Callable[[CheckpointManager], None]) -> None:
        with CheckpointManager(tmp_path, keep=1, process_group=group) as manager:
            act(manager)
            for step in (first, first + 1):
                manager.save(step, state_of(step, group.rank, group.size))

    run_ranks(2, lambda group: train(group, 1, lambda manager: None))
    run_ranks(2, lambda group: train(group, 3, lambda manager: manager.pin(2)))
    run_ranks(2, lambda group: train(group, 5, lambda manager: manager.pin(2)))
    assert steps_in(tmp_path) == [2, 6]
    run_ranks(2, lambda group: train(group, 7, lambda manager: manager.unpin(2)))
    assert steps_in(tmp_path) == [8]
    assert sorted(path.name for path in tmp_path.iterdir()) == [step_name(8)]
    with pytest.raises(CheckpointNotFoundError, match="nothing to pin"), CheckpointManager(tmp_path) as manager:
        manager.pin(2)


def test_the_newest_step_that_loads_is_kept_where_the_newest_does_not(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(step, state_of(step))
    damage_data(tmp_path / step_name(3))
    with CheckpointManager(tmp_path, keep=1) as manager:
        restored = manager.restore(state_of(0))
        assert restored is not None
        assert restored.step == 2
        manager._job.retention.run_once()
        assert steps_in(tmp_path) == [2, 3]
        manager.save(4, state_of(4))
    assert steps_in(tmp_path) == [4]


class Slow(MemoryStore):
    """Commits only when it is allowed to."""

    gate = threading.Event()

    def folder(self, name: str) -> Slow:
        return Slow(f"{self._name}/{name}")

    def publish(self, name: str, data: bytes, temporary: str) -> None:
        self.gate.wait(20)
        super().publish(name, data, temporary)


def test_with_overlapping_saves_there_is_always_a_step_to_load(tmp_path: Path) -> None:
    root = Slow(f"manager-{next(_NAMES)}")
    Slow.gate.set()
    options = gs.SaveOptions(max_pending=3)
    heard = Heard()
    with CheckpointManager(root, keep=1, asynchronous=True, save_options=options, callbacks=[heard]) as manager:
        manager.save(1, state_of(1))
        manager.wait()
        Slow.gate.clear()
        for step in (2, 3, 4):
            manager.save(step, state_of(step))
            manager._job.retention.run_once()
            assert manager.latest() == 1
            with pytest.raises(BadArgumentError, match="being saved already"):
                manager._saves._prepare(step, False, False, leave=3, left_secs=None)
        Slow.gate.set()
        deadline = time.monotonic() + 20
        while manager.latest() != 4 and time.monotonic() < deadline:
            newest = manager.latest()
            assert newest is not None
            time.sleep(0.001)
        for step in (5, 6):
            manager.save(step, state_of(step))
    assert [entry.step for entry in manager.steps()] == [6]
    assert [record.step for record in heard.saves] == [1, 2, 3, 4, 5, 6]
    assert all(record.committed and record.asynchronous for record in heard.saves)
    assert sorted(step for record in heard.deletes for step in record.steps) == [1, 2, 3, 4, 5]


def test_a_step_that_is_being_loaded_is_not_removed(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, keep=1) as manager:
        manager.save(1, state_of(1))
        with manager._job.retention.using(1):
            manager.save(2, state_of(2))
            manager._job.retention.run_once()
            assert steps_in(tmp_path) == [1, 2]
        manager._job.retention.run_once()
        assert steps_in(tmp_path) == [2]


class Sticky(LocalStore):
    """Deletes nothing for a while."""

    stuck = True

    def folder(self, name: str) -> Sticky:
        return Sticky(Path(self.location) / name)

    def delete(self, name: str) -> None:
        if self.stuck and name == "checkpoint.json":
            raise PermissionError(1, "not now")
        super().delete(name)


def test_a_removal_that_fails_is_logged_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING, "giantstep"), CheckpointManager(Sticky(tmp_path), keep=1) as manager:
        manager.save(1, state_of(1))
        manager.save(2, state_of(2))
        manager._job.retention.run_once()
        assert steps_in(tmp_path) == [1, 2]
        assert "could not be removed" in caplog.text
        monkeypatch.setattr(Sticky, "stuck", False)
        manager.save(3, state_of(3))
    assert steps_in(tmp_path) == [3]


# Incremental.


def test_incremental_saves_share_what_has_not_changed_and_every_so_many_share_nothing(tmp_path: Path) -> None:
    frozen = torch.arange(300_000.0)
    heard = Heard()
    with CheckpointManager(tmp_path, keep=2, incremental=True, full_every=3, callbacks=[heard]) as manager:
        for step in range(1, 7):
            manager.save(step, {"frozen": frozen, "w": torch.full((5000,), float(step))})
    reused = [record.bytes_reused for record in heard.saves]
    assert [count > frozen.nbytes - 1 for count in reused] == [False, True, True, False, True, True]
    assert steps_in(tmp_path) == [5, 6]
    for step in (5, 6):
        opened = gs.open_checkpoint(tmp_path / step_name(step))
        assert opened.verify().ok
        assert opened["frozen"][-1] == 299_999
        assert opened["w"][0] == step


# Ends.


def test_the_wish_to_stop_of_one_rank_is_agreed_upon_and_saved(tmp_path: Path) -> None:
    def rank(group: ThreadGroup) -> tuple[list[int], int]:
        clock, saved = Clock(), []
        with CheckpointManager(
            tmp_path, save_when=EverySecs(1e6), asynchronous=True, process_group=group, clock=clock
        ) as manager:
            for step in range(1, 100):
                clock.now += 0.5
                if group.rank == 2 and step == 17:
                    manager.stop()
                if manager.should_save(step):
                    assert manager.stopping
                    report = manager.save(step, state_of(step, group.rank, group.size))
                    assert isinstance(report, gs.SaveReport), "it blocks"
                    saved.append(step)
                if manager.stopping:
                    assert not manager.should_save(step)
                    break
        return saved, step

    found = run_ranks(3, rank)
    assert len({str(one) for one in found}) == 1
    (step,), last = found[0]
    assert 17 <= step <= 20
    assert last == step


def test_where_ranks_do_not_talk_the_wish_to_stop_is_heard_at_the_next_save(tmp_path: Path) -> None:
    def rank(group: ThreadGroup) -> int:
        with CheckpointManager(tmp_path, save_when=5, process_group=group) as manager:
            for step in range(1, 100):
                if group.rank == 1 and step == 7:
                    manager.stop()
                if manager.should_save(step):
                    manager.save(step, state_of(step, group.rank, group.size))
                if manager.stopping:
                    return step
        return 0

    assert run_ranks(2, rank) == [10, 10]


def test_errors_of_saves_in_the_background_are_told_by_the_next_call_and_the_job_goes_on(tmp_path: Path) -> None:
    class Full(LocalStore):
        full = False

        def folder(self, name: str) -> Full:
            return Full(Path(self.location) / name)

        def publish(self, name: str, data: bytes, temporary: str) -> None:
            if Full.full:
                raise OSError(28, "no space left")
            super().publish(name, data, temporary)

    heard = Heard()
    with CheckpointManager(Full(tmp_path), asynchronous=True, callbacks=[heard]) as manager:
        manager.save(1, state_of(1))
        manager.wait()
        Full.full = True
        manager.save(2, state_of(2))
        with pytest.raises(StoreError, match="no space left"):
            manager.save(3, state_of(3))
        Full.full = False
        manager.save(3, state_of(3))
        manager.wait()
        Full.full = True
        manager.save(4, state_of(4))
        with pytest.raises(StoreError, match="no space left"):
            manager.wait()
        Full.full = False
    assert steps_in(tmp_path) == [1, 3]
    told = [(record.step, record.committed) for record in heard.saves]
    assert told == [(1, True), (2, False), (3, False), (3, True), (4, False)]


def test_an_exception_in_the_block_ends_the_manager_without_other_ranks(tmp_path: Path) -> None:
    def rank(group: ThreadGroup) -> None:
        with CheckpointManager(tmp_path, process_group=group, asynchronous=True) as manager:
            manager.save(1, state_of(1, group.rank, group.size))
            if group.rank == 1:
                raise KeyError("mine")

    with pytest.raises(RanksFailedError):
        run_ranks(2, rank)
    assert steps_in(tmp_path) == [1]


def test_a_closed_manager_does_nothing_more(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, save_when=1)
    manager.close()
    manager.close()
    for call in (lambda: manager.should_save(1), lambda: manager.save(1, {}), lambda: manager.restore({}), manager.wait):
        with pytest.raises(BadArgumentError, match="is closed"):
            call()


# Measuring.


class Writer:
    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name, step] = value


class Meter:
    """As OpenTelemetry's."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[float, Any]]] = {}
        self.units: dict[str, str] = {}

    def create_histogram(self, name: str, unit: str = "") -> Any:
        assert name not in self.units, "made once"
        self.units[name] = unit
        values = self.found[name] = []

        class Histogram:
            def record(self, value: float, attributes: Any = None) -> None:
                values.append((value, attributes))

        return Histogram()


class Broken(ManagerCallback):
    def on_save(self, record: SaveRecord) -> None:
        raise RuntimeError("mine")


def test_saves_and_loads_are_told_with_seconds_of_all_ranks_to_the_log_and_to_exporters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer, meter = Writer(), Meter()

    def rank(group: ThreadGroup) -> Heard:
        heard = Heard()
        callbacks: list[ManagerCallback] = [Broken(), heard]
        if group.rank == 0:
            callbacks += [tensorboard(writer), opentelemetry(meter)]
        with CheckpointManager(tmp_path, process_group=group, callbacks=callbacks, measure_raw=True, keep=1) as manager:
            manager.save(1, state_of(1, group.rank, group.size))
            manager.save(2, state_of(2, group.rank, group.size), asynchronous=True)
            manager.wait()
            manager.restore(state_of(0, group.rank, group.size))
        return heard

    with caplog.at_level(logging.INFO, "giantstep"):
        both = run_ranks(2, rank)
    for heard in both:
        assert [record.step for record in heard.saves] == [1, 2]
        for save in heard.saves:
            assert save.committed
            assert len(save.seconds) == 2
            assert all("write" in own for own in save.seconds)
            assert save.bytes > 12 * 50 * 4
            assert save.bytes_per_sec > 0
            assert save.raw_fraction is not None
            assert save.raw_fraction > 0
            assert 0 < save.blocked_secs <= save.total_secs
        (load,) = heard.loads
        assert (load.step, load.bytes_filled, len(load.seconds)) == (2, 6 * 50 * 4, 2)
    assert sum(save.bytes_written for heard in both for save in heard.saves[:1]) == both[0].saves[0].bytes
    assert [record.steps for record in both[0].deletes] == [(1,)]
    assert both[1].deletes == []
    assert "step 1: saved" in caplog.text
    assert "of raw" in caplog.text
    assert "callback Broken failed; training goes on" in caplog.text
    assert "step 2: restored" in caplog.text
    assert "removed 1 steps" in caplog.text
    assert writer.scalars["checkpoint/save/bytes", 1] == both[0].saves[0].bytes
    assert ("checkpoint/load/secs/read", 2) in writer.scalars
    assert meter.units["giantstep.save.bytes_per_sec"] == "By/s"
    assert meter.units["giantstep.save.secs.write"] == "s"
    assert [attributes["asynchronous"] for _, attributes in meter.found["giantstep.save.total_secs"]] == [False, True]
    assert not list(tmp_path.glob("*speed*"))


@pytest.mark.parametrize(
    "arguments",
    [{"save_when": 0}, {"keep": -1}, {"full_every": 0}, {"save_when": "often"}, {"keep": "all"}, {"deadline_secs": -1}],
)
def test_settings_that_can_never_work_are_refused(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(BadArgumentError, match="cannot be: expected"):
        CheckpointManager(tmp_path, **arguments)


def test_removing_large_steps_does_not_keep_training_waiting(tmp_path: Path) -> None:
    """Removal is a thread's: the call that causes it returns before the store has done anything."""

    class Lazy(LocalStore):
        def folder(self, name: str) -> Lazy:
            return Lazy(Path(self.location) / name)

        def delete(self, name: str) -> None:
            time.sleep(0.3)
            super().delete(name)

    with CheckpointManager(Lazy(tmp_path), keep=1) as manager:
        manager.save(1, state_of(1))
        manager.save(2, state_of(2))
        begin = time.monotonic()
        manager.should_save(3)
        assert manager.latest() == 2
        assert steps_in(tmp_path)[-1] == 2
        assert time.monotonic() - begin < 0.3
    assert steps_in(tmp_path) == [2]
    assert [path.name for path in tmp_path.iterdir()] == [step_name(2)]
