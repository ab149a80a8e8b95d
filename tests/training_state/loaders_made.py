"""Loaders of all kinds that go on exactly, for tests: each function makes the same one again, in another state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler as StatefulRandomSampler
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from giantstep.training_state import ReplayedSampler

DATA = list(range(100, 126))
WEIGHTS = [1.0 + number % 3 for number in range(len(DATA))]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Stream(IterableDataset[int]):
    """Counts, and knows how far it came."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Iterator[int]:
        while self.next < 26:
            self.next += 1
            yield self.next - 1
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


class NoisyStream(IterableDataset[int]):
    """Knows nothing, and draws from the global stream."""

    def __iter__(self) -> Iterator[int]:
        for number in range(26):
            yield number + 1000 * int(torch.randint(2, (1,)))


class ByEpoch(Sampler[int]):
    """A job's own: another order in each epoch, and no state."""

    epoch = 0

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(len(DATA), generator=generator(self.epoch)).tolist())

    def __len__(self) -> int:
        return len(DATA)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def shared(seed: int, make: Callable[[torch.Generator], Any], **settings: Any) -> StatefulDataLoader[Any]:
    """With one generator for loader and sampler."""
    one = generator(seed)
    return StatefulDataLoader(DATA, batch_size=4, sampler=make(one), generator=one, **settings)


def over(sampler: Any, **settings: Any) -> StatefulDataLoader[Any]:
    return StatefulDataLoader(DATA, batch_size=4, sampler=sampler, **settings)


MADE: dict[str, Callable[..., StatefulDataLoader[Any]]] = {
    "in order": lambda seed, **s: StatefulDataLoader(DATA, batch_size=4, generator=generator(seed), **s),
    "shuffled": lambda seed, **s: StatefulDataLoader(DATA, batch_size=4, shuffle=True, drop_last=True, **s),
    "shuffled, with a generator": lambda seed, **s: StatefulDataLoader(
        DATA, batch_size=4, shuffle=True, generator=generator(seed), **s
    ),
    "drawn with replacement, twice over": lambda seed, **s: shared(
        seed, lambda one: StatefulRandomSampler(DATA, replacement=True, num_samples=70, generator=one), **s
    ),
    "drawn without, twice over": lambda seed, **s: over(
        StatefulRandomSampler(DATA, num_samples=60, generator=generator(seed)), **s
    ),
    "replayed RandomSampler": lambda seed, **s: over(ReplayedSampler(RandomSampler(DATA)), **s),
    "replayed RandomSampler with replacement": lambda seed, **s: shared(
        seed, lambda one: ReplayedSampler(RandomSampler(DATA, replacement=True, num_samples=70, generator=one)), **s
    ),
    "replayed SubsetRandomSampler": lambda seed, **s: shared(
        seed, lambda one: ReplayedSampler(SubsetRandomSampler(range(3, 25), generator=one)), **s
    ),
    "replayed WeightedRandomSampler": lambda seed, **s: over(ReplayedSampler(WeightedRandomSampler(WEIGHTS, 30)), **s),
    "replayed batches": lambda seed, **s: StatefulDataLoader(
        DATA, batch_sampler=ReplayedSampler(BatchSampler(RandomSampler(DATA), 4, drop_last=False)), **s
    ),
    "one by one": lambda seed, **s: StatefulDataLoader(
        DATA, batch_size=None, sampler=ReplayedSampler(RandomSampler(DATA, generator=generator(seed))), **s
    ),
    "distributed": lambda seed, **s: over(DistributedSampler(DATA, num_replicas=2, rank=1), **s),
    "distributed, with state": lambda seed, **s: over(
        StatefulDistributedSampler(DATA, num_replicas=2, rank=1),  # type: ignore[arg-type]
        **s,
    ),
    "a sampler of the job's own": lambda seed, **s: over(ByEpoch(), **s),
    "a stream": lambda seed, **s: StatefulDataLoader(Stream(), batch_size=4, **s),
    "a stream without state": lambda seed, **s: StatefulDataLoader(NoisyStream(), batch_size=4, **s),
}
