"""Helpers over nested state dicts."""

from __future__ import annotations

import operator
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from giantstep.errors import BadArgumentError
from giantstep.mapping.tree import (
    DROPPED,
    Placed,
    TreeDifference,
    diff,
    flatten,
    map_known,
    map_leaves,
    merge,
    prune,
    replace_at,
    unplaced,
)
from giantstep.shards.paths import dotted

keys = st.one_of(st.text(max_size=3), st.integers(-3, 3), st.booleans(), st.none())
trees = st.recursive(
    st.integers(),
    lambda inner: st.one_of(
        st.dictionaries(keys, inner, max_size=4),
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=20,
)


def without_empty(tree: Any) -> Any:
    """A tree in which every container leads to a leaf; None if there is none."""
    if isinstance(tree, dict):
        kept = {key: found for key, value in tree.items() if (found := without_empty(value)) is not None}
        return (OrderedDict(kept) if isinstance(tree, OrderedDict) else kept) if kept else None
    if isinstance(tree, list | tuple):
        items = [found for value in tree if (found := without_empty(value)) is not None]
        return type(tree)(items) if items else None
    return tree


@given(trees)
def test_mapping_keeps_structure_and_types(tree: Any) -> None:
    copy = map_leaves(tree, lambda _, leaf: leaf)
    assert repr(copy) == repr(tree)
    doubled = flatten(map_leaves(tree, lambda _, leaf: leaf * 2))
    assert doubled == {path: leaf * 2 for path, leaf in flatten(tree).items()}


@given(trees)
def test_paths_lead_to_their_leaves(tree: Any) -> None:
    for path, leaf in flatten(tree).items():
        place = tree
        for step in path:
            place = place[step]
        assert place == leaf


@given(trees.map(without_empty).filter(lambda tree: isinstance(tree, dict)))
def test_a_tree_is_rebuilt_from_its_leaves_by_merging(tree: Any) -> None:
    """Split leaf by leaf into two parts, pruned and placed as save and load do, a tree comes back whole."""
    mine = set(list(flatten(tree))[::2])
    stored = prune(map_leaves(tree, lambda path, leaf: DROPPED if path in mine else leaf))
    placed = map_leaves(tree, lambda path, leaf: Placed(leaf) if path in mine else DROPPED)
    # Stored keys come before others.
    assert flatten(unplaced(merge(placed, stored))) == flatten(tree)


def test_placed_values_are_leaves_whatever_they_are() -> None:
    placed = {"a": Placed({"x": [1]}), "b": [Placed((DROPPED,))]}
    assert unplaced(merge(placed, {"a": {"y": 2}, "b": [5]})) == {"a": {"x": [1]}, "b": [(DROPPED,)]}


def test_replacing_a_subtree() -> None:
    tree = {"a": [1, (2, {"b": 3})], "c": 4}
    replaced = replace_at(tree, ("a", 1, 1), lambda subtree: ("new", subtree))
    assert replaced == {"a": [1, (2, ("new", {"b": 3}))], "c": 4}
    assert replace_at({}, ("x", "y"), lambda subtree: subtree) == {"x": {"y": {}}}
    assert replace_at([1], (2,), lambda _: 5) == [1, {}, 5]
    assert replace_at(3, (), lambda leaf: leaf + 1) == 4
    assert replace_at({"a": 5}, ("a", "b"), lambda _: 6) == {"a": {"b": 6}}


def test_differences_are_paths() -> None:
    left = {"a": 1, "b": {"c": [1, 2], "d": 0}, "e": {}}
    right = {"b": {"c": [1, 3, 4], "f": 0}, "a": 1}
    found = diff(left, right, operator.eq)
    assert found == TreeDifference((("b", "d"),), (("b", "c", 2), ("b", "f")), (("b", "c", 1),))
    assert found
    assert not diff(left, {"b": {"d": 0, "c": (1, 2)}, "a": 1}, operator.eq)


def test_a_tree_that_contains_itself_is_refused() -> None:
    tree: dict[str, Any] = {}
    tree["again"] = [tree]
    with pytest.raises(BadArgumentError, match="contains itself"):
        flatten(tree)


@settings(deadline=None)
@given(trees.filter(lambda tree: isinstance(tree, dict | list | tuple)))
def test_leaves_whose_values_are_known_are_not_asked_for(tree: Any) -> None:
    class Leaf:
        """Has an identity of its own."""

    leaves = map_leaves(tree, lambda path, leaf: Leaf())
    every = flatten(leaves)
    known = {path: f"value of {dotted(path)}" for path in list(every)[::2]}
    mapped = map_known(leaves, {id(every[path]): value for path, value in known.items()}, lambda path, leaf: path)
    flat = {path: _at(mapped, path) for path in every}
    assert flat == {path: known.get(path, path) for path in every}


def _at(tree: Any, path: Any) -> Any:
    for step in path:
        tree = tree[step]
    return tree
