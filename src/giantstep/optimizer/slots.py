"""Which sharded parameter each parameter of an optimizer is, found by identity and memory.

Called by `OptimizerState`. Not here: the state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from giantstep.errors import BadArgumentError
from giantstep.mapping.dtensor import DTensorReader
from giantstep.mapping.factory import ShardedTensorFactory
from giantstep.mapping.optimizer import ShardedParam, data_of, place_in_memory, sharded_params
from giantstep.mapping.param_layout import ParamLayout, layout_of
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.mapping.tree import Tree

MainParams = Mapping[Tensor, Any]
"""Tensor that an optimizer updates -> what it is a copy of: the model's parameter; or (parameter, slice), this range of the
flattened parameter, of which data-parallel ranks have the rest; or a ShardedTensor or factory that describes it."""


@dataclass(frozen=True, slots=True)
class Name:
    """One name of a parameter; tied ones have several.

    Attributes:
        key: of the sharded parameter.
        leaf: the sharded parameter.
        place: like the key, but different for shards of one key on this rank.
        layout: what this rank holds of it.
    """

    key: str
    leaf: ShardedParam
    place: str
    layout: ParamLayout


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter of an optimizer.

    Attributes:
        param: as the optimizer has it.
        group: number of its param group.
        names: the first is the one that counts; others are of parameters tied to it.
        is_copy: whether it is a copy of the model's parameter, as an fp32 main parameter is.
    """

    param: Tensor
    group: int
    names: tuple[Name, ...]
    is_copy: bool


class ParamFinder:
    """The sharded parameters of a model, to be found by the tensors that an optimizer has.

    Args:
        model: see `giantstep.mapping.optimizer.sharded_params`.
        main_params: copies of parameters that optimizers update in their stead.
    """

    def __init__(self, model: Tree, main_params: MainParams) -> None:
        self._reader = DTensorReader()
        self._by_object: dict[int, list[tuple[str, ShardedParam]]] = {}
        self._by_place: dict[Hashable, list[tuple[str, ShardedParam]]] = {}
        self._main = {id(copy): source for copy, source in main_params.items()}
        self.count = 0
        for key, leaf in sharded_params(model):
            data = data_of(leaf)
            if data is not None:
                self.count += 1
                self._by_object.setdefault(id(data), []).append((key, leaf))
                self._by_place.setdefault(place_in_memory(data), []).append((key, leaf))

    def slots(self, optimizer: Any, what: str) -> list[Slot]:
        """The parameters of an optimizer, in the order of its groups.

        Args:
            optimizer: has `param_groups` and `state`, as those of `torch.optim`.
            what: names it in messages.

        Raises:
            BadArgumentError: a parameter is not one of the model's, or is in the optimizer twice.
        """
        taken: Counter[str] = Counter()
        seen: set[int] = set()
        found = []
        for number, group in enumerate(optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                if id(param) in seen:
                    raise BadArgumentError(f"{what} has parameter {position} of group {number} twice: give each only once")
                seen.add(id(param))
                leaves = self._leaves_of(param, f"{what}: parameter {position} of group {number}")
                names = []
                for key, leaf in leaves:
                    place = f"{key}#{taken[key]}" if taken[key] else key
                    taken[key] += 1
                    names.append(Name(key, leaf, place, layout_of(key, leaf, self._reader)))
                found.append(Slot(param, number, tuple(names), id(param) in self._main))
        return found

    def _leaves_of(self, param: Tensor, what: str) -> Sequence[tuple[str, ShardedParam]]:
        source, flat = self._main.get(id(param), param), None
        if isinstance(source, ShardedTensor | ShardedTensorFactory):
            return [(source.key, source)]
        if isinstance(source, tuple):
            source, flat = source
        leaves = self._by_object.get(id(source)) or self._by_place.get(place_in_memory(source))
        if not leaves:
            raise BadArgumentError(
                f"{what}, of shape {tuple(param.shape)}, is none of the {self.count} tensors of the model: expected the same "
                "object or memory. Give the state of the whole model, and for a copy of a parameter (fp32 main parameters, "
                "CPU offload) main_params={copy: parameter}."
            )
        # Tied ones: those that are the very object come with those that are the same memory.
        every = {(key, id(leaf)): (key, leaf) for key, leaf in (*leaves, *self._by_place.get(place_in_memory(source), ()))}
        return [(key, leaf if flat is None else _ranged(leaf, flat, what)) for key, leaf in every.values()]


def _ranged(leaf: ShardedParam, flat: slice, what: str) -> ShardedParam:
    """The sharded parameter, of which the optimizer's is a flat range."""
    if isinstance(leaf, ShardedTensor | ShardedTensorFactory) and leaf.flattened_range is None and leaf.data is not None:
        # Invariant: the last part of a replica id is the place among data-parallel ranks, which hold different ranges.
        replica = (*leaf.replica_id[:-1], 0) if isinstance(leaf.replica_id, tuple) else 0
        data = leaf.data.detach().reshape(-1)[flat]
        ranged: ShardedParam = replace(leaf, data=data, flattened_range=flat, replica_id=replica)
        return ranged
    raise BadArgumentError(
        f"{what} is a range of a {type(leaf).__name__}: expected a ShardedTensor that is not flat itself, or a factory"
    )


def check_one_owner(parts: Mapping[str, Sequence[Slot]]) -> None:
    """Raise `BadArgumentError` if two optimizers have the same parameter."""
    owner: dict[int, str] = {}
    for name, slots in parts.items():
        for slot in slots:
            other = owner.setdefault(id(slot.param), name)
            if other != name:
                raise BadArgumentError(
                    f"parameter {slot.names[0].key!r} is in two optimizers, {other!r} and {name!r}: give it to one of them"
                )


def stale_state(optimizer: Any, slots: Sequence[Slot]) -> list[torch.Tensor]:
    """Tensors for which an optimizer keeps state, although they are in none of its groups."""
    held = {id(slot.param) for slot in slots}
    return [key for key in optimizer.state if isinstance(key, torch.Tensor) and id(key) not in held]
