"""Stored things that are not loaded as they are stored: sharded objects of another grid, dequantised wrapper tensors.

Called by `load`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from giantstep.errors import BadArgumentError, CorruptionError
from giantstep.mapping.wrappers import aligned_hull, alignment, dequantised, part_of
from giantstep.reading.checkpoint import Checkpoint
from giantstep.requesting import ObjectSource, WrappedSource
from giantstep.shards.dtypes import BY_TORCH_NAME
from giantstep.shards.paths import Path
from giantstep.shards.region import Region
from giantstep.words import torch_dtype

_STRIPE_ELEMENTS = 1 << 20


def read_objects(sources: Sequence[ObjectSource], checkpoint: Checkpoint) -> dict[Path, Any]:
    """The values of sharded objects by path."""
    with checkpoint.reading_ahead([position.unique_key for source in sources for position in source.positions]):
        return {source.leaf.path: _read_object(source, checkpoint) for source in sources}


def _read_object(source: ObjectSource, checkpoint: Checkpoint) -> Any:
    """The value of one; the user's function makes it where the stored grid has another shape."""
    if source.reshard is None:
        return checkpoint.object(source.positions[0].unique_key)
    stored = {position.offset: checkpoint.object(position.unique_key) for position in source.positions}
    asked = source.leaf.source
    return source.reshard(asked.key, stored, asked.global_shape, asked.global_offset)


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes of tensors that were filled, and bytes that were read for them."""

    filled: int
    read: int

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.filled + other.filled, self.read + other.read)


def fill_dequantised(source: WrappedSource, checkpoint: Checkpoint) -> Moved:
    """Fill a leaf from a stored wrapper tensor, stripe by stripe, so that memory is bounded."""
    source.leaf.allocate()
    moved = Moved(0, 0)
    for region, view in source.leaf.pieces:
        if view is None:
            raise BadArgumentError(f"tensor {source.leaf.key!r} has no memory")
        for stripe in _stripes(source, region, checkpoint):
            values, read = _dequantised_region(source, stripe, checkpoint)
            with torch.no_grad():
                target = view[stripe.relative_to(region.offset).slices()]
                target.copy_(values)
            moved += Moved(target.numel() * target.element_size(), read)
    return moved


def verify_parts(source: WrappedSource, checkpoint: Checkpoint) -> None:
    """Read the parts that filling a leaf will need, and drop them; raises `CorruptionError` as that would."""
    for region, _ in source.leaf.pieces:
        for stripe in _stripes(source, region, checkpoint):
            _read_parts(source, stripe, checkpoint)


def _shapes(source: WrappedSource, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: checkpoint[f"{source.key}.{name}"].shape for name in source.parts}


def _stripes(source: WrappedSource, region: Region, checkpoint: Checkpoint) -> Iterator[Region]:
    """The region in parts of bounded size that cut no element of any part, as far as there are such."""
    if region.elements:
        yield from _halved(region, alignment(source.shape, _shapes(source, checkpoint)))


def _halved(region: Region, steps: list[int]) -> Iterator[Region]:
    """The region, or its halves along the axis that can be cut into most, cut at a multiple of the axis' step."""
    cuts = [(count // step, axis) for axis, (count, step) in enumerate(zip(region.size, steps, strict=True))]
    most, axis = max(cuts, default=(0, 0))
    if region.elements <= _STRIPE_ELEMENTS or most < 2:
        yield region
        return
    start, count, step = region.offset[axis], region.size[axis], steps[axis]
    middle = (start + count // 2) // step * step
    for low, high in ((start, middle), (middle, start + count)):
        offset = (*region.offset[:axis], low, *region.offset[axis + 1 :])
        yield from _halved(Region(offset, (*region.size[:axis], high - low, *region.size[axis + 1 :])), steps)


def _read_parts(source: WrappedSource, region: Region, checkpoint: Checkpoint) -> tuple[Region, dict[str, torch.Tensor]]:
    """The smallest region around one that cuts no element of any part, and the parts of it."""
    shapes = _shapes(source, checkpoint)
    hull = aligned_hull(region, source.shape, shapes)
    return hull, {
        name: _read_tensor(checkpoint, f"{source.key}.{name}", part_of(hull, source.shape, shape))
        for name, shape in shapes.items()
    }


def _dequantised_region(source: WrappedSource, region: Region, checkpoint: Checkpoint) -> tuple[torch.Tensor, int]:
    what = f"tensor {source.key!r} in {checkpoint.location}"
    hull, parts = _read_parts(source, region, checkpoint)
    values = dequantised(source.description, parts, what)
    if tuple(values.shape) != hull.size:
        raise CorruptionError(f"{what}: dequantising region {hull} gave shape {tuple(values.shape)}")
    return values[region.relative_to(hull.offset).slices()], sum(p.numel() * p.element_size() for p in parts.values())


def _read_tensor(checkpoint: Checkpoint, key: str, region: Region) -> torch.Tensor:
    info, words = checkpoint.read_words(key, region)
    return torch.from_numpy(words).view(torch_dtype(BY_TORCH_NAME[info]))
