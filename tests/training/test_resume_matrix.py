"""Training that is interrupted and resumed: in the same layout to the bit; in another with the same state, and close losses.

{AdamW, SGD with momentum, Muon-like, chained} x {DP, TP, PP, EP, FSDP, everything at once, to one process}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_model import Layout, Model, Place, batch
from small_optimizers import OPTIMIZERS
from thread_comm import Hall, run_threads

import giantstep as gs
from giantstep.group.threads import ThreadGroup
from giantstep.optimizer import OptimizerState

STEPS, SAVED_AFTER = 8, 4
# In float32, additions in another order change a loss of about 4 by up to 1e-6 here, within 8 steps.
TOLERANCE = 1e-5

ONE = Layout()
CHANGES: dict[str, tuple[Layout, Layout]] = {
    "DP 2 to 4": (Layout(data=2), Layout(data=4)),
    "DP 4 to 3": (Layout(data=4), Layout(data=3)),
    "TP 2 to 4": (Layout(tensor=2), Layout(tensor=4)),
    "TP 4 to 1": (Layout(tensor=4), ONE),
    "PP 2 to 4": (Layout(stages=2), Layout(stages=4)),
    "PP 4 to 2": (Layout(stages=4), Layout(stages=2)),
    "EP 2 to 4": (Layout(data=4, expert=2), Layout(data=4, expert=4)),
    "EP 4 to 1": (Layout(data=4, expert=4), Layout(data=2)),
    "FSDP 4 to 3": (Layout(data=4, sharded=True), Layout(data=3, sharded=True)),
    "FSDP to TP": (Layout(data=4, sharded=True), Layout(tensor=4)),
    "all: TP, PP, DP, EP, FSDP": (Layout(2, 2, 2, 2, sharded=True), Layout(1, 4, 2)),
    "all to one process": (Layout(2, 2, 2, 2), ONE),
}


class Run:
    """One rank of a job: model, optimizers, and the losses so far."""

    def __init__(self, layout: Layout, optimizer: str, group: ThreadGroup, hall: Hall, seed: int) -> None:
        self.place = Place.of(layout, group.rank, hall)
        self.model = Model(self.place, experts=True)
        self.model.fill(seed)
        self.optimizers = OPTIMIZERS[optimizer](self.model)
        self.group = group
        self.losses: list[float] = []

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.losses.append(self.model.loss(batch(step, self.place)))
            for optimizer in self.optimizers:
                optimizer.step()

    def state(self, step: int = 0) -> dict[str, Any]:
        sharded = self.model.sharded_state()
        return {"model": sharded, "optimizer": OptimizerState(self.optimizers, sharded), "step": step}

    def save(self, path: Path, step: int) -> None:
        gs.save(self.state(step), path, process_group=self.group)

    def load(self, path: Path) -> int:
        """Everything, strictly; a fresh optimizer gets all its state."""
        return int(gs.load(self.state(), path, process_group=self.group)["step"])


def uninterrupted(layout: Layout, optimizer: str, path: Path) -> list[float]:
    """Train to the end, with a checkpoint in the middle and one at the end."""

    def rank(group: ThreadGroup, hall: Hall) -> list[float]:
        run = Run(layout, optimizer, group, hall, seed=1)
        run.train(0, SAVED_AFTER)
        run.save(path / "middle", SAVED_AFTER)
        run.train(SAVED_AFTER, STEPS)
        run.save(path / "end", STEPS)
        return run.losses

    (losses,) = {tuple(found) for found in run_threads(layout.ranks, rank)}
    return list(losses)


def resumed(layout: Layout, optimizer: str, path: Path, name: str) -> list[float]:
    """Begin with other values, load, save at once under a new name, train to the end."""

    def rank(group: ThreadGroup, hall: Hall) -> list[float]:
        run = Run(layout, optimizer, group, hall, seed=2)
        step = run.load(path / "middle")
        run.save(path / f"{name} middle", step)
        run.train(step, STEPS)
        run.save(path / f"{name} end", STEPS)
        return run.losses

    (losses,) = {tuple(found) for found in run_threads(layout.ranks, rank)}
    return list(losses)


def differing(first: Path, second: Path) -> list[str]:
    """Keys of what two checkpoints do not have alike, to the bit."""
    one, other = gs.open_checkpoint(first), gs.open_checkpoint(second)
    found = sorted(set(one.keys()) ^ set(other.keys()))
    for key in set(one.keys()) & set(other.keys()):
        a, b = np.asarray(one[key][...]), np.asarray(other[key][...])
        if a.shape != b.shape or a.dtype != b.dtype or a.tobytes() != b.tobytes():
            found.append(key)
    if one.objects() != other.objects():
        found.append("objects")
    if one.common != other.common:
        found.append("common state")
    return found


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_job_goes_on_in_the_same_layout_to_the_bit_and_in_another_one_with_the_same_state(
    tmp_path: Path, optimizer: str, change: str
) -> None:
    before, after = CHANGES[change]
    losses = uninterrupted(before, optimizer, tmp_path)
    assert losses[-1] < losses[0], "it learns"

    again = resumed(before, optimizer, tmp_path, "again")
    assert again == losses[SAVED_AFTER:], "same layout: every loss to the bit"
    assert differing(tmp_path / "middle", tmp_path / "again middle") == []
    assert differing(tmp_path / "end", tmp_path / "again end") == []

    changed = resumed(after, optimizer, tmp_path, "changed")
    assert differing(tmp_path / "middle", tmp_path / "changed middle") == [], "all state, to the bit"
    np.testing.assert_allclose(changed, losses[SAVED_AFTER:], rtol=0, atol=TOLERANCE)


def test_the_tolerance_would_notice_lost_optimizer_state(tmp_path: Path) -> None:
    losses = uninterrupted(ONE, "AdamW", tmp_path)

    def rank(group: ThreadGroup, hall: Hall) -> list[float]:
        run = Run(ONE, "AdamW", group, hall, seed=2)
        gs.load({"model": run.model.sharded_state()}, tmp_path / "middle", strict=gs.StrictHandling.IGNORE_ALL)
        run.train(SAVED_AFTER, STEPS)
        return run.losses

    (forgetful,) = run_threads(1, rank)
    assert max(abs(a - b) for a, b in zip(forgetful, losses[SAVED_AFTER:], strict=True)) > 20 * TOLERANCE
