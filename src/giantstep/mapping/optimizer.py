"""Optimizer state by the names of parameters: which sharded parameter each one is, and state tensors sharded like it.

The vocabulary is Megatron-Core's. A parameter is known by the object or the memory that it is, never by its number; its
name is the key of its sharded parameter. Called by `giantstep.optimizer`, which finds and restores whole states; not here:
param groups, and which state there is.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from giantstep.errors import BadArgumentError
from giantstep.mapping.factory import ShardedTensorFactory
from giantstep.mapping.sharded_object import SharedObject
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.mapping.tree import Tree, map_leaves
from giantstep.shards.paths import Path, dotted

ShardedParam = ShardedTensor | ShardedTensorFactory | DTensor | torch.Tensor
"""A parameter as a leaf of the model's state dict; a DTensor or plain tensor stands for itself, under its path."""


class ShardedParams(dict[int, ShardedParam]):
    """Parameter id -> sharded parameter.

    Attributes:
        keys_of: parameter id -> key of the sharded parameter, which DTensors and plain tensors do not carry.
    """

    def __init__(self) -> None:
        super().__init__()
        self.keys_of: dict[int, str] = {}


def sharded_params(model_state: Tree, path: Path = ()) -> list[tuple[str, ShardedParam]]:
    """Key and leaf of every tensor of a model's state, in order.

    Args:
        model_state: nested dicts and lists with `ShardedTensor`s, factories, DTensors, tensors and modules; or a module. Of a
            module these are its parameters and buffers, not copies. Other objects do not count, so it may be the whole state
            dict that is saved.
        path: where it stands, for the keys of leaves without a key of their own.
    """
    found: list[tuple[str, ShardedParam]] = []

    def note(where: Path, leaf: Any) -> None:
        if isinstance(leaf, ShardedTensor | ShardedTensorFactory):
            found.append((leaf.key, leaf))
        elif isinstance(leaf, torch.Tensor):
            found.append((dotted(where), leaf))
        elif isinstance(leaf, torch.nn.Module):
            found.extend(sharded_params(leaf.state_dict(keep_vars=True), where))

    map_leaves(model_state, note, path)
    return found


