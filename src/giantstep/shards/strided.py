"""A range of memory as boxes of a tensor whose elements lie there with strides, such as a half of a fused weight.

A view of a flattened parameter may have gaps (a chunk of its columns) and its axes in another order (a transpose). Which
of its elements lie in a range of the memory is a range of its elements in the order of memory, and so at most 2n-1
boxes. Pure integer work; called by `mapping.flat_factory`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from giantstep.shards.flat import flat_range_to_regions
from giantstep.shards.region import Region


@dataclass(frozen=True, slots=True)
class StridedBox:
    """A box of a view.

    Attributes:
        region: in the view's own indices.
        position: of its first element, in elements of the memory.
    """

    region: Region
    position: int


def is_nested(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the axes, from the largest stride to the smallest, step over all that the inner ones reach.

    So it is of whatever is cut, split, viewed or transposed from a contiguous tensor; not of expanded tensors.
    """
    reach = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size <= 1:
            continue
        if stride < reach:
            return False
        reach += stride * (size - 1)
    return True


def boxes_in_range(shape: Sequence[int], strides: Sequence[int], offset: int, start: int, stop: int) -> list[StridedBox]:
    """Boxes that partition those elements of a view that lie in memory from `start` to `stop`.

    Args:
        shape, strides, offset: of the view, in elements; `is_nested`.
        start, stop: range of the memory, in elements.
    """
    axes = sorted(range(len(shape)), key=lambda axis: strides[axis] if shape[axis] > 1 else math.inf, reverse=True)
    sizes, steps = [shape[axis] for axis in axes], [strides[axis] for axis in axes]
    low, high = _count_before(sizes, steps, start - offset), _count_before(sizes, steps, stop - offset)
    found = []
    for _, box in flat_range_to_regions(sizes, low, high):
        box_offset, box_size = [0] * len(axes), [0] * len(axes)
        for place, axis in enumerate(axes):
            box_offset[axis], box_size[axis] = box.offset[place], box.size[place]
        position = offset + sum(index * stride for index, stride in zip(box_offset, strides, strict=True))
        found.append(StridedBox(Region(tuple(box_offset), tuple(box_size)), position))
    return found


def _count_before(sizes: Sequence[int], steps: Sequence[int], position: int) -> int:
    """How many elements lie before a position; axes from the largest step to the smallest."""
    total = math.prod(sizes)
    if position <= 0 or not total:
        return 0
    found, inner = 0, total
    for size, step in zip(sizes, steps, strict=True):
        inner //= size
        if size == 1:
            continue
        whole = position // step
        if whole >= size:
            return found + size * inner
        found += whole * inner
        position -= whole * step
    # What is left of the way reaches the first of the elements that lie together here.
    return found + (1 if position > 0 else 0)
