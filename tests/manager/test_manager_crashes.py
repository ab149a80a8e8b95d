"""A crash at any storage operation of a manager's save and removal leaves a step to go on with, and nothing in the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.manager import CheckpointManager
from giantstep.testing.faults import CrashError, CrashingStore, Loss

OPTIONS = gs.SaveOptions(block_bytes=4096, buffer_bytes=4096, writer_threads=1)
FROZEN = torch.arange(2000.0)


def state_of(value: float) -> dict[str, Any]:
    return {"frozen": FROZEN, "w": torch.full((1000,), value), "value": value}


def begun(incremental: bool) -> CrashingStore:
    store = CrashingStore()
    with CheckpointManager(store, keep=1, save_options=OPTIONS, incremental=incremental) as manager:
        manager.save(1, state_of(1.0))
    store.arm(None)
    return store


def save_and_remove(store: CrashingStore, incremental: bool) -> None:
    """A further job's step, pinned, and the removal of the step before, in this thread: a crash ends it all."""
    manager = CheckpointManager(store, keep=1, save_options=OPTIONS, incremental=incremental)
    manager._saves._since_full = 1
    retention = manager._job.retention
    retention.ask = lambda *_: None  # type: ignore[method-assign]
    manager.save(2, state_of(2.0))
    retention.run_once()
    manager.pin(2)
    manager.unpin(2)
    manager.close()


def found_in(store: CrashingStore) -> float:
    with CheckpointManager(store) as manager:
        restored = manager.restore({"frozen": torch.zeros(2000), "w": torch.zeros(1000), "value": None})
        assert restored is not None, "neither the old step nor the new one"
        assert restored.skipped == ()
        (value,) = {float(restored.step), restored.state["value"], *restored.state["w"].tolist()}
        assert torch.equal(restored.state["frozen"], FROZEN)
        for entry in manager.steps():
            if entry.record is not None:
                assert gs.open_checkpoint(store.folder(entry.name)).verify().ok
    return float(value)


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("loss", list(Loss))
@pytest.mark.parametrize("after", [False, True])
def test_crash_at_any_operation_leaves_a_step_that_loads_and_the_next_manager_cleans_up(
    after: bool, loss: Loss, incremental: bool
) -> None:
    whole = begun(incremental)
    save_and_remove(whole, incremental)
    count = len(whole.operations)
    assert count > 25
    assert any(operation.startswith("link") for operation in whole.operations) == incremental
    assert found_in(whole) == 2.0
    outcomes = set()
    for position in range(count):
        store = begun(incremental)
        store.arm(position, after=after)
        with pytest.raises(CrashError):
            save_and_remove(store, incremental)
        left = store.after_power_loss(loss)
        outcomes.add(found_in(left))
        pinned = ["step_00000002"] if "pinned" in left.folder("step_00000002").names("") else []
        with CheckpointManager(left, keep=1, save_options=OPTIONS, incremental=incremental) as manager:
            manager.save(3, state_of(3.0))
        assert found_in(left) == 3.0
        assert sorted(left.folders()) == [*pinned, "step_00000003"]
    assert outcomes == {1.0, 2.0}
