"""Whether several elements of a strided tensor, or two tensors, lie in the same memory."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

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
    shape, strides = tuple(view.shape), view.stride()
    if 1 in shape:
        strides = tuple(stride if count > 1 else 0 for count, stride in zip(shape, strides, strict=True))
    device = view.device
    return device.type, device.index, view.data_ptr(), view.dtype, shape, strides, view.is_conj(), view.is_neg()
