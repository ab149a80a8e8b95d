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


_ABSENT = object()


def merge(given: Tree, common: Tree) -> Tree:
    """`given` with the values of `common` laid over it.

    A stored value replaces whatever stands at its place; a `TensorSlot` leaves what is given there; what only
    one side has is kept.
    """
    if isinstance(common, TensorSlot):
        return common if given is _ABSENT else given
    if isinstance(given, dict) and isinstance(common, dict):
        merged = {key: merge(value, common[key]) if key in common else value for key, value in given.items()}
        merged.update({key: value for key, value in common.items() if key not in given})
        return OrderedDict(merged) if isinstance(common, OrderedDict) else merged
    if type(common) in (list, tuple) and type(given) is type(common):
        values = [merge(given[position] if position < len(given) else _ABSENT, item) for position, item in enumerate(common)]
        return type(common)([*values, *given[len(common) :]])
    return common
