"""What works on steps under a root leaves, whenever the power fails, each step whole or not there at all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.commit.remove import remove_checkpoint
from giantstep.manager import CheckpointManager
from giantstep.materializing import materialize
from giantstep.recovery import clean, inspect
from giantstep.steps import step_name
from giantstep.testing.crash_points import contents, explore, step_contents, unneeded_files

LATER = datetime.now(UTC) + timedelta(days=1)
FROZEN = torch.arange(1500.0)
BASE = {"block_bytes": 4096, "buffer_bytes": 4096, "writer_threads": 1}


def state_of(step: int) -> dict[str, Any]:
    return {"frozen": FROZEN, "w": torch.full((1000,), float(step)), "step": step}


def save_step(root: Any, step: int, previous: int | None = None) -> None:
    """A step; what is unchanged since the previous one is linked."""
    before = None if previous is None else root.folder(step_name(previous))
    options = gs.SaveOptions(**BASE, previous=before, digests=True)
    gs.save(state_of(step), root.folder(step_name(step)), options=options)


def steps(root: Any) -> tuple[int, ...]:
    """The steps under a root; each holds what was saved, to the bit."""
    found = [step for step, _ in step_contents(root)]
    for step in found:
        checkpoint = gs.open_checkpoint(root.folder(step_name(step)))
        assert checkpoint.common["step"] == step
        assert checkpoint["frozen"][...].tolist() == FROZEN.tolist()
        assert set(checkpoint["w"][...].tolist()) == {float(step)}
    return tuple(found)


def whole(report: Any, outcomes: set[Any]) -> None:
    assert report.points == len(report.operations) + 1 > 5
    assert set(report.outcomes) == outcomes


def after_the_first(root: Any) -> None:
    save_step(root, 1)


def test_crash_in_a_save_that_links_leaves_the_earlier_step_whole_and_the_new_one_whole_or_not_there() -> None:
    def next_save(root: Any) -> None:
        save_step(root, 2, previous=1)
        remove_checkpoint(root.folder(step_name(1)))
        assert unneeded_files(root.folder(step_name(2))) == []
        assert steps(root) == (2,)

    report = explore(
        lambda root: save_step(root, 2, previous=1),
        before=after_the_first,
        check=steps,
        again=next_save,
        states_per_point=8,
    )
    assert any(operation.startswith("link") for operation in report.operations)
    whole(report, {(1,), (1, 2)})


def test_crash_while_linked_steps_are_saved_and_the_first_is_removed_loses_no_other() -> None:
    report = explore(
        lambda root: save_step(root, 2, previous=1),
        lambda root: remove_checkpoint(root.folder(step_name(1))),
        lambda root: save_step(root, 3, previous=2),
        before=after_the_first,
        check=steps,
        states_per_point=8,
    )
    whole(report, {(1,), (1, 2), (2,), (2, 3)})


@pytest.mark.parametrize("elsewhere", [False, True])
def test_crash_while_a_step_is_materialised_leaves_it_whole(elsewhere: bool) -> None:
    def before(root: Any) -> None:
        save_step(root, 1)
        save_step(root, 2, previous=1)

    def operation(root: Any) -> None:
        materialize(root.folder(step_name(2)), root.folder("out") if elsewhere else None)

    def check(root: Any) -> tuple[Any, ...]:
        return (steps(root), contents(root.folder("out")))

    def once_more(root: Any) -> None:
        # A place that holds a checkpoint is refused.
        if not elsewhere or contents(root.folder("out")) is None:
            operation(root)
            assert unneeded_files(root.folder("out" if elsewhere else step_name(2))) == []

    report = explore(operation, before=before, check=check, again=once_more, states_per_point=8)
    assert {found[0] for found in report.outcomes} == {(1, 2)}
    assert len(report.outcomes) == 1 + elsewhere


def littered(root: Any) -> None:
    """Steps 1 and 3; what a save and a removal left of steps 2 and 4; what a save left beside step 3."""
    for step in (1, 2, 3, 4):
        save_step(root, step)
    root.folder(step_name(2)).delete("checkpoint.json")
    fourth = root.folder(step_name(4))
    for name in ["checkpoint.json", *fourth.names("data")]:
        fourth.delete(name)
    third = root.folder(step_name(3))
    handle = third.create("data/20200101T000000-0123456789abcdef-r00000-0.safetensors", 9, direct=False)
    handle.write_at(0, b"left over")


def test_crash_while_leftovers_are_cleaned_leaves_all_steps_whole_and_the_next_cleaning_ends_it() -> None:
    def clean_up(root: Any) -> None:
        clean(inspect(root, now=LATER))

    def clean_again(root: Any) -> None:
        clean_up(root)
        assert not any(finding.removable for finding in inspect(root, now=LATER))
        assert unneeded_files(root.folder(step_name(3))) == []

    report = explore(clean_up, before=littered, check=steps, again=clean_again, states_per_point=24)
    whole(report, {(1, 3)})


def managed(step: int, *, incremental: bool, keep: int = 1) -> Callable[[Any], None]:
    """A job that saves one step, and removes those that need not be kept."""

    def operation(root: Any) -> None:
        options = gs.SaveOptions(**BASE)
        with CheckpointManager(root, keep=keep, save_options=options, incremental=incremental) as manager:
            manager.save(step, state_of(step))

    return operation


# Whether saves are incremental, and how many states are looked at after each system call.
LINKING = pytest.param(True, 60, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
PLAIN = pytest.param(False, 60, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


@pytest.mark.parametrize(("incremental", "states"), [(True, 3), LINKING, PLAIN])
def test_crash_in_a_job_with_a_manager_always_leaves_the_newest_step_or_the_one_before(incremental: bool, states: int) -> None:
    def next_job(root: Any) -> None:
        managed(4, incremental=incremental)(root)
        assert steps(root) == (4,)
        assert list(root.folders()) == [step_name(4)]

    report = explore(
        managed(2, incremental=incremental),
        managed(3, incremental=incremental),
        before=managed(1, incremental=incremental),
        check=steps,
        again=next_job,
        also=[(1, 2), (2, 3)],
        states_per_point=states,
    )
    assert set(report.outcomes) == {(1,), (1, 2), (2,), (2, 3), (3,)}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_crash_while_a_managers_saves_are_in_flight_loses_no_step_that_was_to_stay() -> None:
    def operation(root: Any) -> None:
        options = gs.SaveOptions(**BASE, max_pending=3)
        with CheckpointManager(root, keep=2, save_options=options, asynchronous=True) as manager:
            for step in (2, 3, 4):
                manager.save(step, state_of(step))

    report = explore(
        operation,
        before=managed(1, incremental=False, keep=2),
        check=steps,
        again=managed(5, incremental=False, keep=2),
        also=[(1, 2), (1, 2, 3), (2, 3), (1, 2, 3, 4), (2, 3, 4)],
        states_per_point=24,
    )
    assert {(1,), (3, 4)} <= set(report.outcomes)
