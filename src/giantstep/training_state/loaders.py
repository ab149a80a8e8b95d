"""`LoaderState`: where each rank's data loader stands. Not here: samplers (`sampler`, `replayed`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from giantstep.errors import BadArgumentError, MismatchError
from giantstep.mapping.replica import ReplicaId
from giantstep.training_state.generator_checks import check_state, set_checked
from giantstep.training_state.loader_parts import (
    check_samplers,
    epochs_of,
    generators_of,
    is_torch_loader,
    remember,
    set_epochs,
    state_of_iterator,
    undisturbed,
    waits_for_epoch,
)
from giantstep.training_state.ranked import Position, RankedState, Reshard

# The one key of a value that holds more than the loader's own state.
_MARK = "giantstep.loader"


class LoaderState(RankedState):
    """A data loader with `state_dict` and `load_state_dict`, such as torchdata's `StatefulDataLoader`, of this rank.

    Of a `StatefulDataLoader` it is stored and loaded besides: that it has not begun, without making its iterator; the states
    of its generator and of those of its samplers; and the epochs of samplers and dataset that have an int `epoch` and
    `set_epoch`. A load makes the iterator at once, which starts its workers, so that `iter(loader)` afterwards draws no random
    numbers; Python's, NumPy's and torch's global streams stay as they are meanwhile. Of a loader that has not begun the data
    stay as they are. If a sampler or dataset has `set_epoch`
    and neither an epoch that can be read nor a state, `iter(loader)` makes the iterator, after the job has told the epoch, and
    draws from torch's global stream.

    Args:
        loader: its state is read by each save and given back by a load, before it is iterated again.
        grid, position, replica_id, process_group: see `RankedState`. Ranks that read the same samples share a position: of
            data-parallel ranks each has its own.
        on_reshard: when the checkpoint has another number of positions: `raise`, or a function, see `Reshard`, that makes the
            state of a loader of those of all (None of one that has not begun). What a loader has read ahead belongs to its
            rank, so there is no rule that is right for all; `ResumableSampler` needs none.

    Raises:
        BadArgumentError: it has no state, or a sampler whose order would be another one after a load.
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
        self._loader, self._is_torch = loader, is_torch_loader(loader)
        if self._is_torch:
            check_samplers(loader)
        super().__init__(
            self._state,
            self._restored,
            grid=grid,
            position=position,
            replica_id=replica_id,
            process_group=process_group,
            on_reshard=_of_loaders(on_reshard) if callable(on_reshard) else on_reshard,
            on_missing=on_missing,
        )

    def _state(self) -> Any:
        loader = self._loader
        if not self._is_torch:
            return loader.state_dict()
        # What was loaded and not used yet, or None of a loader that has not begun: asking it would make its iterator.
        state = loader.next_iter_state if loader._iterator is None else state_of_iterator(loader._iterator)
        generators = [generator.get_state() for generator in generators_of(loader)]
        return {_MARK: {"state": state, "generators": generators, "epochs": epochs_of(loader)}}

    def _restored(self, value: Any) -> None:
        if not self._is_torch:
            self._loader.load_state_dict(_own_state(value))
        elif not _is_marked(value):
            # Of a checkpoint from before there was more, or made by a function.
            self._load(value)
        else:
            generators = self._checked(value[_MARK])
            set_epochs(self._loader, value[_MARK]["epochs"])
            self._load(value[_MARK]["state"])
            for generator, state in generators:
                set_checked(generator, state, "loader")

    def _checked(self, stored: Any) -> list[tuple[torch.Generator, Any]]:
        """The generators with their states, if the value fits the loader."""
        names = ("state", "generators", "epochs")
        if type(stored) is not dict or set(stored) != set(names) or any(type(stored[name]) is not list for name in names[1:]):
            raise MismatchError(f"expected the value of a LoaderState, found {stored!r:.80}. Load what was saved from one")
        generators = generators_of(self._loader)
        for name, here in (("generators", generators), ("epochs", epochs_of(self._loader))):
            if len(stored[name]) != len(here):
                raise MismatchError(
                    f"the stored loader has {len(stored[name])} {name} in its dataset and samplers, this one {len(here)}: make "
                    "it of the same parts as the one that was saved"
                )
        if any(epoch is not None and type(epoch) is not int for epoch in stored["epochs"]):
            raise MismatchError(f"expected epochs of a loader, found {stored['epochs']!r:.80}. Load what was saved from one")
        pairs = list(zip(generators, stored["generators"], strict=True))
        for generator, state in pairs:
            check_state(generator, state, "loader")
        return pairs

    def _load(self, state: Any) -> None:
        loader = self._loader
        # Empty: as if it had not begun. It leaves what was loaded before.
        loader.next_iter_state = None
        loader.load_state_dict(state or {})
        if not state or waits_for_epoch(loader):
            return
        try:
            with undisturbed():
                loader.state_dict()
        except (AssertionError, KeyError, TypeError, ValueError, StopIteration) as error:
            # So says torchdata of a state that does not fit, or of data that have become fewer.
            raise MismatchError(
                f"{type(loader).__name__} cannot go on from the stored state ({type(error).__name__}: {error!s:.200}): make it "
                "as it was when it was saved, with as many workers and the same data and samplers"
            ) from error
        remember(loader, state)


def _is_marked(value: Any) -> bool:
    return type(value) is dict and value.keys() == {_MARK}


def _own_state(value: Any) -> Any:
    """The loader's own state of a stored value."""
    return value[_MARK].get("state") if _is_marked(value) and type(value[_MARK]) is dict else value


def _of_loaders(on_reshard: Reshard) -> Reshard:
    """The function of the loaders' own states."""

    def of_values(stored: Mapping[Position, Any], grid: Position, position: Position) -> Any:
        return on_reshard({place: _own_state(value) for place, value in stored.items()}, grid, position)

    return of_values
