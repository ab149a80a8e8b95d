"""How each piece of a parameter's state depends on the parameter's layout, and the leaf that stands for it.

| kind | is | can be cut anew |
|---|---|---|
| `elements` | a tensor shaped like the parameter | always |
| `statistic` | a tensor that lacks one axis of the parameter, or has size 1 there | if that axis is whole |
| `distributed` | a DTensor of another shape | always: it says itself how it is cut |
| `shard` | any other tensor, or one said to be so: it belongs to the shard of the parameter that the rank holds | no |
| `shard object` | a value with tensors in it | no |
| `value` | `step` and other numbers, strings, small tensors | it is the same for all of the parameter |

Called by `records` and `requests`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from giantstep.mapping.optimizer import is_distributed, local_of, make_sharded_optimizer_tensor, without_grad
from giantstep.mapping.param_layout import reduced, reduced_shape
from giantstep.mapping.sharded_object import SharedObject
from giantstep.mapping.tree import flatten
from giantstep.optimizer.slots import Name

Kind = tuple[Any, ...]
"""The name of a kind; of a statistic also its axis, and whether it keeps it."""

ELEMENTS: Kind = ("elements",)
DISTRIBUTED: Kind = ("distributed",)
SHARD: Kind = ("shard",)
SHARD_OBJECT: Kind = ("shard object",)
VALUE: Kind = ("value",)
_EXACT = 1 << 53
MAIN_PARAM = "fp32_param"
"""Under this name the copy of a parameter is stored that an optimizer updates, as in Megatron-Core."""


def statistic(axis: int, *, keeps_axis: bool) -> Kind:
    """The kind of a statistic over one axis."""
    return "statistic", axis, keeps_axis


def checked_kind(stored: Any) -> Kind | None:
    """A kind as a record has it; None if there is no such."""
    if not isinstance(stored, list):
        return None
    kind = tuple(stored)
    if kind[:1] == ("statistic",):
        fits = len(kind) == 3 and type(kind[1]) is int and kind[1] < 0 and isinstance(kind[2], bool)
        return kind if fits else None
    return kind if kind in (ELEMENTS, DISTRIBUTED, SHARD, SHARD_OBJECT) else None


def kind_of(
    name: str, value: Any, param: Tensor, statistics: Mapping[str, tuple[int, bool]], of_shards: Collection[str] = ()
) -> Kind:
    """The kind of a piece of state of an optimizer's parameter; for `statistics` and `of_shards` see `OptimizerOptions`."""
    if not isinstance(value, Tensor):
        inside = [item for item in flatten({"": value}).values() if isinstance(item, Tensor) and item.numel() != 1]
        return SHARD_OBJECT if inside else VALUE
    if name == "step":
        return VALUE
    shapes = [tuple(param.shape), tuple(local_of(param).shape)]
    shape = tuple(value.shape)
    if name in statistics and not is_distributed(value):
        axis, keeps = statistics[name]
        if shape == reduced_shape(shapes[1], axis, keeps_axis=keeps):
            return statistic(axis, keeps_axis=keeps)
    told = name in of_shards and not is_distributed(value)
    if not told and shape == shapes[0 if is_distributed(value) else 1]:
        return ELEMENTS
    if not told and value.numel() == 1:
        return VALUE
    return DISTRIBUTED if is_distributed(value) else SHARD


def leaf_of(kind: Kind, value: Any, name: Name, prefix: str) -> tuple[str, Any]:
    """Where the leaf of a piece of state stands among those of its name, and the leaf.

    Args:
        kind: of the state; not VALUE.
        value: the tensor or object. Leaves share its memory.
        name: the parameter.
        prefix: of the key.
    """
    key = name.key + name.layout.cut
    if kind == ELEMENTS:
        return name.place, make_sharded_optimizer_tensor(name.leaf, value, prefix)
    if kind == DISTRIBUTED:
        return name.key, without_grad(value)
    if kind == SHARD_OBJECT:
        return key, SharedObject(f"{prefix}.{key}", value, (), ())
    if kind[0] == "statistic":
        sharded = reduced(name.leaf, without_grad(value), kind[1], prefix, keeps_axis=kind[2])
        if sharded is not None:
            return name.place, sharded
    return key, without_grad(value)


def stored_name(kind: Kind, name: Name, prefix: str, sample: Any) -> str:
    """The key under which a piece of state is stored; `sample` is the leaf that `leaf_of` gives."""
    whole = kind in (ELEMENTS, DISTRIBUTED)
    return str(getattr(sample, "key", f"{prefix}.{name.key}{'' if whole else name.layout.cut}"))


def takes(place: Tensor, value: Any) -> bool:
    """Whether a tensor can take over a stored value: one of its shape and dtype, or a number that it can hold."""
    if isinstance(value, Tensor):
        return value.dtype == place.dtype and value.shape == place.shape
    if place.numel() != 1 or not isinstance(value, bool | int | float):
        return False
    if isinstance(value, float):
        return place.is_floating_point() or place.is_complex()
    return abs(value) < _EXACT and torch.full((), value, dtype=place.dtype).item() == value


def on_host(values: list[dict[str, Any]]) -> None:
    """Replace tensors of single values on other devices by ones on the CPU, in one transfer per dtype and device."""
    far: dict[tuple[torch.device, torch.dtype], list[tuple[dict[str, Any], str]]] = {}
    for held in values:
        for name, value in held.items():
            if isinstance(value, Tensor):
                held[name] = without_grad(local_of(value))
                if value.device.type != "cpu" and value.numel() == 1:
                    far.setdefault((value.device, value.dtype), []).append((held, name))
    for places in far.values():
        together = torch.stack([held[name].reshape(()) for held, name in places]).cpu()
        for (held, name), value in zip(places, together, strict=True):
            held[name] = value.reshape(held[name].shape)
