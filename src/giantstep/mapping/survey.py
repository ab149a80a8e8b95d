"""`survey`: all leaves of a state dict in one list, and the containers that lead to them, in a form that is quick to compare.

Training saves one state again and again, of which only values change. Lists of thousands of leaves are compared and asked
for their attributes by loops of the interpreter's own, at a fraction of what a call per leaf costs. Called by `describe`.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from giantstep.format.codec import MAX_DEPTH
from giantstep.mapping.tree import Tree, is_dict


@dataclass(frozen=True, slots=True)
class Survey:
    """A state dict as lists.

    Attributes:
        containers: for each, in the order of the walk, its class, its keys (of lists and tuples, how many items there are),
            the classes of its keys, and which of its items are containers again.
        leaves: in the order of `tree.map_leaves`.
        kinds: their classes.
    """

    containers: list[Hashable]
    leaves: list[Any]
    kinds: list[type]


def survey(tree: Tree) -> Survey | None:
    """The lists of a tree; None if it is nested too deeply, which `tree.map_leaves` reports."""
    containers: list[Hashable] = []
    leaves: list[Any] = []
    if not _walk(tree, containers, leaves, 0):
        return None
    return Survey(containers, leaves, list(map(type, leaves)))


def _walk(tree: Tree, containers: list[Hashable], leaves: list[Any], depth: int) -> bool:
    """Whether all of it could be walked."""
    keys: tuple[Hashable, ...]
    if isinstance(tree, dict):
        values, keys = list(tree.values()), tuple(tree)
        kinds = tuple(map(type, keys))
        # Keys of other classes may be equal without being the same: (1,) and (True,), 0.0 and -0.0.
        names: Hashable = (keys, kinds, () if _PLAIN_KEYS.issuperset(kinds) else tuple(map(repr, keys)))
    else:
        values, names = list(tree), len(tree)
    if depth + bool(values) > MAX_DEPTH:
        return False
    # Most containers hold leaves only, of few classes.
    if not any(issubclass(kind, _CONTAINERS) for kind in set(map(type, values))):
        containers.append((type(tree), names, ()))
        leaves += values
        return True
    inner = tuple(place for place, value in enumerate(values) if is_container(value))
    containers.append((type(tree), names, inner))
    start = 0
    for place in inner:
        leaves += values[start:place]
        if not _walk(values[place], containers, leaves, depth + 1):
            return False
        start = place + 1
    leaves += values[start:]
    return True


def is_container(tree: Tree) -> bool:
    """Whether `tree.map_leaves` walks into it."""
    return is_dict(tree) or type(tree) in (list, tuple)


_CONTAINERS = (dict, list, tuple)
_PLAIN_KEYS = frozenset({str, int, bool, bytes, type(None)})
