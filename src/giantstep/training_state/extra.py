"""Extra states of modules (`get_extra_state`), such as those of 8-bit training: per position, present or missing by rule.

Not here: 8-bit tensors themselves, which are tensors like others, or wrappers (`register_wrapper`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch

from giantstep.errors import BadArgumentError
from giantstep.mapping.replica import ReplicaId
from giantstep.mapping.tree import Tree, map_leaves
from giantstep.shards.paths import Path
from giantstep.training_state.ranked import Position, RankedState, Reshard

_SUFFIX = "_extra_state"

OnReshard = Literal["raise", "drop", "first"]


class ExtraState(RankedState):
    """One extra state; made by `extra_states`.

    Attributes:
        value: as it was given, or loaded.
    """

    def __init__(self, value: Any, **settings: Any) -> None:
        self.value = value
        super().__init__(lambda: self.value, self._take, **settings)

    def _take(self, value: Any) -> None:
        if not isinstance(value, _Dropped):
            self.value = value


class _Dropped:
    """What is stored is not used."""


def extra_states(
    state: Tree,
    *,
    grid: int | Position | None = None,
    position: int | Position | None = None,
    replica_id: ReplicaId = 0,
    on_reshard: OnReshard | Reshard = "raise",
    on_missing: Literal["strict", "keep"] = "keep",
) -> Tree:
    """A module's state dict whose extra states are saved per position, and loaded by rule.

    Args:
        state: nested dicts and lists. Values under keys that end in `_extra_state` are replaced; everything else is the same.
        grid, position, replica_id: see `RankedState`: mostly of tensor-parallel ranks. Several ranks that have the same
            position are told apart by `replica_id`.
        on_reshard: when the checkpoint has another grid: `raise`; `drop` what is stored and keep what there is; `first`: all
            take what the first position has; or a function, such as `largest`.
        on_missing: what the checkpoint does not have is kept as it is here, without an error; or as `load(strict=)` says.
            What it has and the model has not is the policy's of `load`, under the key's own name.

    Returns:
        A state dict for `save` and `load`; give what is loaded to `plain_extra_states` for `load_state_dict` of the module.
    """
    policies: dict[Any, Any] = {"drop": _drop, "first": _first}
    if isinstance(on_reshard, str) and on_reshard not in ("raise", *policies):
        raise BadArgumentError(f"on_reshard must be 'raise', 'drop', 'first' or a function, not {on_reshard!r}")

    def replaced(path: Path, leaf: Any) -> Any:
        if not path or not str(path[-1]).endswith(_SUFFIX) or isinstance(leaf, ExtraState):
            return leaf
        return ExtraState(
            leaf,
            grid=grid,
            position=position,
            replica_id=replica_id,
            on_reshard=policies.get(on_reshard, on_reshard),
            on_missing=on_missing,
        )

    return _map_at_extra(state, replaced, ())


def _map_at_extra(tree: Tree, function: Any, path: Path) -> Tree:
    """As `map_leaves`, but what an extra state is made of is not looked into."""
    if path and str(path[-1]).endswith(_SUFFIX):
        return function(path, tree)
    if isinstance(tree, dict):
        mapped = copy.copy(tree)
        for key, value in tree.items():
            mapped[key] = _map_at_extra(value, function, (*path, key))
        return mapped
    if isinstance(tree, list):
        return [_map_at_extra(value, function, (*path, number)) for number, value in enumerate(tree)]
    return tree


def plain_extra_states(state: Tree) -> Tree:
    """The inverse of `extra_states`: with the values themselves."""
    return map_leaves(state, lambda _, leaf: leaf.value if isinstance(leaf, ExtraState) else leaf, ())


def _drop(_stored: Mapping[Position, Any], _grid: Position, _position: Position) -> Any:
    return _Dropped()


def _first(stored: Mapping[Position, Any], _grid: Position, _position: Position) -> Any:
    return next(iter(stored.values()))


def largest(stored: Mapping[Position, Any], grid: Position, position: Position) -> Any:
    """A policy: of tensors and numbers in equal places of the stored values the largest, element by element.

    For histories of largest absolute values (amax) and what is made of them, of which each rank has that of its own part.

    Raises:
        BadArgumentError: the stored values are not made alike, or hold something else that differs.
    """
    del grid, position
    return _largest(list(stored.values()), ())


def _largest(values: list[Any], path: Path) -> Any:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise _unlike(path)
    if isinstance(first, torch.Tensor):
        if any(value.shape != first.shape or value.dtype != first.dtype for value in values):
            raise _unlike(path)
        return torch.stack(values).amax(0)
    if isinstance(first, dict):
        if any(value.keys() != first.keys() for value in values):
            raise _unlike(path)
        return {key: _largest([value[key] for value in values], (*path, key)) for key in first}
    if isinstance(first, list | tuple):
        if any(len(value) != len(first) for value in values):
            raise _unlike(path)
        return type(first)(_largest(list(column), (*path, row)) for row, column in enumerate(zip(*values, strict=True)))
    if isinstance(first, int | float):
        return max(values)
    if any(value != first for value in values):
        raise _unlike(path)
    return first


def _unlike(path: Path) -> BadArgumentError:
    return BadArgumentError(
        f"the stored values differ in kind at {'.'.join(map(str, path)) or 'their top'}, so there is no largest one: give "
        "on_reshard a function of your own, 'first' or 'drop'"
    )
