"""Nested state dicts: walking them, taking the tensors out, and putting values back.

Containers are dicts (subclasses count as dicts, `OrderedDict` stays one), lists and tuples; everything else is
a leaf. Only structure is handled here; what a leaf means is `describe`'s.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from giantstep.errors import BadArgumentError
from giantstep.format.codec import MAX_DEPTH, TensorSlot
from giantstep.shards.paths import Path, dotted

Tree = Any
LeafFunction = Callable[[Path, Any], Any]


def map_leaves(tree: Tree, function: LeafFunction, path: Path = ()) -> Tree:
    """The same structure with `function(path, leaf)` in place of every leaf. The given tree is not changed.

    Raises:
        BadArgumentError: nested more than 200 levels deep, or containing itself.
    """
    if len(path) > MAX_DEPTH:
        raise BadArgumentError(
            f"state dict is nested more than {MAX_DEPTH} levels deep (or contains itself) at {dotted(path)[:200]!r}"
        )
    if isinstance(tree, dict):
        mapped = ((key, map_leaves(value, function, (*path, key))) for key, value in tree.items())
        return OrderedDict(mapped) if isinstance(tree, OrderedDict) else dict(mapped)
    if type(tree) in (list, tuple):
        return type(tree)(map_leaves(value, function, (*path, position)) for position, value in enumerate(tree))
    return function(path, tree)


class _Dropped:
    """Marks a place from which a tensor was taken."""


DROPPED = _Dropped()


def prune(tree: Tree, path: Path = ()) -> Tree:
    """The tree without the leaves that are `DROPPED`, nor the containers that held nothing else.

    Dict entries disappear; in lists and tuples that hold something else too, a `TensorSlot` keeps the place.
    Containers that were empty to begin with stay. The result is `DROPPED` if nothing is left.
    """
    if isinstance(tree, dict):
        kept = {key: prune(value, (*path, key)) for key, value in tree.items()}
        kept = {key: value for key, value in kept.items() if value is not DROPPED}
        if tree and not kept:
            return DROPPED
        return OrderedDict(kept) if isinstance(tree, OrderedDict) else kept
    if type(tree) in (list, tuple):
        items = [prune(value, (*path, position)) for position, value in enumerate(tree)]
        if items and all(item is DROPPED for item in items):
            return DROPPED
        return type(tree)(
            TensorSlot(dotted((*path, position))) if item is DROPPED else item for position, item in enumerate(items)
        )
    return tree


def merge(loaded: Tree, common: Tree) -> Tree:
    """The stored common state with the loaded tensors in their places.

    What was stored comes back as it was stored, whatever the caller's state held there; of the caller's state only
    tensors and the containers that lead to them are added.

    Args:
        loaded: the caller's state with `DROPPED` in place of everything that is no tensor.
        common: the stored common state, with a `TensorSlot` where a list or tuple held a tensor.

    Returns:
        The merged state; `DROPPED` if there is neither.
    """
    if loaded is DROPPED:
        return common
    if common is DROPPED or isinstance(common, TensorSlot):
        return _only_tensors(loaded)
    if isinstance(loaded, dict) and isinstance(common, dict):
        merged = {key: merge(loaded.get(key, DROPPED), value) for key, value in common.items()}
        for key, value in loaded.items():
            if key not in common:
                found = _only_tensors(value)
                if found is not DROPPED:
                    merged[key] = found
        return OrderedDict(merged) if isinstance(common, OrderedDict) else merged
    if type(common) in (list, tuple) and type(loaded) is type(common):
        length = max(len(common), len(_without_tail(loaded)))
        values = (
            merge(loaded[n] if n < len(loaded) else DROPPED, common[n] if n < len(common) else DROPPED) for n in range(length)
        )
        return type(common)(None if value is DROPPED else value for value in values)
    return _only_tensors(loaded) if _holds_tensor(loaded) else common


def _holds_tensor(tree: Tree) -> bool:
    """Whether anything but `DROPPED` places and containers of them is in the tree."""
    if isinstance(tree, dict):
        return any(map(_holds_tensor, tree.values()))
    if type(tree) in (list, tuple):
        return any(map(_holds_tensor, tree))
    return tree is not DROPPED


def _only_tensors(tree: Tree) -> Tree:
    """The tree without `DROPPED` places; None in their stead in lists and tuples; `DROPPED` if nothing is left.

    Containers that are empty to begin with stay: a rank may hold no tensor where others do.
    """
    if isinstance(tree, dict | list | tuple) and not tree:
        return tree
    if isinstance(tree, dict):
        kept = {key: _only_tensors(value) for key, value in tree.items()}
        kept = {key: value for key, value in kept.items() if value is not DROPPED}
        if not kept:
            return DROPPED
        return OrderedDict(kept) if isinstance(tree, OrderedDict) else kept
    if type(tree) in (list, tuple):
        items = [_only_tensors(value) for value in tree]
        if all(item is DROPPED for item in items):
            return DROPPED
        return type(tree)(None if item is DROPPED else item for item in items)
    return tree


def _without_tail(items: list[Tree] | tuple[Tree, ...]) -> list[Tree]:
    """The items up to the last one that leads to a tensor."""
    kept = list(items)
    while kept and not _holds_tensor(kept[-1]):
        kept.pop()
    return kept
