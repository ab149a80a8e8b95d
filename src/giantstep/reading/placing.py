"""Where the bytes of a read go: to the memory of whoever wants them if that is possible, else to a buffer first.

Called by `fetch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from giantstep.planning.in_place import Memory, nowhere, runs_in_place
from giantstep.planning.load_plan import Box, LoadPlan, Read, boxes_at
from giantstep.planning.load_tables import WantedTable
from giantstep.shards.region import Int64s
from giantstep.storage.buffers import address_of, memory_between

Bytes = NDArray[np.uint8]

# Past the page cache every part is a request to the device, for which shorter ones are not worth saving a copy.
_DIRECT_PART_BYTES = 1 << 20

Bits = NDArray[Any]
"""An array of elements as plain words of their size, whatever they mean."""

WORDS: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int16),
    4: np.dtype(np.int32),
    8: np.dtype(np.int64),
    16: np.dtype(np.complex128),
}


class Sink(Protocol):
    """Takes the elements of one wanted region."""

    def put(self, offset: tuple[int, ...], size: tuple[int, ...], bits: Bits) -> None:
        """Take the box of `size` at `offset` of the global tensor, both padded in front to the table's width.

        `bits` has shape `size`, any strides, and is valid until the call returns. Called from several threads,
        never twice for one element.
        """
        ...


class Sinks(Protocol):
    """A sink for each wanted region, and the memory of those that need none."""

    def __getitem__(self, row: int) -> Sink:
        """The sink of a region."""
        ...

    def memory(self, wanted: WantedTable) -> Memory:
        """Where the regions lie: to fill that memory is as good as `put`. It is theirs as long as this object lives."""
        ...


class SinkList:
    """Sinks that are given everything through a buffer."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def __getitem__(self, row: int) -> Sink:
        return self._sinks[row]

    def memory(self, wanted: WantedTable) -> Memory:
        return nowhere(wanted)


def bits(box: Box, data: Bytes, position: int) -> Bits:
    """A piece inside bytes that begin at `position`, strided as its chunk is; no copy."""
    return np.ndarray(box.size, WORDS[box.item_bytes], data, box.position - position, box.strides)


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the bytes of one read go.

    Attributes:
        parts: memory that they fill, one after another.
        rows: pieces that are not filled by that.
        edges: pairs of memory, and what of the buffer is to be copied there.
    """

    parts: list[memoryview]
    rows: Int64s
    edges: list[tuple[memoryview, memoryview]]


class Placing:
    """Where the bytes of a plan's reads go. Used by several threads.

    Args:
        plan: from `plan_load`.
        sinks: per wanted region.
    """

    def __init__(self, plan: LoadPlan, sinks: Sinks) -> None:
        self._plan = plan
        self._sinks = sinks
        self._runs = runs_in_place(plan, sinks.memory(plan.wanted))
        address, stop = self._runs.address, self._runs.address + self._runs.stop - self._runs.start
        # Invariant: of all that lies between, only the bytes of runs are touched, which are the wanted regions'.
        self._base = int(address.min(initial=np.iinfo(np.int64).max)) if len(address) else 0
        self._memory = memory_between(self._base, int(stop.max(initial=self._base)))

    def place(self, read: Read, length: int, buffer: Bytes, alignment: int) -> Placed:
        """Find a place for all bytes of a read.

        Args:
            read: of the plan.
            length: how many bytes it has.
            buffer: at least as long; aligned to `alignment`.
            alignment: of memory, so that reading into it is fast; see `Access`.
        """
        runs, spare, zero = self._runs, buffer.data, read.position
        begin, end = np.searchsorted(runs.first, (read.first, read.last)).tolist()
        low, high = np.searchsorted(runs.left, (read.first, read.last)).tolist()
        places = (column[begin:end].tolist() for column in (runs.start, runs.stop, runs.address - self._base))
        placed = Placed([], runs.left[low:high], [])
        parts, last, within = placed.parts, zero, self._memory
        for start, stop, place in zip(*places, strict=True):
            if alignment == 1:
                first, part = start, within[place : place + stop - start]
            else:
                first, part = _inner(start, within[place : place + stop - start], alignment, placed, spare[start - zero :])
            if not part:
                continue
            if last < first:
                parts.append(spare[last - zero : first - zero])
            parts.append(part)
            last = first + len(part)
        if last < zero + length:
            parts.append(spare[last - zero : length])
        return placed

    def finish(self, read: Read, placed: Placed, buffer: Bytes) -> None:
        """Bring to their places what was read to the buffer."""
        for memory, found in placed.edges:
            memory[:] = found
        if len(placed.rows):
            for box in boxes_at(self._plan.chunks, self._plan.pieces, placed.rows):
                self._sinks[box.wanted].put(box.offset, box.size, bits(box, buffer, read.position))


def _inner(start: int, memory: memoryview, alignment: int, placed: Placed, spare: memoryview) -> tuple[int, memoryview]:
    """What of the memory for the bytes from position `start` on is read to: its first position, and it, maybe empty.

    What is left of it is filled from `spare`, where these bytes would be read to.
    """
    stop = start + len(memory)
    low, high = -(-start // alignment) * alignment, stop // alignment * alignment
    part = memory[low - start : high - start]
    if high - low < _DIRECT_PART_BYTES or address_of(np.frombuffer(part, dtype=np.uint8)) % alignment:
        placed.edges.append((memory, spare[: len(memory)]))
        return start, memory[:0]
    for first, last in ((0, low - start), (high - start, len(memory))):
        placed.edges.append((memory[first:last], spare[first:last]))
    return low, part
