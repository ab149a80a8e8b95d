"""A crash at any storage operation of a manager's save and removal leaves a step to go on with, and nothing in the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.manager import CheckpointManager
from giantstep.testing.crash_points import explore

OPTIONS = gs.SaveOptions(block_bytes=4096, buffer_bytes=4096, writer_threads=1)
FROZEN = torch.arange(2000.0)


def state_of(value: float) -> dict[str, Any]:
    return {"frozen": FROZEN, "w": torch.full((1000,), value), "value": value}


def manager_of(store: Any, incremental: bool) -> CheckpointManager:
    return CheckpointManager(store, keep=1, save_options=OPTIONS, incremental=incremental)


def begin(store: Any, incremental: bool) -> None:
    with manager_of(store, incremental) as manager:
        manager.save(1, state_of(1.0))


def save_and_remove(store: Any, incremental: bool) -> None:
    """A further step, pinned, and the removal of the step before, in this thread: a crash ends it all."""
    manager = manager_of(store, incremental)
    # As if it had saved the step before.
    manager._saves._chain.previous(1, [])
    manager._saves._chain.saved(1)
    retention = manager._job.retention
    retention.ask = lambda *_: None  # type: ignore[method-assign]
    manager.save(2, state_of(2.0))
    retention.run_once()
    manager.pin(2)
    manager.unpin(2)
    manager.close()


def value_in(store: Any) -> str:
    with CheckpointManager(store) as manager:
        restored = manager.restore({"frozen": torch.zeros(2000), "w": torch.zeros(1000), "value": None})
        assert restored is not None, "neither the old step nor the new one"
        assert restored.skipped == ()
        (value,) = {float(restored.step), restored.state["value"], *restored.state["w"].tolist()}
        assert torch.equal(restored.state["frozen"], FROZEN)
        for entry in manager.steps():
            if entry.record is not None:
                assert gs.open_checkpoint(store.folder(entry.name)).verify().ok
    return f"{value:g}"


def go_on(store: Any, incremental: bool) -> None:
    pinned = ["step_00000002"] if "pinned" in store.folder("step_00000002").names("") else []
    with manager_of(store, incremental) as manager:
        manager.save(3, state_of(3.0))
    assert value_in(store) == "3"
    assert sorted(store.folders()) == [*pinned, "step_00000003"]


@pytest.mark.parametrize("incremental", [False, True])
def test_crash_at_any_operation_leaves_a_step_that_loads_and_the_next_manager_cleans_up(incremental: bool) -> None:
    report = explore(
        lambda store: save_and_remove(store, incremental),
        before=lambda store: begin(store, incremental),
        check=value_in,
        again=lambda store: go_on(store, incremental),
        states_per_point=4,
    )
    assert any(operation.startswith("link") for operation in report.operations) == incremental
    assert report.points > 40
    assert set(report.outcomes) == {"1", "2"}
