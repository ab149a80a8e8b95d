"""Where a parameter's local data lie in its global tensor, as far as state that is not shaped like it depends on it.

Called by `giantstep.optimizer`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, empty

from giantstep.mapping.dtensor import DTensorReader
from giantstep.mapping.factory import ShardedTensorFactory
from giantstep.mapping.optimizer import ShardedParam
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.mapping.tree import flatten
from giantstep.shards.region import Region


@dataclass(frozen=True, slots=True)
class ParamLayout:
    """What one rank holds of a parameter.

    Attributes:
        grid, position: of layers or experts that are stacked under one key by prepended axes: how many, and which this is.
        box: the region that holds the local data; of a factory, its prepended axes only.
        shape: of the global tensor; of a factory, of the prepended axes.
        cut: names the part that the rank holds, as "[0:4,0:8]"; empty if it is the whole tensor.
        elements: of the global tensor; -1 where that is not known.
    """

    grid: tuple[int, ...]
    position: tuple[int, ...]
    box: Region
    shape: tuple[int, ...]
    cut: str
    elements: int

    def positions(self, grid: tuple[int, ...]) -> list[tuple[int, ...]] | None:
        """Which positions of a grid of other depth this part touches; None if the grid does not fit the tensor."""
        if grid == self.grid:
            return [self.position]
        if grid != self.shape[: len(grid)]:
            return None
        found: list[tuple[int, ...]] = [()]
        for axis, count in enumerate(grid):
            start = min(self.box.offset[axis], count - 1)
            stop = max(start + 1, self.box.offset[axis] + self.box.size[axis])
            found = [(*position, place) for position in found for place in range(start, stop)]
        return found


def layout_of(key: str, param: ShardedParam, reader: DTensorReader | None = None) -> ParamLayout:
    """The layout of a sharded parameter of this key.

    Args:
        key: of the parameter.
        param: the parameter.
        reader: for many parameters: it remembers meshes.

    Raises:
        BadArgumentError: a DTensor's local tensor or placements cannot be described.
    """
    if isinstance(param, ShardedTensor):
        return _of_sharded(param)
    if isinstance(param, ShardedTensorFactory):
        return _of_factory(param)
    shape = tuple(param.shape)
    if isinstance(param, DTensor):
        boxes = (reader or DTensorReader()).layout(key, param).boxes
        regions = [box.region for box in boxes]
        cut = "" if regions == [Region.whole(shape)] else "[" + ";".join(str(region)[1:-1] for region in regions) + "]"
        return ParamLayout((), (), regions[0] if regions else Region.whole(shape), shape, cut, param.numel())
    return ParamLayout((), (), Region.whole(shape), shape, "", param.numel())


def _of_sharded(param: ShardedTensor) -> ParamLayout:
    ahead, box = param.prepend_axis_num, param.region()
    flat = param.flattened_range
    is_whole = box.size == param.global_shape and (flat is None or flat == slice(0, box.elements))
    cut = "" if is_whole else str(box)
    if flat is not None and not is_whole:
        cut = f"{cut[:-1]};{flat.start}:{flat.stop}]"
    elements = Region.whole(param.global_shape).elements
    return ParamLayout(param.global_shape[:ahead], param.global_offset[:ahead], box, param.global_shape, cut, elements)


def built_tensors(factory: ShardedTensorFactory) -> list[ShardedTensor]:
    """The sharded tensors that a factory stands for, in order, those of factories within it too."""

    def walk(built: Any) -> Iterator[ShardedTensor]:
        for leaf in flatten(built).values():
            if isinstance(leaf, ShardedTensorFactory):
                yield from walk(leaf.build())
            elif isinstance(leaf, ShardedTensor):
                yield leaf

    return list(walk(factory.build()))


def _of_factory(factory: ShardedTensorFactory) -> ParamLayout:
    parts = built_tensors(factory)
    depth = min((part.prepend_axis_num for part in parts), default=0)
    grid = parts[0].global_shape[:depth] if parts else ()
    position = parts[0].global_offset[:depth] if parts else ()
    # The key of the factory alone does not say where its parts lie.
    told = [(part.key, _of_sharded(part).cut) for part in parts]
    cut = f"[{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}]" if any(cut for _, cut in told) else ""
    return ParamLayout(grid, position, Region(position, (1,) * depth), grid, cut, -1)


def reduced(param: ShardedParam, statistic: torch.Tensor, axis: int, prefix: str, *, keeps_axis: bool) -> Any:
    """A statistic over one axis of a parameter, sharded like the parameter along the others.

    Args:
        param: the parameter.
        statistic: shaped like the local data, with size 1 along the axis, or without it.
        axis: counted from the last one, so negative.
        prefix: goes before the key.
        keeps_axis: whether the statistic has the axis.

    Returns:
        A leaf; None if this rank does not hold the axis whole, or has it in another shape, and so the statistic is of its
        part alone.
    """
    if isinstance(param, ShardedTensor):
        place = len(param.local_shape) + axis
        beyond = place + param.prepend_axis_num
        whole = place >= 0 and param.local_shape[place] == param.global_shape[beyond] and param.flattened_range is None

        def without(sizes: tuple[int, ...], at: int, size: int) -> tuple[int, ...]:
            return (*sizes[:at], *((size,) if keeps_axis else ()), *sizes[at + 1 :])

        # The parameter may be described as a view of another shape than the one it is optimized in.
        alike = tuple(statistic.shape) == without(param.local_shape, place, 1)
        if not whole or not alike or param.allow_shape_mismatch:
            return None
        parts = param.axis_fragmentations
        return replace(
            param,
            key=f"{prefix}.{param.key}",
            data=statistic,
            dtype=statistic.dtype,
            local_shape=without(param.local_shape, place, 1),
            global_shape=without(param.global_shape, beyond, 1),
            global_offset=without(param.global_offset, beyond, 0),
            axis_fragmentations=None if parts is None else without(parts, beyond, 1),
        )
    return None


def reduced_shape(shape: tuple[int, ...], axis: int, *, keeps_axis: bool) -> tuple[int, ...] | None:
    """Shape of a statistic over an axis, counted from the last; None if there is no such axis."""
    place = len(shape) + axis
    return None if place < 0 else (*shape[:place], *((1,) if keeps_axis else ()), *shape[place + 1 :])


def distributed_empty(param: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A DTensor of another shape on the mesh of a parameter: cut along the axes that both have alike, else replicated.

    A plain tensor if the parameter is none.
    """
    if not isinstance(param, DTensor):
        return torch.empty(shape, dtype=dtype)
    placements = [
        placement
        if type(placement) is Shard and len(shape) == param.dim() and shape[placement.dim] == param.shape[placement.dim]
        else Replicate()
        for placement in param.placements
    ]
    made: torch.Tensor = empty(*shape, dtype=dtype, device_mesh=param.device_mesh, placements=placements)
    return made