def data_of(param: ShardedParam) -> torch.Tensor | None:
    """The tensor that a sharded parameter describes: this rank's part of it, or a DTensor; None if it has none."""
    return param.data if isinstance(param, ShardedTensor | ShardedTensorFactory) else param


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def is_distributed(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    return isinstance(tensor, DTensor)


def without_grad(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without autograd; tensors that have none as they are, since wrapper tensors may not know `detach`."""
    return tensor.detach() if tensor.requires_grad or isinstance(tensor, torch.nn.Parameter) else tensor


def place_in_memory(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors that are the same elements of one storage, also where there are no elements, or no memory."""
    local = local_of(tensor)
    if local.layout != torch.strided:
        return id(tensor)
    try:
        storage = local.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        # Wrapper tensors have no storage of their own.
        return id(tensor)
    return storage, local.storage_offset(), local.numel(), local.dtype, local.is_contiguous() or local.stride()


def get_param_id_to_sharded_param_map(
    model_sharded_state_dict: Tree, optim_params_iter: Iterable[torch.Tensor]
) -> ShardedParams:
    """Which sharded parameter each of an optimizer's parameters is.

    Args:
        model_sharded_state_dict: see `sharded_params`.
        optim_params_iter: the optimizer's parameters in the order of its param groups, frozen ones too: a parameter's id is
            its place among them, that of the first if it is there several times.

    Returns:
        The sharded parameter by id; of tied ones, the first in the model's state dict. Parameters of which the state dict
        knows nothing have no entry.
    """
    by_object: dict[int, int] = {}
    by_place: dict[Hashable, int] = {}
    params = list(optim_params_iter)
    for number, param in enumerate(params):
        by_object.setdefault(id(param), number)
        by_place.setdefault(place_in_memory(param), number)
    found = ShardedParams()
    for key, leaf in sharded_params(model_sharded_state_dict):
        data = data_of(leaf)
        if data is None:
            continue
        known = by_object.get(id(data), by_place.get(place_in_memory(data)))
        if known is not None and known not in found:
            found[known], found.keys_of[known] = leaf, key
    return found


def make_sharded_optimizer_tensor(model_param: ShardedParam, optim_param: torch.Tensor, prefix: str) -> ShardedParam:
    """A tensor of the optimizer's, sharded like its parameter.

    Args:
        model_param: the sharded parameter: a regular or irregular grid, flat, a factory, a DTensor, a plain tensor.
        optim_param: shaped like the parameter's data (of a DTensor: like its local tensor, or a DTensor itself). Its dtype
            may be another, and its device.
        prefix: goes before the parameter's key; without effect on DTensors and plain tensors, which have no key but their
            path.

    Returns:
        A leaf for `save` and `load` that shares memory with `optim_param`.

    Raises:
        BadArgumentError: the shapes differ.
    """
    tensor = without_grad(optim_param)
    if isinstance(model_param, DTensor):
        return tensor if isinstance(tensor, DTensor) else distributed_like(model_param, tensor)
    tensor = local_of(tensor)
    if isinstance(model_param, ShardedTensorFactory):
        data = shaped_like(model_param.data, tensor, model_param.key)
        return replace(model_param, key=f"{prefix}.{model_param.key}", data=data)
    if isinstance(model_param, ShardedTensor):
        expected = model_param.data_shape()
        if tensor.shape != expected and not (tensor.numel() == _product(expected) and tensor.is_contiguous()):
            raise _unlike(model_param.key, expected, tensor)
        data = tensor if tensor.shape == expected else tensor.view(expected)
        return replace(model_param, key=f"{prefix}.{model_param.key}", data=data, dtype=tensor.dtype)
    return shaped_like(model_param, tensor, prefix)


def shaped_like(param: torch.Tensor, tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor, as a view of the parameter's shape; raises `BadArgumentError` where it has not as many elements."""
    if tensor.shape == param.shape:
        return tensor
    if tensor.numel() != param.numel() or not tensor.is_contiguous():
        raise _unlike(name, tuple(param.shape), tensor)
    return tensor.view(param.shape)


def distributed_like(param: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A DTensor distributed as another one, of which this is this rank's part; for a plain tensor the part as it is."""
    if not isinstance(param, DTensor):
        return local
    if local.shape != param._local_tensor.shape:
        raise _unlike("of a DTensor", tuple(param._local_tensor.shape), local)
    found: torch.Tensor = DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
    return found


def _unlike(name: str, expected: tuple[int, ...], found: torch.Tensor) -> BadArgumentError:
    return BadArgumentError(
        f"an optimizer tensor of parameter {name!r} has shape {tuple(found.shape)}, expected {expected}, that of the "
        "parameter's local data. Only tensors of this shape can be sharded like it; keep others out with exclude_keys."
    )


def _product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def optim_state_to_sharding_state(
    optim_state_dict: dict[str, Any], id_to_sharded_param_map: Mapping[int, ShardedParam], exclude_keys: Collection[str] = ()
) -> None:
    """Replace the tensors of an optimizer's state dict by sharded ones named by parameter, in place.

    A tensor of parameter `w` that is kept as `exp_avg` gets the key `optimizer.state.exp_avg.w`. Numbers and 0-d tensors,
    as `step`, become objects that all ranks with the parameter share, `optimizer.state.step.w`. DTensors and plain tensors
    have no key but their path: they move to `optim_state_dict["state"]["exp_avg"]["w"]`, to be saved under "optimizer".
    In each param group `params` become keys.

    Args:
        optim_state_dict: as `torch.optim.Optimizer.state_dict` gives it. Its `state` and `param_groups` are replaced.
        id_to_sharded_param_map: from `get_param_id_to_sharded_param_map`.
        exclude_keys: names of state that is left out.

    Raises:
        BadArgumentError: a parameter with state is not in the map, or a tensor has not the shape of its parameter.
    """
    names = getattr(id_to_sharded_param_map, "keys_of", {})

    def name_of(number: Any) -> Any:
        leaf = id_to_sharded_param_map.get(number)
        return names.get(number, getattr(leaf, "key", number))

    sharded: dict[Any, Any] = {}
    for number, state in optim_state_dict["state"].items():
        leaf = id_to_sharded_param_map.get(number)
        if leaf is None:
            raise BadArgumentError(
                f"optimizer state of parameter {number} has no sharded parameter: expected it in the map of "
                f"{len(id_to_sharded_param_map)}. Give get_param_id_to_sharded_param_map the state dict of the whole model."
            )
        for name, value in state.items():
            if name in exclude_keys:
                continue
            key = f"optimizer.state.{name}.{name_of(number)}"
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                sharded.setdefault(number, {})[name] = SharedObject(key, value, (), ())
                continue
            made = make_sharded_optimizer_tensor(leaf, value, f"optimizer.state.{name}")
            if isinstance(made, torch.Tensor):
                sharded.setdefault(name, {})[str(name_of(number))] = made
            else:
                sharded.setdefault(number, {})[name] = made
    groups = [
        {**group, "params": [name_of(number) for number in group["params"]]} for group in optim_state_dict["param_groups"]
    ]
    optim_state_dict["state"], optim_state_dict["param_groups"] = sharded, groups
