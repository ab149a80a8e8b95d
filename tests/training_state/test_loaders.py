"""Stateful data loaders go on with exactly the samples that are left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DistributedSampler, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler as TorchdatasRandomSampler
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

import giantstep as gs
from giantstep.errors import BadArgumentError, ShapeMismatchError
from giantstep.group.threads import ThreadGroup
from giantstep.testing.ranks import RanksFailedError, run_ranks
from giantstep.training_state import LoaderState, RandomState

# torchdata and torch's loader look at names that torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning")


class Counting(IterableDataset[int]):
    """Counts, and knows how far it came."""

    def __init__(self, first: int) -> None:
        self.next = self.first = first

    def __iter__(self) -> Iterator[int]:
        while self.next < self.first + 40:
            self.next += 1
            yield self.next - 1
        self.next = self.first

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


def map_style(workers: int) -> StatefulDataLoader[Any]:
    data = list(range(100, 160))
    context = "forkserver" if workers else None
    generator = torch.Generator().manual_seed(3)
    return StatefulDataLoader(
        data, batch_size=4, shuffle=True, num_workers=workers, multiprocessing_context=context, generator=generator
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_loader_goes_on_in_the_middle_of_an_epoch(tmp_path: Path, workers: int) -> None:
    loader = map_style(workers)
    iterator = iter(loader)
    for _ in range(6):
        next(iterator)
    gs.save({"loader": LoaderState(loader)}, tmp_path)
    expected = [batch.tolist() for batch in iterator]
    assert len(expected) == 9
    other = map_style(workers)
    gs.load({"loader": LoaderState(other)}, tmp_path)
    assert [batch.tolist() for batch in other] == expected


Make = Callable[[], StatefulDataLoader[Any]]


def shuffled(**settings: Any) -> StatefulDataLoader[Any]:
    return StatefulDataLoader(list(range(40)), batch_size=4, **settings)


def distributed() -> StatefulDataLoader[Any]:
    return shuffled(sampler=DistributedSampler(range(40), num_replicas=2, rank=1, seed=5))


def stateful_distributed() -> StatefulDataLoader[Any]:
    return shuffled(sampler=StatefulDistributedSampler(range(40), num_replicas=2, rank=1, seed=5))


LOADERS: dict[str, Make] = {
    "in order": shuffled,
    "shuffled": lambda: shuffled(shuffle=True),
    "shuffled by a generator": lambda: shuffled(shuffle=True, generator=torch.Generator().manual_seed(7)),
    "with replacement": lambda: shuffled(
        sampler=TorchdatasRandomSampler(range(40), replacement=True, generator=torch.Generator().manual_seed(7))
    ),
    "distributed": distributed,
    "stateful and distributed": stateful_distributed,
    "batches by another sampler": lambda: StatefulDataLoader(
        list(range(40)), batch_sampler=torch.utils.data.BatchSampler(DistributedSampler(range(40), 2, 0), 4, False)
    ),
    "with workers": lambda: shuffled(
        shuffle=True, generator=torch.Generator().manual_seed(7), num_workers=2, multiprocessing_context="forkserver"
    ),
}


def epoch_of(loader: StatefulDataLoader[Any], epoch: int) -> Iterator[tuple[list[int], float]]:
    """What a job draws: batches, and after each a number for its dropout."""
    if epoch and hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(epoch)
    for batch in loader:
        yield batch.tolist(), float(torch.rand(1))


STOPS = [(0, 0), (0, 3), (1, 0), (1, 2), (1, 5)]
# Starting workers takes long.
STOPS_WITH_WORKERS = [(1, 0), (1, 2)]


@pytest.mark.parametrize(
    ("kind", "stop"),
    [(kind, stop) for kind in LOADERS for stop in (STOPS_WITH_WORKERS if kind == "with workers" else STOPS)],
)
def test_a_job_goes_on_as_if_it_had_not_been_interrupted(tmp_path: Path, kind: str, stop: tuple[int, int]) -> None:
    """Samples, random numbers between them, and the order of later epochs; wherever it was saved."""
    epoch, batches = stop
    torch.manual_seed(11)
    loader = LOADERS[kind]()
    for earlier in range(epoch):
        list(epoch_of(loader, earlier))
    begun = epoch_of(loader, epoch)
    for _ in range(batches):
        next(begun)
    state = {"loader": LoaderState(loader), "rng": RandomState()}
    gs.save(state, tmp_path)
    expected = [list(begun), list(epoch_of(loader, epoch + 1)), list(epoch_of(loader, epoch + 2))]

    torch.manual_seed(12)
    torch.rand(5)
    other = LOADERS[kind]()
    # Either may be restored first.
    gs.load({"rng": RandomState(), "loader": LoaderState(other)}, tmp_path)
    again = [list(epoch_of(other, epoch)), list(epoch_of(other, epoch + 1)), list(epoch_of(other, epoch + 2))]
    assert again == expected


def test_a_loader_that_has_not_begun_is_saved_without_making_or_drawing_anything(tmp_path: Path) -> None:
    loader = shuffled(shuffle=True)
    before = torch.get_rng_state()
    gs.save({"loader": LoaderState(loader)}, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert loader._iterator is None


def test_a_loader_saved_right_after_a_load_is_where_it_was(tmp_path: Path) -> None:
    loader = shuffled(shuffle=True)
    iterator = iter(loader)
    next(iterator)
    gs.save({"loader": LoaderState(loader)}, tmp_path / "1")
    expected = [batch.tolist() for batch in iterator]
    other = shuffled(shuffle=True)
    gs.load({"loader": LoaderState(other)}, tmp_path / "1")
    gs.save({"loader": LoaderState(other)}, tmp_path / "2")
    third = shuffled(shuffle=True)
    gs.load({"loader": LoaderState(third)}, tmp_path / "2")
    assert [batch.tolist() for batch in third] == expected


def test_each_rank_has_a_loader_of_its_own(tmp_path: Path) -> None:
    def save(group: ThreadGroup) -> list[list[int]]:
        loader = StatefulDataLoader(Counting(100 * group.rank), batch_size=3)
        iterator = iter(loader)
        for _ in range(4 + group.rank):
            next(iterator)
        gs.save({"loader": LoaderState(loader, process_group=group)}, tmp_path, process_group=group)
        return [batch.tolist() for batch in iterator]

    def load(group: ThreadGroup) -> list[list[int]]:
        loader = StatefulDataLoader(Counting(100 * group.rank), batch_size=3)
        gs.load({"loader": LoaderState(loader, process_group=group)}, tmp_path, process_group=group)
        return [batch.tolist() for batch in loader]

    expected = run_ranks(3, save)
    assert expected[1][0] == [115, 116, 117]
    assert run_ranks(3, load) == expected


class Plain:
    """The least that a loader needs."""

    def __init__(self, place: int) -> None:
        self.place = place

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def test_another_number_of_ranks_is_refused_or_left_to_a_function(tmp_path: Path) -> None:
    def save(group: ThreadGroup) -> None:
        gs.save({"loader": LoaderState(Plain(10 + group.rank), process_group=group)}, tmp_path, process_group=group)

    run_ranks(4, save)

    def load(group: ThreadGroup, policy: Any) -> int:
        loader = Plain(0)
        gs.load({"loader": LoaderState(loader, process_group=group, on_reshard=policy)}, tmp_path, process_group=group)
        return loader.place

    with pytest.raises(RanksFailedError) as caught:
        run_ranks(2, lambda group: load(group, "raise"))
    assert all(isinstance(error, ShapeMismatchError) for error in caught.value.errors)

    def least(stored: Any, grid: tuple[int, ...], position: tuple[int, ...]) -> Any:
        assert (sorted(stored), grid) == ([(0,), (1,), (2,), (3,)], (2,))
        return {"place": min(state["place"] for state in stored.values()) + position[0]}

    assert run_ranks(2, lambda group: load(group, least)) == [10, 11]


def test_torchs_own_loader_is_refused_with_advice() -> None:
    with pytest.raises(BadArgumentError, match="ResumableSampler"):
        LoaderState(torch.utils.data.DataLoader([1, 2]))
