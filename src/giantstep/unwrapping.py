"""Stored things that are not loaded as they are stored: sharded objects of another grid, dequantised wrapper tensors.

Called by `load`.
"""

from __future__ import annotations

from typing import Any

import torch

from giantstep.errors import BadArgumentError, CorruptionError
from giantstep.mapping.wrappers import aligned_hull, dequantised
from giantstep.reading.checkpoint import Checkpoint
from giantstep.requesting import ObjectSource, WrappedSource
from giantstep.shards.dtypes import BY_TORCH_NAME
from giantstep.shards.region import Region
from giantstep.words import torch_dtype


def read_object(source: ObjectSource, checkpoint: Checkpoint) -> Any:
    """The value of a sharded object; the user's function makes it where the stored grid has another shape."""
    if source.reshard is None:
        return checkpoint.object(source.positions[0].unique_key)
    stored = {position.offset: checkpoint.object(position.unique_key) for position in source.positions}
    asked = source.leaf.source
    return source.reshard(asked.key, stored, asked.global_shape, asked.global_offset)


def fill_dequantised(source: WrappedSource, checkpoint: Checkpoint) -> int:
    """Fill a leaf from a stored wrapper tensor, region by region; return the bytes filled.

    As much of the parts as a region needs is in memory at a time, beside the dequantised region.
    """
    source.leaf.allocate()
    filled = 0
    for region, view in source.leaf.pieces:
        if not region.elements:
            continue
        if view is None:
            raise BadArgumentError(f"tensor {source.leaf.key!r} has no memory")
        values = _dequantised_region(source, region, checkpoint)
        with torch.no_grad():
            view.copy_(values)
        filled += view.numel() * view.element_size()
    return filled


def _dequantised_region(source: WrappedSource, region: Region, checkpoint: Checkpoint) -> torch.Tensor:
    what = f"tensor {source.key!r} in {checkpoint.location}"
    inside = region.intersect(Region.whole(source.shape))
    if inside != region:
        raise BadArgumentError(f"{what} has shape {source.shape}: a padded tensor cannot be loaded by dequantising it")
    shapes = {name: checkpoint[f"{source.key}.{name}"].shape for name in source.parts}
    offset, size = aligned_hull(region.offset, region.size, source.shape, shapes)
    parts = {}
    for name, shape in shapes.items():
        low = [start * part // whole if whole else 0 for start, part, whole in zip(offset, shape, source.shape, strict=True)]
        count = [n * part // whole if whole else 0 for n, part, whole in zip(size, shape, source.shape, strict=True)]
        parts[name] = _read_tensor(checkpoint, f"{source.key}.{name}", Region(tuple(low), tuple(count)))
    values = dequantised(source.description, parts, what)
    if tuple(values.shape) != size:
        raise CorruptionError(f"{what}: dequantising region {Region(offset, size)} gave shape {tuple(values.shape)}")
    return values[region.relative_to(offset).slices()]


def _read_tensor(checkpoint: Checkpoint, key: str, region: Region) -> torch.Tensor:
    info, words = checkpoint.read_words(key, region)
    return torch.from_numpy(words).view(torch_dtype(BY_TORCH_NAME[info]))
