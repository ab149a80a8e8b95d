"""The loaded state in the caller's structure: values put in their places, factories merged, Stateful objects loaded.

Called by `load` once all bytes are where they belong.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch

from giantstep.errors import MismatchError
from giantstep.mapping.describe import Described
from giantstep.mapping.expand import Joint
from giantstep.mapping.overlap import memory_of
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.mapping.torch_sharded import is_torch_sharded
from giantstep.mapping.tree import DROPPED, Placed, Tree, map_known, merge, replace_at, unplaced
from giantstep.shards.paths import Path
from giantstep.words import words_of


def restore(described: Described, objects: Mapping[Path, Any], common: Tree, absent: Iterable[Path]) -> dict[Any, Any]:
    """The stored common state with everything else in its place.

    Args:
        described: the caller's state; its tensors are filled.
        objects: values of its sharded objects by path; those that were not loaded keep the local value.
        common: the stored common state.
        absent: places of Stateful objects of which nothing is stored; they are left as they are.

    Raises:
        MismatchError: parameters that a module ties have different stored values.
    """
    values = {leaf.path: objects.get(leaf.path, leaf.source.data) for leaf in described.objects} | dict(described.locals)
    merged = merge(_with_results(described, values), common)
    tree = {} if merged is DROPPED else unplaced(merged) if values else merged
    hollow = [path for path, found in _results(described).items() if _is_hollow(found)] if described.joints else []
    left = set(absent)
    for joint in described.joints:
        tree = replace_at(tree, joint.path, partial(_joined, joint, hollow, joint.path in left))
    result: dict[Any, Any] = tree
    return result


def _results(described: Described) -> dict[Path, torch.Tensor | None]:
    """By path, what stands in the place of each tensor after loading."""
    return {leaf.path: leaf.result for leaf in described.leaves}


def _is_hollow(found: torch.Tensor | None) -> bool:
    return found is None or (not is_torch_sharded(type(found)) and found.is_meta)


def _with_results(described: Described, values: Mapping[Path, Any]) -> Tree:
    """The caller's tree with loaded tensors and `values` in their places, and `DROPPED` in all others."""
    # A leaf that got memory has another source than what stands in the caller's tree.
    known = {id(source): source for source in [leaf.source for leaf in described.leaves]}
    if any(issubclass(kind, ShardedTensor) for kind in set(map(type, known.values()))):
        known = {number: source.data if isinstance(source, ShardedTensor) else source for number, source in known.items()}
    results: dict[Path, torch.Tensor | None] = {}

    def place(path: Path, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor | ShardedTensor):
            return Placed(values[path]) if path in values else DROPPED
        if not results:
            results.update(_results(described))
        return results[path]

    return map_known(described.tree, known, place)


def _joined(joint: Joint, hollow: list[Path], absent: bool, loaded: Tree) -> Any:
    """The value of a joint."""
    if joint.merge is None:
        if not absent:
            _load_into(joint.value, loaded)
        return joint.value
    # What was not loaded and has no memory cannot be merged.
    if any(path[: len(joint.path)] == joint.path for path in hollow):
        return joint.value
    return joint.merge(loaded)


def _load_into(stateful: Any, state: Any) -> None:
    if isinstance(stateful, torch.nn.Module) and isinstance(state, dict):
        held = itertools.chain(stateful.parameters(), stateful.buffers())
        if any(tensor.is_meta for tensor in held):
            _give_memory(stateful, state)
    stateful.load_state_dict(state)


def _give_memory(module: torch.nn.Module, state: dict[str, Any]) -> None:
    """Make loaded tensors the parameters and buffers of a module that have no memory, tied as the module ties them.

    Those that have memory stay the objects that they are.
    """
    names: dict[int, list[str]] = {}
    meta: dict[int, torch.Tensor] = {}
    named = itertools.chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        if tensor.is_meta:
            names.setdefault(id(tensor), []).append(name)
            meta[id(tensor)] = tensor
    taken = set()
    for identity, tied in names.items():
        found = [state[name] for name in tied if isinstance(state.get(name), torch.Tensor)]
        if not found or found[0].is_meta:
            continue
        for other in found[1:]:
            if memory_of(other) != memory_of(found[0]) and not torch.equal(words_of(other), words_of(found[0])):
                raise MismatchError(
                    f"parameters {', '.join(map(repr, tied))} are one tensor in the module, but other values are stored for "
                    "each. Untie them before loading; this state must not be used."
                )
        # Tensors that are stored as one but are two in the module must not become one.
        value = found[0].clone() if memory_of(found[0]) in taken else found[0]
        taken.add(memory_of(value))
        old = meta[identity]
        new = torch.nn.Parameter(value, old.requires_grad) if isinstance(old, torch.nn.Parameter) else value
        vars(new).update(vars(old))
        for name in tied:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, new)
