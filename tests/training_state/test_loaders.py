"""Stateful data loaders go on with exactly the samples that are left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import giantstep as gs
from giantstep.errors import BadArgumentError, ShapeMismatchError
from giantstep.group.threads import ThreadGroup
from giantstep.testing.ranks import RanksFailedError, run_ranks
from giantstep.training_state import LoaderState

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
