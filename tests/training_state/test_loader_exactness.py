"""A job that is resumed anywhere in an epoch is the uninterrupted one: samples, all random numbers, and later epochs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler as StatefulRandomSampler

import giantstep as gs
from giantstep.errors import BadArgumentError, CorruptionError, GiantstepError, MismatchError
from giantstep.training_state import LoaderState, RandomState, ReplayedSampler, ResumableSampler
from loaders_made import DATA, MADE, WEIGHTS, ByEpoch, generator, over

# torchdata and torch's loader look at names that torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning")


class Job:
    """Trains, so to say: its record has what it saw of data and random numbers."""

    def __init__(self, name: str, seed: int, **settings: Any) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.loader = MADE[name](seed, **settings)
        self.epoch = 0
        self.iterator: Any = None
        self.record: list[Any] = []

    def begin(self) -> None:
        for part in (self.loader.sampler, self.loader.batch_sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.epoch)
        self.iterator = iter(self.loader)

    def step(self) -> bool:
        """False at the end of the epoch."""
        if self.iterator is None:
            self.begin()
        batch = next(self.iterator, None)
        numbers = (random.random(), float(np.random.rand()), float(torch.nn.functional.dropout(torch.ones(9)).sum()))
        self.record.append((torch.as_tensor(batch if batch is not None else -1).tolist(), numbers))
        if batch is None:
            self.iterator, self.epoch = None, self.epoch + 1
        return batch is not None

    def run(self, epochs: int) -> None:
        """To the end of that many epochs, the one that it is in included."""
        end = self.epoch + epochs
        while self.epoch < end:
            self.step()

    def state(self, *, loader_first: bool) -> dict[str, Any]:
        leaves = {"loader": LoaderState(self.loader), "rng": RandomState()}
        return {"epoch": self.epoch, **(leaves if loader_first else dict(reversed(leaves.items())))}


def interrupted(name: str, path: Path, epochs: int, steps: int, *, begun: bool, **settings: Any) -> tuple[list[Any], list[Any]]:
    """What follows after a save, and after its load into another job."""
    job = Job(name, 1, **settings)
    job.run(epochs)
    if begun:
        job.begin()
    for _ in range(steps):
        job.step()
    gs.save(job.state(loader_first=False), path)
    job.record.clear()
    job.run(3)
    # What was loaded and not used yet is saved as it was, too.
    middle = Job(name, 2, **settings)
    middle.epoch = gs.load(middle.state(loader_first=True), path)["epoch"]
    gs.save(middle.state(loader_first=True), path / "again")
    other = Job(name, 3, **settings)
    # It has begun, too; but data that know how far they came are not set back with a loader that has not begun.
    if name != "a stream" or begun or epochs or steps:
        other.run(1)
        other.step()
    other.iterator = None
    other.epoch = gs.load(other.state(loader_first=False), path / "again")["epoch"]
    other.record.clear()
    other.run(3)
    return job.record, other.record


# The last is the end of an epoch, of which the job has been told.
PLACES = [(0, 0, False), (0, 0, True), (0, 3, False), (1, 0, False), (1, 5, False), (2, 2, False)]


@pytest.mark.parametrize(("epochs", "steps", "begun"), PLACES)
@pytest.mark.parametrize("name", MADE)
def test_a_resumed_job_is_the_uninterrupted_one(tmp_path: Path, name: str, epochs: int, steps: int, *, begun: bool) -> None:
    expected, found = interrupted(name, tmp_path, epochs, steps, begun=begun)
    assert found == expected


@pytest.mark.parametrize("name", ["shuffled, with a generator", "drawn with replacement, twice over", "replayed RandomSampler", "a stream"])
def test_a_resumed_job_with_workers_is_the_uninterrupted_one(tmp_path: Path, name: str) -> None:
    settings = {"num_workers": 2, "multiprocessing_context": "forkserver"}
    expected, found = interrupted(name, tmp_path, 0, 3, begun=False, **settings)
    assert found == expected


def test_persistent_workers_and_the_end_of_an_epoch(tmp_path: Path) -> None:
    settings = {"num_workers": 1, "multiprocessing_context": "forkserver", "persistent_workers": True}
    expected, found = interrupted("shuffled, with a generator", tmp_path, 1, 0, begun=False, **settings)
    assert found == expected
