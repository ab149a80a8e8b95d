"""`LoaderState`: where each rank's data loader stands. Not here: samplers (`sampler`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from giantstep.errors import BadArgumentError
from giantstep.mapping.replica import ReplicaId
from giantstep.training_state.ranked import Position, RankedState, Reshard

# Beside a loader's own state, in one dict with it.
_BESIDE = "giantstep"
_GENERATORS, _EPOCHS = "generators", "epochs"
# In the state of a `StatefulDataLoader`: nothing is left of its epoch.
_FINISHED = "_iterator_finished"
# What these draw is nowhere kept: a resumed loader would go on with other samples.
_FORGETFUL = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class LoaderState(RankedState):
    """A data loader with `state_dict` and `load_state_dict`, such as torchdata's `StatefulDataLoader`, of this rank.

    Of a `StatefulDataLoader` a load also gives back the generators that orders are drawn from and the epochs of samplers, and
    makes the iterator (which starts its workers): the next `iter` of the loader gives that one. So random numbers of the
    process, and orders of later epochs, are what they would be had the job not been interrupted. A loader that has not begun
    is saved as that; nothing is made or drawn.

    Args:
        loader: its state is read by each save and given back by a load, before it is iterated again.
        grid, position, replica_id, process_group: see `RankedState`. Ranks that read the same samples share a position: of
            data-parallel ranks each has its own.
        on_reshard: when the checkpoint has another number of positions: `raise`, or a function, see `Reshard`, that makes the
            state of a loader of those of all. What a loader has read ahead belongs to its rank, so there is no rule that is
            right for all; `ResumableSampler` needs none.

    Raises:
        BadArgumentError: the loader keeps no state, or has a sampler whose order cannot be restored.
    """

    def __init__(
        self,
        loader: Any,
        *,
        grid: int | Position | None = None,
        position: int | Position | None = None,
        replica_id: ReplicaId = 0,
        process_group: Any = None,
        on_reshard: Literal["raise"] | Reshard = "raise",
        on_missing: Literal["strict", "keep"] = "strict",
    ) -> None:
        for name in ("state_dict", "load_state_dict"):
            if not callable(getattr(loader, name, None)):
                raise BadArgumentError(
                    f"{type(loader).__name__} has no {name}: expected a loader such as torchdata's StatefulDataLoader; of "
                    "torch's own DataLoader save the sampler, for example a ResumableSampler"
                )
        known = _is_torchdatas(loader)
        if known:
            _check_samplers(loader)
        self._loader = loader
        super().__init__(
            self._state if known else loader.state_dict,
            self._give_back if known else loader.load_state_dict,
            grid=grid,
            position=position,
            replica_id=replica_id,
            process_group=process_group,
            on_reshard=on_reshard,
            on_missing=on_missing,
        )

    def _state(self) -> dict[str, Any]:
        loader, owners = self._loader, _owners(self._loader)
        # Where there is no iterator it was loaded and not begun since; or never begun, which an empty state says.
        found = loader.next_iter_state or {} if loader._iterator is None else loader.state_dict()
        beside = {
            _GENERATORS: {path: owner.generator for path, owner in owners.items() if _draws_at_once(owner)},
            _EPOCHS: {path: owner.epoch for path, owner in owners.items() if _has_epoch(owner)},
        }
        return {**found, _BESIDE: beside}

    def _give_back(self, state: dict[str, Any]) -> None:
        loader, beside = self._loader, state.get(_BESIDE, {})
        own = {name: value for name, value in state.items() if name != _BESIDE}
        owners = _owners(loader)
        for path, epoch in beside.get(_EPOCHS, {}).items():
            if path in owners and _has_epoch(owners[path]):
                owners[path].set_epoch(epoch)
        loader.load_state_dict(own)
        if own:
            # The iterator, which the next `iter(loader)` gives: made now, so that what making it draws can be undone.
            with _undrawn():
                loader.state_dict()
        if own.get(_FINISHED):
            # This iterator will give nothing, so it never takes from a StatefulDistributedSampler how far that had come; the
            # one of the next epoch would.
            for owner in owners.values():
                if hasattr(owner, "next_yielded"):
                    owner.next_yielded = None
        for path, generator in beside.get(_GENERATORS, {}).items():
            if path in owners and _draws_at_once(owners[path]):
                owners[path].generator.set_state(generator.get_state())


def _is_torchdatas(loader: Any) -> bool:
    """Whether it is a `StatefulDataLoader`, which need not be installed."""
    return (
        hasattr(loader, "_iterator") and hasattr(loader, "next_iter_state") and isinstance(loader, torch.utils.data.DataLoader)
    )


def _owners(loader: Any) -> dict[str, Any]:
    """The loader and the samplers that it draws from, at whatever depth, by how they are reached."""
    found: dict[str, Any] = {"loader": loader}
    left = ["loader"]
    while left:
        path = left.pop()
        for name in ("batch_sampler", "sampler"):
            inner = getattr(found[path], name, None)
            if inner is not None and all(inner is not other for other in found.values()):
                found[f"{path}.{name}"] = inner
                left.append(f"{path}.{name}")
    return found


def _check_samplers(loader: Any) -> None:
    shared = getattr(loader, "generator", None)
    for sampler in _owners(loader).values():
        kind = type(sampler).__name__
        if isinstance(sampler, _FORGETFUL) and not callable(getattr(sampler, "state_dict", None)):
            raise BadArgumentError(
                f"the loader draws from a torch.utils.data.{kind}, which keeps nothing of its order: resumed, it would give "
                "other samples. Use StatefulDataLoader(shuffle=True), a sampler with state_dict and load_state_dict, or a "
                "ResumableSampler"
            )
        same = shared is not None and sampler is not loader and getattr(sampler, "generator", None) is shared
        if same and not _draws_at_once(sampler):
            raise BadArgumentError(
                f"{kind} draws with replacement, or more samples than there are, from the generator that the loader draws from "
                "too: resumed, it would give other samples. Give the sampler one of its own"
            )


def _draws_at_once(owner: Any) -> bool:
    """Whether it has a generator and draws nothing more from it once its iterator is made.

    Of another one the generator follows from what the iterator has given, and the loader sees to it.
    """
    if not isinstance(getattr(owner, "generator", None), torch.Generator):
        return False
    source = getattr(owner, "data_source", None)
    return not getattr(owner, "replacement", False) and (source is None or owner.num_samples <= len(source))


def _has_epoch(owner: Any) -> bool:
    return type(getattr(owner, "epoch", None)) is int and callable(getattr(owner, "set_epoch", None))


@contextmanager
def _undrawn() -> Iterator[None]:
    """Inside, numbers may be drawn from torch's generator of the CPU; afterwards it is as it was before."""
    before = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(before)
