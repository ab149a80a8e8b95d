"""The loaded state in the caller's structure: values put in their places, factories merged, Stateful objects loaded.

Called by `load` once all bytes are where they belong.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from giantstep.mapping.describe import Described
from giantstep.mapping.tree import DROPPED, Placed, Tree, map_leaves, merge, replace_at, unplaced
from giantstep.shards.paths import Path


def restore(described: Described, objects: Mapping[Path, Any], common: Tree) -> dict[Any, Any]:
    """The stored common state with everything else in its place.

    Args:
        described: the caller's state; its tensors are filled.
        objects: values of its sharded objects by path; those that were not loaded keep the local value.
        common: the stored common state.
    """
    places = {leaf.path: leaf.result for leaf in described.leaves}
    places |= {leaf.path: objects.get(leaf.path, leaf.source.data) for leaf in described.objects}
    places |= dict(described.locals)

    def place(path: Path, _leaf: Any) -> Any:
        return Placed(places[path]) if path in places else DROPPED

    merged = merge(map_leaves(described.tree, place), common)
    tree = {} if merged is DROPPED else unplaced(merged)
    for joint in described.joints:
        tree = replace_at(tree, joint.path, joint.merge)
    for path, stateful in described.statefuls:
        tree = replace_at(tree, path, partial(_load_into, stateful))
    result: dict[Any, Any] = tree
    return result


def _load_into(stateful: Any, state: Any) -> Any:
    if not isinstance(stateful, torch.nn.Module):
        stateful.load_state_dict(state)
        return stateful
    held = itertools.chain(stateful.parameters(), stateful.buffers())
    if not any(tensor.is_meta for tensor in held):
        stateful.load_state_dict(state)
        return stateful
    # A module without memory cannot copy into its parameters; it takes the loaded tensors as its own. A parameter
    # that several submodules share would become several.
    names: dict[int, list[str]] = {}
    for name, parameter in stateful.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    stateful.load_state_dict(state, assign=True)
    for first, *others in names.values():
        for name in others:
            owner, _, attribute = name.rpartition(".")
            setattr(stateful.get_submodule(owner), attribute, stateful.get_parameter(first))
    return stateful
