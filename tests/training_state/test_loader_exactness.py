"""A job that is resumed anywhere in an epoch is the uninterrupted one: samples, all random numbers, and later epochs."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loaders_made import DATA, MADE, WEIGHTS, ByEpoch, generator, over
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


@pytest.mark.parametrize("name", ["drawn with replacement, twice over", "replayed RandomSampler", "a stream"])
def test_with_workers_a_resumed_job_is_the_uninterrupted_one(tmp_path: Path, name: str, workers: dict[str, Any]) -> None:
    job = Job(name, 1, **workers)
    for _ in range(3):
        job.step()
    gs.save(job.state(loader_first=False), tmp_path)
    job.record.clear()
    job.run(1)
    job.step()
    other = Job(name, 2, **workers)
    other.epoch = gs.load(other.state(loader_first=False), tmp_path)["epoch"]
    other.run(1)
    other.step()
    assert other.record == job.record


def test_workers_that_stay_go_on_after_the_end_of_an_epoch(tmp_path: Path, workers: dict[str, Any]) -> None:
    settings = {**workers, "persistent_workers": True}
    expected, found = interrupted("shuffled, with a generator", tmp_path, 1, 0, begun=False, **settings)
    assert found == expected


@pytest.fixture
def workers() -> dict[str, Any]:
    """Settings for a worker, which starts quickly."""
    multiprocessing.set_forkserver_preload(["torch", "loaders_made"])
    return {"num_workers": 1, "multiprocessing_context": "forkserver"}


def drawn_before_and_after(loader: Any, act: Any) -> bool:
    """Whether something draws from a stream or a generator that a loader could draw from."""
    generators = [part.generator for part in (loader, loader.sampler) if getattr(part, "generator", None) is not None]
    states = [torch.get_rng_state(), *(one.get_state() for one in generators)]
    act()
    return not all(map(torch.equal, states, [torch.get_rng_state(), *(one.get_state() for one in generators)]))


@pytest.mark.parametrize("name", MADE)
def test_saving_a_loader_that_has_not_begun_makes_no_iterator_and_draws_nothing(tmp_path: Path, name: str) -> None:
    # Workers would be started by an iterator.
    loader = MADE[name](1, num_workers=2, multiprocessing_context="spawn")
    assert not drawn_before_and_after(loader, lambda: gs.save({"loader": LoaderState(loader)}, tmp_path))
    assert loader._iterator is None
    assert not drawn_before_and_after(loader, lambda: gs.load({"loader": LoaderState(loader)}, tmp_path))
    assert loader._iterator is None
    stored = gs.open_checkpoint(tmp_path).object("loader/shard_0_1")
    assert stored["giantstep.loader"]["state"] is None


def test_iterating_after_a_load_draws_from_no_stream(tmp_path: Path) -> None:
    loader = MADE["shuffled"](1)
    next(iter(loader))
    gs.save({"loader": LoaderState(loader)}, tmp_path)
    other = MADE["shuffled"](1)
    gs.load({"loader": LoaderState(other)}, tmp_path)
    assert not drawn_before_and_after(other, lambda: next(iter(other)))


class Drawing(Sampler[int]):
    """A job's own, with a generator and no state."""

    def __init__(self, sampler: Any = None) -> None:
        self.generator, self.sampler = generator(1), sampler

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(len(DATA), generator=self.generator).tolist())


