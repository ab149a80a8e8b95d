"""From the user's state dict to one whose leaves are all stored as they are.

Objects with a state dict, factories and wrapper tensors are replaced by what stands for them, and how they are
restored is noted.

Called by `describe`.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from giantstep.errors import BadArgumentError
from giantstep.mapping.factory import ShardedTensorFactory
from giantstep.mapping.module_state import module_state
from giantstep.mapping.placed import PlacedState, StoredNames
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.mapping.survey import Survey
from giantstep.mapping.tree import Tree, map_leaves
from giantstep.mapping.wrappers import OWN_VALUES, Parts, description_of, following, scalings, take_apart
from giantstep.shards.object_keys import wrapper_key
from giantstep.shards.paths import Path, dotted


@dataclass(frozen=True, slots=True)
class Joint:
    """A place where one value stands for a subtree.

    Attributes:
        path: the place.
        value: the Stateful object, the factory's data, or the wrapper tensor.
        merge: makes a value of the loaded subtree; None for a Stateful object, which is given the subtree.
    """

    path: Path
    value: Any
    merge: Callable[[Tree], Any] | None


@dataclass(slots=True)
class Expanded:
    """A state dict without Stateful objects, factories and wrapper tensors.

    Attributes:
        tree: the state dict with subtrees in their place.
        joints: of Stateful objects, factories and wrappers; inner ones before outer ones.
        wrappers: key and description of every wrapper tensor.
        stored: what objects that ask for it are told of the checkpoint; None if it is not open.
        for_load: whether they are to ask, and stand for nothing as long as it is not open.
        asks: whether there is any such object.
    """

    tree: Tree = None
    joints: list[Joint] = field(default_factory=list)
    wrappers: dict[str, dict[str, Any]] = field(default_factory=dict)
    stored: StoredNames | None = None
    for_load: bool = False
    asks: bool = False


def expand(state_dict: Tree, stored: StoredNames | None = None, *, for_load: bool = False) -> Expanded:
    """Replace what is stored as something else.

    Args:
        state_dict: of the caller.
        stored: the checkpoint that is to be loaded, once it is open.
        for_load: whether one is to be loaded.

    Raises:
        BadArgumentError: a wrapper tensor cannot be taken apart; names its path or key.
    """
    found = Expanded(stored=stored, for_load=for_load)
    found.tree = _expand(state_dict, (), found)
    return found


def _expand(tree: Tree, path: Path, found: Expanded) -> Tree:
    def replace(where: Path, leaf: Any) -> Any:
        kind = type(leaf)
        # Of most leaves it can be seen at once that nothing stands for them.
        if kind in _PLAIN or (kind in _AROUND and type(_AROUND[kind](leaf)) in _PLAIN):
            return leaf
        if isinstance(leaf, ShardedTensorFactory):
            leaf.validate()
            inner = _expand(leaf.build(), where, found)
            found.joints.append(Joint(where, leaf.data, leaf.merge))
            return inner
        wrapped = _wrapped(where, leaf)
        if wrapped is not None:
            _note_description(wrapped, found.wrappers)
            inner = _expand(wrapped.leaves, where, found)
            found.joints.append(Joint(where, wrapped.restore.wrapper, wrapped.restore))
            return inner
        is_stateful = callable(getattr(leaf, "state_dict", None)) and callable(getattr(leaf, "load_state_dict", None))
        is_stateful = is_stateful or isinstance(leaf, PlacedState)
        if not is_stateful or isinstance(leaf, torch.Tensor | type):
            return leaf
        inner = _expand(_state_of(leaf, where, found), where, found)
        found.joints.append(Joint(where, leaf, None))
        return inner

    return map_leaves(tree, replace, path)


def _state_of(leaf: Any, where: Path, found: Expanded) -> Tree:
    if isinstance(leaf, torch.nn.Module):
        state, asks = module_state(leaf, where, found.stored)
        found.asks |= asks
        return state
    if not isinstance(leaf, PlacedState):
        return leaf.state_dict()
    found.asks = True
    if found.stored is not None:
        return leaf.state_for_load(dotted(where), found.stored)
    return {} if found.for_load else leaf.state_at(dotted(where))


def stands_for_itself(found: Survey) -> bool:
    """Whether `expand` would change nothing, as far as can be seen at once."""
    kinds = set(found.kinds)
    for kind, inside in _AROUND.items():
        if kind in kinds:
            held = [leaf_kind is kind for leaf_kind in found.kinds]
            kinds |= set(map(type, map(inside, itertools.compress(found.leaves, held))))
    return kinds <= _PLAIN | _AROUND.keys()


_PLAIN = {*OWN_VALUES, bool, int, float, str, type(None)}
_AROUND: dict[type, Callable[[Any], Any]] = {
    DTensor: operator.attrgetter("_local_tensor"),
    ShardedTensor: operator.attrgetter("data"),
}


@dataclass(frozen=True, slots=True)
class _Wrapped:
    """A wrapper tensor as the leaves that stand for it."""

    key: str
    description: dict[str, Any]
    leaves: dict[str, Any]
    restore: _Restore


def _note_description(wrapped: _Wrapped, found: dict[str, dict[str, Any]]) -> None:
    """Several shards of one wrapper tensor have one description."""
    known = found.setdefault(wrapper_key(wrapped.key), wrapped.description)
    if known != wrapped.description:
        raise BadArgumentError(
            f"tensor {wrapped.key!r} is a wrapper tensor with different attributes in different shards: {known} and "
            f"{wrapped.description}. Give them different keys, or parts that hold what differs."
        )


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
        tensors = {name: _followed(part, leaf) for name, part in parts.tensors.items()}
        description = description_of(parts, tuple(leaf.shape), leaf.dtype)
        return _Wrapped(key, description, tensors, _Restore(leaf, tensors, parts.put_together))
    return None


def _followed(part: torch.Tensor, wrapper: torch.Tensor) -> torch.Tensor:
    """The part as it is stored for cut wrappers too, if that can be told from its shape."""
    try:
        return following(part, wrapper, "")
    except BadArgumentError:
        return part


def _sharded(tensor: ShardedTensor, data: torch.Tensor, parts: Parts) -> _Wrapped:
    if tensor.flattened_range is not None:
        raise BadArgumentError(f"tensor {tensor.key!r} is a wrapper tensor and flattened: save its parts instead")
    leaves: dict[str, Any] = {}
    given = {}
    # Of an empty shard's parts nothing is known: how long they would be is not to be seen.
    for name, held in parts.tensors.items() if data.numel() else ():
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
    for name, held in parts.tensors.items() if tensor._local_tensor.numel() else ():
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
        if not self.given:
            return self.wrapper
        if all(loaded[name] is part for name, part in self.given.items()) and self._shares_memory():
            return self.wrapper
        return self.put_together({name: loaded[name] for name in self.given})

    def _shares_memory(self) -> bool:
        """Whether filling the parts has filled the wrapper; not so if it was taken apart into copies."""
        if isinstance(self.wrapper, DTensor):
            return True
        again = take_apart(self.wrapper, "tensor")
        return again is not None and all(
            again.tensors[name].data_ptr() == part.data_ptr() for name, part in self.given.items() if not part.is_meta
        )
