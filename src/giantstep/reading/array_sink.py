"""Sinks that fill arrays in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from giantstep.planning.in_place import Memory, nowhere
from giantstep.planning.load_tables import WantedTable
from giantstep.reading.placing import Bits, Sink
from giantstep.storage.buffers import address_of


class ArraySink:
    """Copies boxes into an array of words that stands for one wanted region.

    Args:
        target: array of the region's shape, of words of the element's size; owned by the caller, any strides.
        origin: offset of the region in its global tensor.
    """

    def __init__(self, target: Bits, origin: tuple[int, ...]) -> None:
        self.target = target
        self._origin = origin

    def put(self, offset: tuple[int, ...], size: tuple[int, ...], bits: Bits) -> None:
        skip = len(offset) - len(self._origin)
        where: tuple[Any, ...] = tuple(
            slice(start - zero, start - zero + count)
            for start, zero, count in zip(offset[skip:], self._origin, size[skip:], strict=True)
        )
        # With `...` the result is an array even where the target has no dimensions.
        target = self.target[(*where, ...)]
        np.copyto(target, bits.reshape(target.shape), casting="no")


class ArraySinks:
    """A few sinks that fill arrays, whose memory may be read to."""

    def __init__(self, sinks: Sequence[ArraySink]) -> None:
        self._sinks = sinks

    def __getitem__(self, row: int) -> Sink:
        return self._sinks[row]

    def memory(self, wanted: WantedTable) -> Memory:
        found = nowhere(wanted)
        for row, sink in enumerate(self._sinks):
            found.start[row] = address_of(sink.target)
            found.strides[row, wanted.width - sink.target.ndim :] = sink.target.strides
        return found
