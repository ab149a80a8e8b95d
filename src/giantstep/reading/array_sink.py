"""A sink that fills an array in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from giantstep.reading.placing import Bits


class ArraySink:
    """Copies boxes into an array of words that stands for one wanted region.

    Args:
        target: array of the region's shape, of words of the element's size; owned by the caller, any strides.
        origin: offset of the region in its global tensor.
    """

    def __init__(self, target: Bits, origin: tuple[int, ...]) -> None:
        self._target = target
        self._origin = origin

    def put(self, offset: tuple[int, ...], size: tuple[int, ...], bits: Bits) -> None:
        target = self._box(offset, size)
        np.copyto(target, bits.reshape(target.shape), casting="no")

    def memory(self, offset: tuple[int, ...], size: tuple[int, ...]) -> memoryview | None:
        skip = len(offset) - len(self._origin)
        whole = size[skip:] == self._target.shape
        target = self._target if whole else self._box(offset, size)
        return target.reshape(-1).view(np.uint8).data if target.flags.c_contiguous else None

    def _box(self, offset: tuple[int, ...], size: tuple[int, ...]) -> Bits:
        skip = len(offset) - len(self._origin)
        where: tuple[Any, ...] = tuple(
            slice(start - zero, start - zero + count)
            for start, zero, count in zip(offset[skip:], self._origin, size[skip:], strict=True)
        )
        # With `...` the result is an array even where the target has no dimensions.
        box: Bits = self._target[(*where, ...)]
        return box
