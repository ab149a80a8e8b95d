"""Nested state dicts: walking them, taking leaves out, putting values back, comparing two.

Containers are dicts (subclasses count as dicts, `OrderedDict` stays one, `Counter` is a leaf), lists and tuples; everything
else is a leaf. Only structure is handled here; what a leaf means is `describe`'s.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from giantstep.errors import BadArgumentError
from giantstep.format.codec import MAX_DEPTH, TensorSlot
from giantstep.shards.paths import Path, dotted

Tree = Any
LeafFunction = Callable[[Path, Any], Any]


# What may be walked into; everything else is a leaf at first sight.
_CONTAINERS = (dict, list, tuple)
_WHOLE: set[type] = {Counter}


def keep_whole(cls: type) -> None:
    """Let values of exactly this class be leaves, although they are dicts: it is stored as what it is."""
    _WHOLE.add(cls)


def is_dict(tree: Tree) -> bool:
    """Whether a tree is a dict, to be walked into."""
    return isinstance(tree, dict) and type(tree) not in _WHOLE


def map_leaves(tree: Tree, function: LeafFunction, path: Path = ()) -> Tree:
    """The same structure with `function(path, leaf)` in place of every leaf. The given tree is not changed.

    Raises:
        BadArgumentError: nested more than 200 levels deep, or containing itself.
    """
    _check_depth(path)
    if is_dict(tree):
        if tree:
            _check_depth((*path, next(iter(tree))))
        mapped = {}
        for key, value in tree.items():
            where = (*path, key)
            # Most values are leaves: of these a call less each.
            mapped[key] = map_leaves(value, function, where) if isinstance(value, _CONTAINERS) else function(where, value)
        return OrderedDict(mapped) if isinstance(tree, OrderedDict) else mapped
    if type(tree) in (list, tuple):
        return type(tree)([map_leaves(value, function, (*path, position)) for position, value in enumerate(tree)])
    return function(path, tree)


def map_known(tree: Tree, known: Mapping[int, Any], function: LeafFunction, path: Path = ()) -> Tree:
    """`map_leaves` where `known` says of most leaves, by identity, what takes their places; `function` is asked of others.

    Args:
        tree: was walked before, so it is not nested too deeply.
        known: of no container.
        function: as for `map_leaves`.
        path: where the tree stands.
    """
    if is_dict(tree):
        mapped = {
            key: map_known(value, known, function, (*path, key))
            if (found := known.get(id(value), DROPPED)) is DROPPED
            else found
            for key, value in tree.items()
        }
        return OrderedDict(mapped) if isinstance(tree, OrderedDict) else mapped
    if type(tree) in (list, tuple):
        items = [
            map_known(value, known, function, (*path, place)) if (found := known.get(id(value), DROPPED)) is DROPPED else found
            for place, value in enumerate(tree)
        ]
        return type(tree)(items)
    return function(path, tree)


def _check_depth(path: Path) -> None:
    if len(path) > MAX_DEPTH:
        raise BadArgumentError(
            f"state dict is nested more than {MAX_DEPTH} levels deep (or contains itself) at {dotted(path)[:200]!r}"
        )


def flatten(tree: Tree) -> dict[Path, Any]:
    """All leaves by path, in order. Containers without leaves leave no trace."""
    found: dict[Path, Any] = {}
    map_leaves(tree, found.setdefault)
    return found


def replace_at(tree: Tree, path: Path, function: Callable[[Tree], Any]) -> Tree:
    """The tree with `function(subtree)` at a path. Dicts on the way are changed in place, lists and tuples rebuilt.

    Where the path does not exist it is made, and the subtree is an empty dict.
    """
    if not path:
        return function(tree)
    step, rest = path[0], path[1:]
    if is_dict(tree):
        tree[step] = replace_at(tree.get(step, {}), rest, function)
        return tree
    if type(tree) in (list, tuple) and isinstance(step, int):
        items = list(tree) + [{}] * (step + 1 - len(tree))
        items[step] = replace_at(items[step], rest, function)
        return type(tree)(items)
    return replace_at({}, path, function)


@dataclass(frozen=True, slots=True)
class TreeDifference:
    """Paths of leaves that two trees do not share.

    Attributes:
        only_left, only_right: leaves that the other has not.
        mismatched: leaves that both have, with different values.
    """

    only_left: tuple[Path, ...]
    only_right: tuple[Path, ...]
    mismatched: tuple[Path, ...]

    def __bool__(self) -> bool:
        return bool(self.only_left or self.only_right or self.mismatched)


def diff(left: Tree, right: Tree, equal: Callable[[Any, Any], bool]) -> TreeDifference:
    """Compare two trees leaf by leaf with `equal`; the order of keys and empty containers do not count."""
    a, b = flatten(left), flatten(right)
    return TreeDifference(
        tuple(path for path in a if path not in b),
        tuple(path for path in b if path not in a),
        tuple(path for path in a if path in b and not equal(a[path], b[path])),
    )


@dataclass(slots=True)
class Placed:
    """A value on its way back into a tree: a leaf, even if it is a container itself."""

    value: Any


def unplaced(tree: Tree) -> Tree:
    """The tree with the values of `Placed` leaves."""
    return map_leaves(tree, lambda _, leaf: leaf.value if isinstance(leaf, Placed) else leaf)


class _Dropped:
    """Marks a place from which a leaf was taken."""


DROPPED = _Dropped()
_NO_LEAVES = (*_CONTAINERS, _Dropped)


def prune(tree: Tree, path: Path = ()) -> Tree:
    """The tree without the leaves that are `DROPPED`, nor the containers that held nothing else.

    Dict entries disappear; in lists and tuples that hold something else too, a `TensorSlot` keeps the place.
    Containers that were empty to begin with stay. The result is `DROPPED` if nothing is left.
    """
    if is_dict(tree):
        # Most values were taken: they are left out without a call.
        pruned = {key: prune(value, (*path, key)) for key, value in tree.items() if value is not DROPPED}
        kept = {key: value for key, value in pruned.items() if value is not DROPPED}
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
    """The stored common state with the loaded tensors and objects in their places.

    What was stored comes back as it was stored, whatever the caller's state held there; of the caller's state only
    `Placed` leaves and the containers that lead to them are added.

    Args:
        loaded: the caller's state with `Placed` leaves, and `DROPPED` in place of all others.
        common: the stored common state, with a `TensorSlot` where a list or tuple held a tensor.

    Returns:
        The merged state; `DROPPED` if there is neither.
    """
    if loaded is DROPPED:
        return common
    if common is DROPPED or isinstance(common, TensorSlot):
        return _only_leaves(loaded)
    if is_dict(loaded) and is_dict(common):
        merged = {key: merge(loaded.get(key, DROPPED), value) for key, value in common.items()}
        rest = {key: value for key, value in loaded.items() if key not in common}
        if rest and (found := _only_leaves(rest)) is not DROPPED:
            merged |= found
        return OrderedDict(merged) if isinstance(common, OrderedDict) else merged
    if type(common) in (list, tuple) and type(loaded) in (list, tuple):
        length = max(len(common), len(_without_tail(loaded)))
        values = (
            merge(loaded[n] if n < len(loaded) else DROPPED, common[n] if n < len(common) else DROPPED) for n in range(length)
        )
        return type(common)(None if value is DROPPED else value for value in values)
    return _only_leaves(loaded) if _holds_leaf(loaded) else common


def _holds_leaf(tree: Tree) -> bool:
    """Whether anything but `DROPPED` places and containers of them is in the tree."""
    if is_dict(tree):
        return any(map(_holds_leaf, tree.values()))
    if type(tree) in (list, tuple):
        return any(map(_holds_leaf, tree))
    return tree is not DROPPED


def _holds_leaves_alone(tree: Tree) -> bool:
    """Whether a tree is a dict of nothing but leaves: there may be thousands, which are not looked at one by one."""
    return type(tree) is dict and not any(issubclass(kind, _NO_LEAVES) for kind in set(map(type, tree.values())))


def _only_leaves(tree: Tree) -> Tree:
    """The tree without `DROPPED` places; None in their stead in lists and tuples; `DROPPED` if nothing is left.

    Containers that are empty to begin with stay: a rank may hold no tensor where others do.
    """
    if isinstance(tree, _CONTAINERS) and (not tree or _holds_leaves_alone(tree)):
        return tree
    if is_dict(tree):
        kept = {
            key: found
            for key, value in tree.items()
            if (found := _only_leaves(value) if isinstance(value, _CONTAINERS) else value) is not DROPPED
        }
        if not kept:
            return DROPPED
        return OrderedDict(kept) if isinstance(tree, OrderedDict) else kept
    if type(tree) in (list, tuple):
        items = [_only_leaves(value) for value in tree]
        if all(item is DROPPED for item in items):
            return DROPPED
        return type(tree)(None if item is DROPPED else item for item in items)
    return tree


def _without_tail(items: list[Tree] | tuple[Tree, ...]) -> list[Tree]:
    """The items up to the last one that leads to a tensor."""
    kept = list(items)
    while kept and not _holds_leaf(kept[-1]):
        kept.pop()
    return kept
