"""From the user's state dict to one whose leaves are all stored as they are.

Objects with a state dict, factories and wrapper tensors are replaced by what stands for them, and how they are
restored is noted.

Called by `describe`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from giantstep.errors import BadArgumentError
from giantstep.mapping.factory import ShardedTensorFactory
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.mapping.tree import Tree, map_leaves
from giantstep.mapping.wrappers import Parts, description_of, following, scalings, take_apart
from giantstep.shards.object_keys import wrapper_key
from giantstep.shards.paths import Path, dotted


@dataclass(frozen=True, slots=True)
class Joint:
    """A place where one value stands for a subtree: `merge` makes it of the loaded subtree."""

    path: Path
    merge: Callable[[Tree], Any]


@dataclass(slots=True)
class Expanded:
    """A state dict without Stateful objects, factories and wrapper tensors.

    Attributes:
        tree: the state dict with subtrees in their place.
        statefuls: (path, object) of the Stateful ones; inner ones before outer ones.
        joints: of factories and wrappers; inner ones before outer ones.
        wrappers: key and description of every wrapper tensor.
    """

    tree: Tree = None
    statefuls: list[tuple[Path, Any]] = field(default_factory=list)
    joints: list[Joint] = field(default_factory=list)
    wrappers: dict[str, dict[str, Any]] = field(default_factory=dict)


def expand(state_dict: Tree) -> Expanded:
    """Replace what is stored as something else.

    Raises:
        BadArgumentError: a wrapper tensor cannot be taken apart; names its path or key.
    """
    found = Expanded()
    found.tree = _expand(state_dict, (), found)
    return found


def _expand(tree: Tree, path: Path, found: Expanded) -> Tree:
    def replace(where: Path, leaf: Any) -> Any:
        if isinstance(leaf, ShardedTensorFactory):
            leaf.validate()
            inner = _expand(leaf.build(), where, found)
            found.joints.append(Joint(where, leaf.merge))
            return inner
        wrapped = _wrapped(where, leaf)
        if wrapped is not None:
            found.wrappers[wrapper_key(wrapped.key)] = wrapped.description
            inner = _expand(wrapped.leaves, where, found)
            found.joints.append(Joint(where, wrapped.restore))
            return inner
        is_stateful = callable(getattr(leaf, "state_dict", None)) and callable(getattr(leaf, "load_state_dict", None))
        if not is_stateful or isinstance(leaf, torch.Tensor | type):
            return leaf
        inner = _expand(leaf.state_dict(), where, found)
        found.statefuls.append((where, leaf))
        return inner

    return map_leaves(tree, replace, path)


@dataclass(frozen=True, slots=True)
class _Wrapped:
    """A wrapper tensor as the leaves that stand for it."""

    key: str
    description: dict[str, Any]
    leaves: dict[str, Any]
    restore: Callable[[Tree], Any]


def _wrapped(path: Path, leaf: Any) -> _Wrapped | None:
    if isinstance(leaf, ShardedTensor) and leaf.data is not None:
        parts = take_apart(leaf.data, f"tensor {leaf.key!r}")
        return None if parts is None else _sharded(leaf, leaf.data, parts)
    if isinstance(leaf, DTensor):
        parts = take_apart(leaf._local_tensor, f"tensor {dotted(path)!r}")
        return None if parts is None else _distributed(dotted(path), leaf, parts)
    if isinstance(leaf, torch.Tensor):
        key = dotted(path)
        parts = take_apart(leaf, f"tensor {key!r}")
        if parts is None:
            return None
        tensors = dict(parts.tensors)
        description = description_of(parts, tuple(leaf.shape), leaf.dtype)
        return _Wrapped(key, description, tensors, _Restore(leaf, tensors, parts.put_together))
    return None


def _sharded(tensor: ShardedTensor, data: torch.Tensor, parts: Parts) -> _Wrapped:
    if tensor.flattened_range is not None:
        raise BadArgumentError(f"tensor {tensor.key!r} is a wrapper tensor and flattened: save its parts instead")
    leaves: dict[str, Any] = {}
    given = {}
    for name, held in parts.tensors.items():
        what = f"part {name!r} of tensor {tensor.key!r}"
        part = given[name] = following(held, data, what)
        axes = scalings(part, tensor.local_shape)
        ahead = tensor.prepend_axis_num
        offset = [axis.of(start, what) for axis, start in zip(axes, tensor.global_offset[ahead:], strict=True)]
        shape = [axis.of(count, what) for axis, count in zip(axes, tensor.global_shape[ahead:], strict=True)]
        leaves[name] = ShardedTensor(
            f"{tensor.key}.{name}",
            part,
            part.dtype,
            tuple(part.shape),
            (*tensor.global_shape[:ahead], *shape),
            (*tensor.global_offset[:ahead], *offset),
            None,
            tensor.replica_id,
            ahead,
            tensor.allow_shape_mismatch,
        )
    description = description_of(parts, tensor.global_shape, tensor.dtype)
    return _Wrapped(tensor.key, description, leaves, _Restore(data, given, parts.put_together))


def _distributed(key: str, tensor: DTensor, parts: Parts) -> _Wrapped:
    leaves: dict[str, Any] = {}
    for name, held in parts.tensors.items():
        what = f"part {name!r} of tensor {key!r}"
        part = following(held, tensor._local_tensor, what)
        axes = scalings(part, tuple(tensor._local_tensor.shape))
        shape = [axis.of(count, what) for axis, count in zip(axes, tensor.shape, strict=True)]
        leaves[name] = DTensor.from_local(
            part,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )

    def put_together(loaded: Any) -> torch.Tensor:
        local = parts.put_together({name: part.to_local() for name, part in loaded.items()})
        return DTensor.from_local(
            local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    description = description_of(parts, tuple(tensor.shape), tensor.dtype)
    return _Wrapped(key, description, leaves, _Restore(tensor, leaves, put_together))


@dataclass(frozen=True, slots=True)
class _Restore:
    """The wrapper after loading: the given one if its parts were filled in place, else one of the new parts.

    Attributes:
        wrapper: the given tensor.
        given: its parts, as loading returns them where it fills them in place.
        put_together: makes a wrapper of other parts.
    """

    wrapper: torch.Tensor
    given: dict[str, Any]
    put_together: Callable[[Any], torch.Tensor]

    def __call__(self, loaded: Tree) -> Any:
        if not isinstance(loaded, dict) or any(loaded.get(name) is None for name in self.given):
            return self.wrapper
        if all(loaded[name] is part for name, part in self.given.items()):
            return self.wrapper
        return self.put_together({name: loaded[name] for name in self.given})
