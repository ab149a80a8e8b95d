"""`Tiers`: hosts' places often, the durable one now and then; what is restored from which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import giantstep as gs
from giantstep.errors import (
    BadArgumentError,
    CheckpointNotFoundError,
    IncompleteError,
)
from tiered.runs import LAYOUT, Job, checked, durable_steps, names_of
from tiers.clusters import flip, one_error, plain, state_of


def train(job: Job, steps: int, layout: Any = LAYOUT, **changes: Any) -> Any:
    """Restore, then so many steps; return what was restored, after a look at its bits."""

    def work(group: Any) -> Any:
        with job.tiers(group, **changes) as tiers:
            found = tiers.restore(state_of(group.rank, job.size, layout, None))
            begin = found.step + 1 if found else 1
            for step in range(begin, begin + steps):
                if tiers.should_save(step):
                    tiers.save(step, state_of(group.rank, job.size, layout, step))
            return found

    return checked(job.run(work), layout)


def wreck(job: Job, name: str, step: int) -> None:
    for path in (job.root / name / f"step_{step:08d}" / "data").iterdir():
        path.unlink()


# Which steps go where.


@pytest.mark.parametrize("settings", [{"replicas": 1}, {"parity": (2, 1)}, {"replicas": 0}], ids=["copies", "parity", "none"])
def test_drained_steps_are_ordinary_checkpoints_of_the_same_bits(tmp_path: Path, settings: dict[str, Any]) -> None:
    job = Job(tmp_path, settings={**settings, "asynchronous": False})
    assert train(job, 47) is None
    assert job.steps_of("a") == names_of(40, 45)
    assert durable_steps(job) == [20, 40]
    place = tmp_path / "durable" / "step_00000040"
    found = gs.open_checkpoint(place)
    assert found.verify().ok
    assert found.record.nodes is None
    # Each data file is there once, as it was written, and no parity.
    local = {path.name: path.read_bytes() for name in "abc" for path in (tmp_path / name / place.name / "data").iterdir()}
    drained = {path.name: path.read_bytes() for path in (place / "data").iterdir()}
    assert drained == {name: data for name, data in local.items() if "-9000" not in name}
    assert sorted(file.name for file in found.record.files) == sorted(f"data/{name}" for name in drained)
    # And any other job can load it, here one process.
    state = gs.load(state_of(0, 1, LAYOUT, None), place)
    assert plain(state_of(0, 1, LAYOUT, 40)).keys() == state.keys()


def test_asynchronous_saves_are_drained_too(tmp_path: Path) -> None:
    job = Job(tmp_path, settings={"keep": 2})
    train(job, 41)
    assert durable_steps(job) == [20, 40]
    job.lose("a", "b", "c")
    found = train(job, 0)
    assert (found.step, found.tier) == (40, "durable")


def test_a_step_for_the_durable_place_alone_is_saved_there(tmp_path: Path) -> None:
    job = Job(tmp_path, settings={"every": 7})
    train(job, 21)
    assert durable_steps(job) == [20]
    assert job.steps_of("b") == names_of(14, 21)


# What is restored.


def test_hosts_come_first_then_the_durable_place(tmp_path: Path) -> None:
    job = Job(tmp_path)
    train(job, 46)
    found = train(job, 0)
    assert (found.step, found.tier, found.skipped) == (45, "hosts", ())
    wreck(job, "a", 45)
    wreck(job, "b", 45)
    # Of two places that have a step, the hosts'.
    found = train(job, 0)
    assert (found.step, found.tier) == (40, "hosts")
    assert found.skipped[0].startswith("step 45 in the hosts' places")
    wreck(job, "a", 40)
    wreck(job, "b", 40)
    found = train(job, 0)
    assert (found.step, found.tier, len(found.skipped)) == (40, "durable", 2)


def test_a_given_step_is_restored_from_where_it_is(tmp_path: Path) -> None:
    job = Job(tmp_path)
    train(job, 46)

    def restore(step: int) -> Any:
        def work(group: Any) -> Any:
            with job.tiers(group) as tiers:
                return tiers.restore(state_of(group.rank, job.size, LAYOUT, None), step)

        return checked(job.run(work))

    assert [(restore(step).step, restore(step).tier) for step in (20, 40)] == [(20, "durable"), (40, "hosts")]
    errors = job.errors(lambda group: job.tiers(group).restore(state_of(group.rank, job.size, LAYOUT, None), 7))
    one_error(errors, CheckpointNotFoundError)


def test_an_older_step_of_the_hosts_is_restored_if_the_durable_one_is_damaged(tmp_path: Path) -> None:
    job = Job(tmp_path, settings={"keep": 3, "asynchronous": False})
    train(job, 20)
    wreck(job, "a", 20)
    wreck(job, "b", 20)
    for path in (tmp_path / "durable" / "step_00000020" / "data").iterdir():
        flip(path, 0.99)
    found = train(job, 0)
    assert (found.step, found.tier) == (15, "hosts")
    assert len(found.skipped) >= 2


def test_if_nothing_loads_all_ranks_are_told_of_every_step(tmp_path: Path) -> None:
    job = Job(tmp_path, settings={"asynchronous": False})
    train(job, 10)
    for step in (5, 10):
        wreck(job, "a", step)
        wreck(job, "b", step)
    errors = job.errors(lambda group: job.tiers(group).restore(state_of(group.rank, job.size, LAYOUT, None)))
    one_error(errors, IncompleteError, "step 10", "step 5", "host a")


def test_after_a_restore_from_the_durable_place_later_steps_of_hosts_are_of_an_older_course(tmp_path: Path) -> None:
    job = Job(tmp_path, settings={"asynchronous": False, "keep": 3})
    train(job, 31)
    # Hosts are away but for one, which has nothing whole of 25 and 30.
    for name in "ab":
        (tmp_path / name).rename(tmp_path / f"away {name}")
    (tmp_path / "c").rename(tmp_path / "away c")
    other = Job(tmp_path, ("x", "x", "y", "z"), job.settings)
    found = train(other, 5)
    assert (found.step, found.tier) == (20, "durable")
    assert other.steps_of("x") == names_of(25)
    for name in "abc":
        (tmp_path / f"away {name}").rename(tmp_path / name)
    both = Job(tmp_path, ("a", "b", "x", "y", "z", "c"), job.settings)
    found = train(both, 0)
    assert (found.step, found.tier) == (25, "hosts")


@pytest.mark.parametrize("count", [0, 1, 2])
def test_other_than_two_tiers_in_their_order_are_refused(tmp_path: Path, count: int) -> None:
    with gs.LocalTier(tmp_path / "a", replicas=0) as local, pytest.raises(BadArgumentError, match="in this order"):
        gs.Tiers([local] * count)
