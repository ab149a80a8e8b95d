"""What the state of a loader of torch's kind leaves out: generators and epochs of samplers; and which samplers it gets wrong.

torchdata's `StatefulDataLoader` asks the sampler that its batch sampler has for a state. Samplers without one it starts again,
and skips what was used: right only if their order follows from what they are made of. Called by `loaders`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from giantstep.errors import BadArgumentError
from giantstep.training_state.generators import NUMPY, PYTHON, TORCH, set_stream, state_of_stream
from giantstep.training_state.replayed import ReplayedSampler, sampler_chain
from giantstep.training_state.sampler import ResumableSampler

# Of iterators that a load has made: how many batches they had given, and what was loaded.
_LOADED: weakref.WeakKeyDictionary[Any, tuple[int, Any]] = weakref.WeakKeyDictionary()
# They draw their order at the beginning of an epoch, and keep nothing of it.
_DRAWN = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def is_torch_loader(loader: Any) -> bool:
    """Whether it is a `DataLoader` of torch's with state, as torchdata's is."""
    return isinstance(loader, DataLoader) and hasattr(loader, "next_iter_state") and hasattr(loader, "_iterator")


def is_stateful(part: Any) -> bool:
    """Whether torchdata asks it for its state."""
    return callable(getattr(part, "state_dict", None)) and callable(getattr(part, "load_state_dict", None))


def samplers_of(loader: Any) -> list[Any]:
    """The sampler that the loader iterates, and those inside it, from the outermost."""
    return sampler_chain(loader.sampler if loader.batch_sampler is None else loader.batch_sampler)


def check_samplers(loader: Any) -> None:
    """Refuse samplers whose order would be another one after a load, without an error.

    Raises:
        BadArgumentError: names the sampler and what to use.
    """
    # The outermost sampler that torchdata starts again, and with it those inside.
    started_again: Any = None
    for sampler in samplers_of(loader):
        if isinstance(sampler, ResumableSampler):
            raise BadArgumentError(
                "LoaderState: the loader has a ResumableSampler, which knows best where training stands: save the sampler "
                "itself, as a leaf, and no LoaderState"
            )
        if is_stateful(sampler) and started_again is None:
            return
        drawn = isinstance(getattr(sampler, "generator", None), torch.Generator)
        unasked = is_stateful(sampler) and not isinstance(sampler, DistributedSampler)
        if isinstance(sampler, _DRAWN) or (started_again is not None and (drawn or unasked)):
            raise _wrong_order(sampler, sampler if started_again is None else started_again)
        # torchdata asks iterators of its own samplers for their state, and ours have one too.
        known = isinstance(sampler, ReplayedSampler) or type(sampler).__module__.startswith("torchdata.")
        if started_again is None and not known:
            started_again = sampler


def _wrong_order(sampler: Any, outermost: Any) -> BadArgumentError:
    name = type(sampler).__name__
    where = "" if sampler is outermost else f" inside {type(outermost).__name__}"
    remedy = f"wrap the {type(outermost).__name__} in giantstep.training_state.ReplayedSampler"
    if isinstance(sampler, RandomSampler):
        remedy += ", give the loader shuffle=True and no sampler"
    return BadArgumentError(
        f"LoaderState: the order of {name}{where} would be another one after a load in the middle of an epoch: {remedy}, or "
        "save a ResumableSampler instead of the loader"
    )


def generators_of(loader: Any) -> list[torch.Generator]:
    """Generators of torch's that the loader and its samplers have of their own, each once."""
    found = [getattr(part, "generator", None) for part in (loader, *samplers_of(loader))]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


def epochs_of(loader: Any) -> list[int | None]:
    """Epochs of dataset and samplers, as `set_epoch` takes them; None of those that have none to read."""
    return [_epoch_of(part) for part in _parts(loader)]


def set_epochs(loader: Any, epochs: list[int | None]) -> None:
    """The inverse of `epochs_of`."""
    for part, epoch in zip(_parts(loader), epochs, strict=True):
        if epoch is not None and callable(getattr(part, "set_epoch", None)) and _epoch_of(part) != epoch:
            part.set_epoch(epoch)


def _parts(loader: Any) -> list[Any]:
    return [loader.dataset, *samplers_of(loader)]


def _epoch_of(part: Any) -> int | None:
    epoch = getattr(part, "epoch", None) if callable(getattr(part, "set_epoch", None)) else None
    return epoch if type(epoch) is int else None


def waits_for_epoch(loader: Any) -> bool:
    """Whether some part must be told its epoch by the job before an iterator is made: it has one that cannot be read."""
    return any(
        callable(getattr(part, "set_epoch", None)) and _epoch_of(part) is None and not is_stateful(part)
        for part in _parts(loader)
    )


@contextmanager
def undisturbed() -> Iterator[None]:
    """The process's own streams of random numbers are afterwards as they were before; not those of devices."""
    states = {name: state_of_stream(name) for name in (PYTHON, NUMPY, TORCH)}
    try:
        yield
    finally:
        for name, state in states.items():
            set_stream(name, state)


def remember(loader: Any, state: Any) -> None:
    """A load has made the loader's iterator from this state."""
    iterator = loader._iterator
    given = state.get("_num_yielded") if isinstance(state, dict) else None
    if type(given) is int:
        # Where torchdata has skipped data one by one, it has counted them again.
        iterator._num_yielded = given
    if iterator._finished:
        # torchdata's sampler for several ranks would skip all of the next epoch.
        for sampler in samplers_of(loader):
            if hasattr(sampler, "next_yielded"):
                sampler.next_yielded = None
    _LOADED[iterator] = (iterator._num_yielded, state)


def state_of_iterator(iterator: Any) -> Any:
    """The state of a loader with this iterator.

    As long as it has given nothing since a load, that is what was loaded: not all samplers know yet where they stand.
    """
    given, state = _LOADED.get(iterator, (None, None))
    return state if given is not None and iterator._num_yielded == given else iterator.state_dict()
