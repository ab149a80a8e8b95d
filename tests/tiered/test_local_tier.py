"""`LocalTier`: what stays, what is restored, and what is refused."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest

import giantstep as gs
from giantstep.errors import BadArgumentError, IncompleteError
from giantstep.storage.memory import MemoryStore
from giantstep.testing.ranks import RanksFailedError
from giantstep.tiered.pruning import Pruning
from tiered.runs import LAYOUT, Job, names_of
from tiers.clusters import Layout, flip, one_error, state_of
from tiers.hooked import HookedStore

NUMBERS = itertools.count()


# What stays.


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_steps_stay_on_every_host(tmp_path: Path, keep: int) -> None:
    job = Job(tmp_path, settings={"keep": keep})
    job.save(5, 10, 15, 20)
    for name in "abc":
        assert job.steps_of(name) == names_of(5, 10, 15, 20)[-keep:]


def test_foreign_directories_and_steps_of_other_runs_stay(tmp_path: Path) -> None:
    job = Job(tmp_path, settings={"keep": 1})
    job.save(1, 2, run="other", keep=2)
    foreign = tmp_path / "a" / "step_00000003"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    (tmp_path / "a" / "notes").mkdir()
    job.save(5, 10, 15)
    assert job.steps_of("a") == ["notes", *names_of(1, 2, 3, 15)]
    assert (foreign / "mine.txt").read_text() == "mine"
    assert job.steps_of("b") == names_of(1, 2, 15)


def test_a_held_step_stays_until_it_is_released(tmp_path: Path) -> None:
    job = Job(tmp_path, settings={"keep": 1})

    def work(group: Any) -> tuple[list[str], list[str]]:
        name = job.names[group.rank]
        with job.tier(group) as tier:
            tier.hold(5)
            for step in (5, 10, 15):
                tier.save(step, state_of(group.rank, job.size, LAYOUT, step), asynchronous=False)
            tier.settle()
            # Other hosts go on meanwhile, but not this one.
            before = job.steps_of(name)
            tier.release(5)
            tier.settle()
            return before, job.steps_of(name)

    found = job.run(work)
    for before, after in (found[0], found[2], found[3]):
        assert before == names_of(5, 15)
        assert after == names_of(15)


def test_what_a_crashed_save_left_goes_when_a_later_step_is_there(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(5, 10)
    for name in "abc":
        (tmp_path / name / "step_00000010" / "checkpoint.json").unlink()
    job.save(15)
    assert job.steps_of("a") == names_of(5, 15)


def test_asynchronous_saves_overlap_and_each_is_committed(tmp_path: Path) -> None:
    job = Job(tmp_path, settings={"keep": 4})

    def work(group: Any) -> list[str]:
        with job.tier(group) as tier:
            pending = [tier.save(step, state_of(group.rank, job.size, LAYOUT, step)) for step in (5, 10, 15)]
            return [one.result().save_id for one in pending]  # type: ignore[union-attr]

    assert len({tuple(found) for found in job.run(work)}) == 1
    for step in (5, 10, 15):
        assert job.restore(step).step == step


def test_a_step_being_saved_is_not_removed_though_nothing_of_it_is_committed(tmp_path: Path) -> None:
    tiers: list[gs.LocalTier] = []

    def hook(operation: str, name: str) -> None:
        if operation == "create" and "step_00000015/data" in name:
            # A removal is asked for, and looks at a directory with nothing in it.
            tiers[0].hold(99)
            tiers[0].release(99)
            time.sleep(0.1)

    job = Job(tmp_path, ("a", "b"), {"keep": 1}, {"a": HookedStore(tmp_path / "a", hook)})

    def work(group: Any) -> None:
        with job.tier(group) as tier:
            if group.rank == 0:
                tiers.append(tier)
            for step in (5, 10, 15):
                tier.save(step, state_of(group.rank, 2, LAYOUT, step), asynchronous=False)

    job.run(work)
    assert job.steps_of("a") == job.steps_of("b") == names_of(15)


def test_a_step_that_is_saved_while_a_removal_looks_stays(tmp_path: Path) -> None:
    job = Job(tmp_path, ("a", "b"))
    job.save(5, 10, 15, keep=9)
    name = "step_00000015"
    (tmp_path / "a" / name).rename(tmp_path / name)
    looks = []

    class Late(Pruning):
        def _leftovers(self, newest: str) -> list[int]:
            looks.append(newest)
            if len(looks) > 1:
                return []
            # It was unfinished when it was looked at, and is committed when its turn comes.
            self.hold(15)
            (tmp_path / name).rename(tmp_path / "a" / name)
            self.release(15)
            return [15]

    def work(group: Any) -> None:
        with job.tier(group) as tier:
            if group.rank == 0:
                pruning = Late(tier.root, 2)
                pruning.hold(1)
                pruning.release(1)
                pruning.settle()
                pruning.close()

    job.run(work)
    assert len(looks) > 1
    assert job.steps_of("a") == names_of(10, 15)


# What is restored.


def test_nothing_is_restored_where_nothing_was_saved(tmp_path: Path) -> None:
    assert Job(tmp_path).restore() is None


def test_the_newest_step_is_restored_from_the_own_copies_without_fetching(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(5, 10)
    found = job.restore()
    assert (found.step, found.tier, found.skipped) == (10, "hosts", ())
    assert found.state.report.bytes_fetched == 0
    assert job.restore(5).step == 5


@pytest.mark.parametrize("settings", [{"replicas": 1}, {"parity": (2, 1)}], ids=["copies", "parity"])
@pytest.mark.parametrize("names", [("a", "a", "x", "c"), ("c", "x", "y", "a"), ("a", "c")], ids=["same", "moved", "fewer"])
def test_a_lost_host_s_files_come_from_others(tmp_path: Path, settings: dict[str, Any], names: tuple[str, ...]) -> None:
    Job(tmp_path, settings=settings).save(5, 10)
    job = Job(tmp_path, names, settings if len({*names}) > 2 else {"replicas": 1})
    job.lose("b")
    found = job.restore()
    assert found.step == 10
    if "parity" in settings:
        assert any("parity" in note for note in found.state.report.notes)
    # What was restored is on all hosts, and survives another loss.
    assert all(job.steps_of(name)[-1] == "step_00000010" for name in names)


def test_a_damaged_own_copy_is_passed_over(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(10)
    for path in (tmp_path / "a" / "step_00000010" / "data").iterdir():
        flip(path, 0.9)
    found = job.restore()
    assert found.step == 10
    assert any("damaged" in note for note in found.state.report.notes)


def test_an_older_step_is_restored_if_the_newest_is_not_all_there(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(5, 10)
    for name in "ab":
        for path in (tmp_path / name / "step_00000010" / "data").iterdir():
            path.unlink()
    found = job.restore()
    assert found.step == 5
    assert len(found.skipped) == 1
    assert found.skipped[0].startswith("step 10: ")
    assert "host a" in found.skipped[0]


def test_if_no_step_is_all_there_all_ranks_are_told_what_is_missing(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(5, 10)
    job.lose("a", "b")
    errors = job.errors(lambda group: job.tier(group).restore(state_of(group.rank, job.size, LAYOUT, None)))
    error = one_error(errors, IncompleteError, "is not all there", "host a", "host b")
    assert any("step 5" in note for note in error.__notes__)


def test_a_step_that_no_host_has_is_told_with_those_that_are_there(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(5, 10)
    errors = job.errors(lambda group: job.tier(group).restore(state_of(group.rank, job.size, LAYOUT, None), 7))
    one_error(errors, IncompleteError, "no host has step 7", "10, 5")


def test_hosts_with_different_steps_settle_on_the_newest_complete_one(tmp_path: Path) -> None:
    job = Job(tmp_path, settings={"keep": 3})
    job.save(5, 10, 15)
    # The crash came while step 15 was being committed: host a alone had; 10 is gone from host c.
    for name in "bc":
        (tmp_path / name / "step_00000015" / "checkpoint.json").unlink()
    assert job.restore().step == 15
    for name in "abc":
        for path in (tmp_path / name / "step_00000015" / "data").iterdir():
            path.unlink()
    found = job.restore()
    assert (found.step, len(found.skipped)) == (10, 1)


def test_later_steps_of_an_older_course_are_not_used(tmp_path: Path) -> None:
    job = Job(tmp_path, settings={"keep": 3})
    job.save(5, 10, 15)
    # Host c is away with all of step 15 in it; the others go on from 10.
    away = tmp_path / "away"
    (tmp_path / "c").rename(away)
    for name in "ab":
        (tmp_path / name / "step_00000015" / "checkpoint.json").unlink()
    others = Job(tmp_path, ("a", "a", "b", "d"), settings={"keep": 3})
    assert others.go_on(12) == 10
    away.rename(tmp_path / "c")
    assert job.restore().step == 12
    # And the step of the old course is replaced by the same step of the new one.
    assert job.go_on(15) == 12
    found = job.restore()
    assert (found.step, found.skipped) == (15, ())


def test_steps_of_another_run_are_not_restored(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(5, run="other")
    assert job.restore() is None
    job.save(3)
    assert job.restore().step == 3


def test_a_step_of_another_run_is_not_replaced(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(5, run="other")
    with pytest.raises(RanksFailedError) as failed:
        job.save(5)
    one_error(failed.value.errors, BadArgumentError, "run 'other'", "host a")
    other = Job(tmp_path, settings={"run": "other"})
    assert other.restore().step == 5


@pytest.mark.parametrize("layout", [Layout(), Layout(3, (1, 0, 2))], ids=["plain", "thirds"])
def test_another_layout_on_more_ranks_restores_too(tmp_path: Path, layout: Layout) -> None:
    Job(tmp_path).save(10)
    assert Job(tmp_path, ("c", "x", "b", "y", "x", "b")).restore(layout=layout).step == 10


def test_hosts_may_keep_their_steps_in_memory(tmp_path: Path) -> None:
    stores = {name: MemoryStore(f"tier-{next(NUMBERS)}-{name}") for name in "abc"}
    job = Job(tmp_path, stores=dict(stores))
    job.save(5, 10, 15)
    assert sorted(stores["b"].folders()) == names_of(10, 15)
    job.stores["b"] = MemoryStore(f"tier-{next(NUMBERS)}-new")
    found = job.restore()
    assert found.step == 15
    assert any("b" in note for note in found.state.report.notes)
