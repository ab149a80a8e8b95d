"""Whether boxes partition their tensors, in time proportional to their number. For `format.index`, `planning` and `reading`.

Tensors are ragged: rows of `dims[i]` values, one after another. Not here: which boxes overlap (`region.overlapping_pair`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from giantstep.shards.region import Int64s
from giantstep.shards.words import mixed


def products(values: NDArray[Any], counts: Int64s) -> NDArray[Any]:
    """Product of each run of `counts[i]` values; 1 for an empty run."""
    if len(counts) and counts[0] and (counts == counts[0]).all():
        # Runs of equal length are rows of a table.
        table = values.reshape(len(counts), -1)
        result = table[:, 0].copy()
        for axis in range(1, table.shape[1]):
            result *= table[:, axis]
        return result
    result = np.ones(len(counts), dtype=values.dtype)
    filled = counts > 0
    if filled.any():
        result[filled] = np.multiply.reduceat(values, (np.cumsum(counts) - counts)[filled])
    return result


def axes_of(counts: Int64s) -> Int64s:
    """0, 1, ... within each run of `counts[i]` values."""
    if len(counts) and (counts == counts[0]).all():
        return np.tile(np.arange(counts[0]), len(counts))
    axes: Int64s = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return axes


def partitioned(boxes: Int64s, dims: Int64s, shapes: Int64s, offsets: Int64s, sizes: Int64s) -> NDArray[np.bool_]:
    """[tensors] whether the boxes of a tensor hold each of its elements exactly once.

    Args:
        boxes: [tensors] how many boxes each has.
        dims: [tensors] number of dimensions.
        shapes: ragged, per tensor.
        offsets, sizes: ragged, per box, in the order of the tensors.

    The corners of boxes that partition a tensor cancel, with alternating signs, to the corners of the tensor. Instead
    of the corners, their products over the axes of pseudo-random 64-bit numbers are summed: where the sums agree, the
    boxes are a partition unless 64 bits agree by chance.
    """
    box_dims = np.repeat(dims, boxes)
    axes = axes_of(box_dims)
    ends = np.cumsum(boxes)
    corners = products(_word(axes, offsets) - _word(axes, offsets + sizes), box_dims)
    # Sums of runs as differences of running sums: everything is modulo 2**64.
    running = np.concatenate((np.zeros(1, dtype=np.uint64), np.cumsum(corners, dtype=np.uint64)))
    held = running[ends] - running[ends - boxes]
    axes = axes_of(dims)
    whole = products(_word(axes, np.zeros_like(shapes)) - _word(axes, shapes), dims)
    same: NDArray[np.bool_] = held == whole
    return same


def _word(axes: Int64s, coordinates: Int64s) -> NDArray[np.uint64]:
    """A number for each coordinate of each axis."""
    return mixed(coordinates, axes.astype(np.uint64) + np.uint64(1))
