"""`Memory`: bytes of tensors in the order of a file, as columns of addresses, so that a tensor costs no object of its own.

Views of the bytes are made where they are needed, by the threads that write them. Called by `stream`.
"""

from __future__ import annotations

import numpy as np

from giantstep.shards.region import Int64s
from giantstep.storage.buffers import memory_between


class Memory:
    """Pieces of this process's memory that are to follow one another.

    Invariant: the memory does not change as long as views of it are used, and it is alive as long as this object is: a view
    itself keeps nothing alive.

    Args:
        address, sizes: [pieces] first byte of each, and number of bytes.
        owner: what keeps the memory alive.
    """

    def __init__(self, address: Int64s, sizes: Int64s, owner: object) -> None:
        self._owner = owner
        address, sizes = address[sizes > 0], sizes[sizes > 0]
        # Neighbours are one piece: parts of a flat buffer, or copies that a snapshot has laid out.
        apart = np.ones(len(address), dtype=bool)
        apart[1:] = address[1:] != address[:-1] + sizes[:-1]
        first = np.flatnonzero(apart)
        ends = np.cumsum(sizes)
        low, high = (int(address.min()), int((address + sizes).max())) if len(address) else (0, 0)
        self._between = memory_between(low, high).toreadonly()
        self._address = address[first] - low
        self._starts = ends[first] - sizes[first]
        self.bytes = int(ends[-1]) if len(ends) else 0
        self._stops = np.append(self._starts[1:], self.bytes)

    def views(self, start: int, stop: int) -> list[memoryview]:
        """The bytes from `start` up to, not including, a later `stop` of all pieces together; no view is empty."""
        first = int(np.searchsorted(self._stops, start, side="right"))
        last = int(np.searchsorted(self._starts, stop, side="left"))
        shift = self._address[first:last] - self._starts[first:last]
        begins = shift + np.maximum(self._starts[first:last], start)
        ends = shift + np.minimum(self._stops[first:last], stop)
        return [self._between[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