REFUSED: dict[str, tuple[Any, str]] = {
    "RandomSampler": (lambda: over(RandomSampler(DATA)), r"RandomSampler .*ReplayedSampler, give the loader shuffle=True"),
    # Right in the first epoch alone, if the generator is seeded as it was.
    "with a generator": (lambda: over(RandomSampler(DATA, generator=generator(1))), "order of RandomSampler would be"),
    "SubsetRandomSampler": (lambda: over(SubsetRandomSampler([1, 2])), "order of SubsetRandomSampler would be"),
    "WeightedRandomSampler": (lambda: over(WeightedRandomSampler(WEIGHTS, 9)), "order of WeightedRandomSampler would be"),
    "in batches": (
        lambda: StatefulDataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 4, drop_last=False)),
        "order of RandomSampler inside BatchSampler .* wrap the BatchSampler",
    ),
    "batches as samples": (
        lambda: StatefulDataLoader(DATA, batch_size=None, sampler=BatchSampler(SubsetRandomSampler([1]), 4, drop_last=False)),
        "order of SubsetRandomSampler inside BatchSampler",
    ),
    "torchdata's, started again": (
        lambda: StatefulDataLoader(DATA, batch_sampler=BatchSampler(StatefulRandomSampler(DATA), 4, drop_last=False)),
        "order of RandomSampler inside BatchSampler",
    ),
    "replayed, but not the outermost": (
        lambda: StatefulDataLoader(DATA, batch_sampler=BatchSampler(ReplayedSampler(RandomSampler(DATA)), 4, drop_last=False)),
        "order of ReplayedSampler inside BatchSampler",
    ),
    "inside one of the job's own": (lambda: over(Drawing(RandomSampler(DATA))), "order of RandomSampler inside Drawing"),
    "ResumableSampler": (lambda: over(ResumableSampler(len(DATA), 0, 1)), "save the sampler itself"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_samplers_that_would_give_others_after_a_load_are_refused_with_advice(name: str) -> None:
    make, text = REFUSED[name]
    with pytest.raises(BadArgumentError, match=text):
        LoaderState(make())


class Remembering(RandomSampler):
    """Torch's, with a state of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


def test_samplers_with_state_are_trusted() -> None:
    LoaderState(over(Remembering(DATA)))
    LoaderState(over([3, 2, 1]))


@pytest.mark.parametrize("sampler", [ByEpoch(), BatchSampler(range(4), 2, drop_last=False)])
def test_a_sampler_that_draws_from_no_generator_is_not_to_be_replayed(sampler: Any) -> None:
    with pytest.raises(BadArgumentError, match="must draw from one"):
        ReplayedSampler(sampler)


def test_a_replayed_sampler_gives_what_the_sampler_gives() -> None:
    sampler = RandomSampler(DATA, generator=generator(7))
    replayed = ReplayedSampler(RandomSampler(DATA, generator=generator(7)))
    assert len(replayed) == len(DATA)
    for _ in range(3):
        assert list(replayed) == list(sampler)


def test_a_replayed_sampler_of_fewer_items_than_were_used_is_a_mismatch(tmp_path: Path) -> None:
    def made(count: int) -> StatefulDataLoader[Any]:
        return over(ReplayedSampler(SubsetRandomSampler(range(count))))

    loader = made(20)
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    gs.save({"loader": LoaderState(loader)}, tmp_path)
    with pytest.raises(MismatchError, match="has given 16 items, and SubsetRandomSampler gives 10 here"):
        gs.load({"loader": LoaderState(made(10))}, tmp_path)


class Untold(ByEpoch):
    """Cannot be asked for its epoch."""

    epoch = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.now = 0

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(len(DATA), generator=generator(self.now)).tolist())

    def set_epoch(self, epoch: int) -> None:
        self.now = epoch


def test_a_sampler_that_must_be_told_its_epoch_is_told_before_an_iterator_is_made(tmp_path: Path) -> None:
    sampler = Untold()
    sampler.set_epoch(5)
    loader = over(sampler)
    iterator = iter(loader)
    next(iterator)
    gs.save({"loader": LoaderState(loader)}, tmp_path)
    expected = [batch.tolist() for batch in iterator]
    sampler = Untold()
    other = over(sampler)
    gs.load({"loader": LoaderState(other)}, tmp_path)
    gs.save({"loader": LoaderState(other)}, tmp_path / "again")
    gs.load({"loader": LoaderState(other)}, tmp_path / "again")
    sampler.set_epoch(5)
    assert [batch.tolist() for batch in other] == expected


def test_a_checkpoint_from_before_generators_were_stored_is_read(tmp_path: Path) -> None:
    loader = MADE["shuffled"](1)
    iterator = iter(loader)
    next(iterator)
    gs.save({"loader": {"value": gs.ShardedObject("loader", loader.state_dict(), (1,), (0,))}}, tmp_path)
    expected = [batch.tolist() for batch in iterator]
    other = MADE["shuffled"](2)
    gs.load({"loader": LoaderState(other)}, tmp_path)
    assert [batch.tolist() for batch in other] == expected


def test_what_does_not_fit_the_loader_is_a_mismatch(tmp_path: Path) -> None:
    loader = MADE["shuffled, with a generator"](1)
    next(iter(loader))
    gs.save({"loader": LoaderState(loader)}, tmp_path)
    workers = MADE["shuffled, with a generator"](1, num_workers=1, multiprocessing_context="spawn")
    with pytest.raises(MismatchError, match="as many workers"):
        gs.load({"loader": LoaderState(workers)}, tmp_path)
    one = StatefulDataLoader(DATA, generator=generator(1), sampler=StatefulRandomSampler(DATA, generator=generator(2)))
    with pytest.raises(MismatchError, match=r"has 1 generators .* this one 2"):
        gs.load({"loader": LoaderState(one)}, tmp_path)


STATE = generator(1).get_state()


@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        (5, MismatchError),
        ({"state": None, "generators": STATE, "epochs": []}, MismatchError),
        ({"state": None, "generators": [STATE], "epochs": [None, None, "x"]}, MismatchError),
        ({"state": None, "generators": ["x"], "epochs": [None] * 3}, MismatchError),
        ({"state": None, "generators": [STATE[:9]], "epochs": [None] * 3}, CorruptionError),
        ({"state": {"x": 1}, "generators": [STATE], "epochs": [None] * 3}, MismatchError),
    ],
)
def test_a_damaged_value_is_an_error(tmp_path: Path, stored: Any, kind: type[GiantstepError]) -> None:
    gs.save({"loader": {"value": gs.ShardedObject("loader", {"giantstep.loader": stored}, (1,), (0,))}}, tmp_path)
    with pytest.raises(kind):
        gs.load({"loader": LoaderState(MADE["shuffled"](1))}, tmp_path)
