"""Whether several elements of a strided tensor, or two tensors, lie in the same memory."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch

# Strides that leave it open are resolved by listing the offsets of all elements, up to this many.
_LISTED_ELEMENTS = 1 << 22


def shares_elements(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements of a tensor of this shape and strides (in elements) have the same address."""
    axes = sorted((stride, count) for count, stride in zip(shape, strides, strict=True) if count > 1)
    if 0 in shape or not axes:
        return False
    span = 1
    for stride, count in axes:
        if stride < span:
            break
        span = (count - 1) * stride + 1 + (span - 1)
    else:
        # Each axis steps over everything that the finer ones reach.
        return False
    if axes[0][0] == 0 or math.prod(shape) > _LISTED_ELEMENTS:
        return True
    offsets = np.zeros(1, dtype=np.int64)
    for stride, count in axes:
        offsets = (offsets[:, None] + np.arange(count, dtype=np.int64)[None, :] * stride).reshape(-1)
    return len(np.unique(offsets)) < len(offsets)


def memory_of(view: torch.Tensor) -> Hashable:
    """Equal for two tensors if and only if they are the same elements of the same memory, in the same order.

    Strides of dimensions of length 1 do not count. None for empty tensors and those without memory.
    """
    if not view.numel() or view.is_meta:
        return None
    shape, strides = view.shape, view.stride()
    if 1 in shape:
        strides = tuple(stride if count > 1 else 0 for count, stride in zip(shape, strides, strict=True))
    return view.device, view.data_ptr(), view.dtype, shape, strides, view.is_conj(), view.is_neg()


def span_of(view: torch.Tensor) -> tuple[tuple[str, int], int, int]:
    """Device, first byte, and the byte behind the last, of the memory that a tensor with elements reaches over."""
    reach = sum((count - 1) * stride for count, stride in zip(view.shape, view.stride(), strict=True)) + 1
    start = view.data_ptr()
    return (view.device.type, view.device.index or 0), start, start + reach * view.element_size()


def disjoint(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors surely share no byte; False where that cannot be told cheaply."""
    (device, start, stop), (other, first, last) = span_of(a), span_of(b)
    if first < start:
        return disjoint(b, a)
    if device != other or stop <= first or last <= start:
        return True
    if a.dim() == b.dim() and a.element_size() == b.element_size() and (first - start) % a.element_size() == 0:
        return _boxes_disjoint(a, b, (first - start) // a.element_size())
    return False


def _boxes_disjoint(a: torch.Tensor, b: torch.Tensor, distance: int) -> bool:
    """Whether two boxes of one larger array, `distance` elements apart, have no element in common.

    With equal strides, each larger than all that finer axes of both boxes reach, an address has one place in the array
    only, and boxes meet if and only if they do along every axis.
    """
    axes = []
    for count, other, stride, second in zip(a.shape, b.shape, a.stride(), b.stride(), strict=True):
        if count > 1 and other > 1 and stride != second:
            return False
        if count > 1 or other > 1:
            axes.append((stride if count > 1 else second, count, other))
    axes.sort(reverse=True)
    if axes and axes[-1][0] == 0:
        return False
    return any(_apart(axes, offsets) for offsets in _offsets([stride for stride, _, _ in axes], distance))


def _offsets(strides: Sequence[int], distance: int) -> Iterator[list[int]]:
    """Ways to take a distance as steps along the axes, from coarse to fine, and a rest.

    Along an axis a box may begin before or behind where the other does, so steps are rounded down and up.
    """
    if not strides:
        yield [distance]
        return
    steps, rest = divmod(distance, strides[0])
    for number in (steps, steps + 1) if rest else (steps,):
        for finer in _offsets(strides[1:], distance - number * strides[0]):
            yield [number, *finer]


def _apart(axes: Sequence[tuple[int, int, int]], offsets: Sequence[int]) -> bool:
    """Whether boxes with such axes (stride, both counts) and offsets have their places in one array, and do not meet."""
    # The rest is an offset along an axis of one element, the finest.
    reach, apart = 1, False
    for (stride, count, other), offset in zip([(1, 1, 1), *reversed(axes)], reversed(offsets), strict=True):
        if stride < reach:
            return False
        low, high = min(0, offset), max(count, offset + other)
        reach += (high - low - 1) * stride
        apart = apart or offset >= count or -offset >= other
    return apart
