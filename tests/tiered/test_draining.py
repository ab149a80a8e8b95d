"""Steps on their way from the hosts to the durable place: what fails is told once, and nothing half is committed."""

from __future__ import annotations

import errno
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest

import giantstep as gs
import giantstep.tiered.tiers
from giantstep.errors import CorruptionError, GiantstepError, StoreError
from giantstep.tiered.draining import drain
from tiered.runs import LAYOUT, Job, durable_steps, names_of
from tiers.clusters import flip, one_error, state_of
from tiers.hooked import HookedStore


def drain_with(job: Job, hook: Any, *steps: int) -> list[Any]:
    """Save steps, of which all are drained into a durable place with a hook; return by rank what `wait` raised, and then."""

    def work(group: Any) -> list[BaseException | None]:
        place = HookedStore(job.root / "durable", hook)
        durable = gs.CheckpointManager(place, save_when=5, process_group=group, save_options=gs.SaveOptions(timeout_secs=20))
        tiers = gs.Tiers([job.tier(group, asynchronous=False), durable])
        found: list[BaseException | None] = []
        for step in steps:
            try:
                tiers.save(step, state_of(group.rank, job.size, LAYOUT, step))
            except GiantstepError as error:
                found.append(error)
        for wait in (tiers.wait, tiers.wait, tiers.close):
            try:
                wait()
                found.append(None)
            except GiantstepError as error:
                found.append(error)
        return found

    return job.run(work)


@pytest.mark.parametrize("what", ["create", "publish", "prepare"])
def test_a_failed_drain_is_told_once_and_commits_nothing(tmp_path: Path, what: str) -> None:
    job = Job(tmp_path)

    def hook(operation: str, name: str) -> None:
        if operation == what and "step_00000005" in name:
            raise OSError(errno.ENOSPC, "injected")

    found = drain_with(job, hook, 5)
    one_error([told[0] for told in found], StoreError, "injected")
    assert [told[1:] for told in found] == [[None, None]] * job.size
    assert durable_steps(job) in ([], [5])
    assert not list(tmp_path.glob("durable/*/checkpoint.json"))
    if what != "publish":
        assert not list(tmp_path.glob("durable/*/data/*"))
    # It stays in the hosts' places, and the next one can be drained.
    assert job.restore().step == 5
    assert [told[-3:] for told in drain_with(job, lambda *_: None, 10)] == [[None] * 3] * job.size
    assert gs.open_checkpoint(tmp_path / "durable" / "step_00000010").verify().ok


def test_the_next_save_tells_of_a_failed_drain(tmp_path: Path) -> None:
    job = Job(tmp_path)

    def hook(operation: str, name: str) -> None:
        if operation == "create" and "step_00000005/data" in name:
            raise OSError(errno.EIO, "injected")

    found = drain_with(job, hook, 5, 10, 15)
    # Whichever call comes first after it.
    assert all(sum(error is not None for error in told) == 1 for told in found)
    one_error([next(error for error in told if error) for told in found], StoreError, "injected")


def test_an_error_that_is_none_of_ours_ends_no_draining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path)

    def failing(group: Any, source: Any, *arguments: Any) -> Any:
        if "step_00000005" in source.location:
            raise KeyError("mistake")
        return drain(group, source, *arguments)

    monkeypatch.setattr(giantstep.tiered.tiers, "drain", failing)
    # The save that tells of it is not made; which one that is, is a matter of time.
    found = drain_with(job, lambda *_: None, 5, 10, 15)
    assert all(sum(error is not None for error in told) == 1 for told in found)
    assert durable_steps(job)[-1] in (10, 15)


def test_a_damaged_file_is_not_drained(tmp_path: Path) -> None:
    job = Job(tmp_path)
    first = itertools.count()

    def hook(operation: str, name: str) -> None:
        # Rank 0 prepares the place before others come to it.
        if operation == "prepare" and "durable/step_00000005" in name and next(first) == 0:
            for path in (tmp_path / "b" / "step_00000005" / "data").iterdir():
                flip(path, 0.99)

    found = drain_with(job, hook, 5)
    error = one_error([told[0] for told in found], CorruptionError, "host b", "not copied")
    assert error.phase == "drain"
    assert not list(tmp_path.glob("durable/*/checkpoint.json"))


def test_a_step_is_not_removed_from_hosts_before_it_is_drained(tmp_path: Path) -> None:
    job = Job(tmp_path, settings={"keep": 1})
    gate, seen = threading.Event(), []

    def hook(operation: str, name: str) -> None:
        if operation == "create" and "step_00000005/data" in name:
            assert gate.wait(20)

    def work(group: Any) -> None:
        place = HookedStore(tmp_path / "durable", hook)
        durable = gs.CheckpointManager(place, save_when=5, process_group=group)
        with gs.Tiers([job.tier(group, asynchronous=False), durable]) as tiers:
            for step in (5, 6, 7, 8):
                due = tiers.should_save(step)
                if due:
                    tiers.save(step, state_of(group.rank, job.size, LAYOUT, step))
                else:
                    tiers.local.save(step, state_of(group.rank, job.size, LAYOUT, step))
            tiers.local.settle()
            if group.rank == 0:
                seen.append(job.steps_of("a"))
                gate.set()

    job.run(work)
    assert seen == [names_of(5, 8)]
    assert job.steps_of("a") == names_of(8)
    assert durable_steps(job) == [5]


def test_a_crash_in_the_middle_of_a_drain_leaves_nothing_committed_and_the_step_on_the_hosts(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(5)
    crashes = [MemoryError()]

    def hook(operation: str, name: str) -> None:
        if operation == "publish" and crashes:
            raise crashes.pop()

    def work(group: Any) -> None:
        with job.tier(group) as tier:
            place = HookedStore(tmp_path / "durable" / "step_00000005", hook)
            drain(group, tier.place_of(5), place, 20.0)

    errors = job.errors(work)
    assert all(isinstance(error, GiantstepError) for error in errors)
    assert not crashes
    assert not (tmp_path / "durable" / "step_00000005" / "checkpoint.json").exists()
    # Tried again, it works over what is left.
    assert job.errors(work) == [None] * job.size
    assert gs.open_checkpoint(tmp_path / "durable" / "step_00000005").verify().ok
