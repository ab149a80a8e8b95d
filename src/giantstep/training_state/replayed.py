"""`ReplayedSampler`: samplers that draw their order at random go on in the middle of an epoch. For loaders with state."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from giantstep.errors import BadArgumentError, MismatchError
from giantstep.training_state.generator_checks import check_state, set_checked


class ReplayedSampler(Sampler[Any]):
    """A sampler whose iterators know where they stand, made of one that draws its order from a generator.

    For torchdata's `StatefulDataLoader`, as `sampler=` or `batch_sampler=`, outermost. What is stored is the generator's state
    at the beginning of the epoch and how many items were used; a load draws the order again and skips these.

    Args:
        sampler: such as torch's `RandomSampler`, `SubsetRandomSampler` or `WeightedRandomSampler`, or a `BatchSampler` of one.
            If its `generator` is None it is given one, seeded from torch's global stream.

    Attributes:
        generator: the sampler's.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        drawing = [part for part in sampler_chain(sampler) if hasattr(part, "generator")]
        if len(drawing) != 1 or not isinstance(drawing[0].generator, torch.Generator | None):
            raise BadArgumentError(
                f"ReplayedSampler: {type(sampler).__name__} must draw from one torch.Generator, as its attribute generator, or "
                f"that of the sampler inside it; found {len(drawing)} samplers with such an attribute"
            )
        if drawing[0].generator is None:
            drawing[0].generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        self.generator: torch.Generator = drawing[0].generator

    def __iter__(self) -> Iterator[Any]:
        """An iterator with `state_dict` and `load_state_dict`."""
        return _Replay(self._sampler, self.generator)

    def __len__(self) -> int:
        return len(self._sampler)


def sampler_chain(sampler: Any) -> list[Any]:
    """A sampler and those inside it, as their attributes `sampler`, from the outermost."""
    found: list[Any] = []
    while sampler is not None and all(sampler is not other for other in found):
        found.append(sampler)
        sampler = getattr(sampler, "sampler", None)
    return found


class _Replay:
    def __init__(self, sampler: Any, generator: torch.Generator) -> None:
        self._sampler, self._generator = sampler, generator
        # None as long as nothing is drawn: that is with the first item, and until then others may draw from the generator.
        self._start: torch.Tensor | None = None
        self._items: Iterator[Any] = iter(())
        self._used = 0

    def __iter__(self) -> _Replay:
        return self

    def __next__(self) -> Any:
        if self._start is None:
            self._begin(self._generator.get_state())
        item = next(self._items)
        self._used += 1
        return item

    def _begin(self, start: torch.Tensor) -> None:
        self._start, self._items = start, iter(self._sampler)

    def state_dict(self) -> dict[str, Any]:
        return {"start": self._start, "used": self._used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        start, used = state["start"], state["used"]
        if start is None:
            self._start, self._items, self._used = None, iter(()), 0
            return
        check_state(self._generator, start, "sampler")
        set_checked(self._generator, start, "sampler")
        self._begin(start)
        self._used = sum(1 for _ in itertools.islice(self._items, used))
        if self._used != used:
            raise MismatchError(
                f"the stored sampler has given {used} items, and {type(self._sampler).__name__} gives {self._used} here: the "
                "data, or its settings, are others"
            )
