"""Where the bytes of a read go: to the memory of whoever wants them if that is possible, else to a buffer first.

Called by `fetch`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from giantstep.planning.in_place import lie_alone
from giantstep.planning.load_plan import Box, LoadPlan, Read, boxes_at
from giantstep.storage.buffers import address_of

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

    def memory(self, offset: tuple[int, ...], size: tuple[int, ...]) -> memoryview | None:
        """The bytes that `put` of this box would fill, if the elements are to lie there as they are given, in one row.

        Filling them is then as good as `put`. None where elements are to lie apart, or are changed or compared.
        """
        ...


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
    rows: list[int]
    edges: list[tuple[memoryview, memoryview]]


class Placing:
    """Where the bytes of a plan's reads go. Used by several threads.

    Args:
        plan: from `plan_load`.
        sinks: per wanted region.
    """

    def __init__(self, plan: LoadPlan, sinks: Sequence[Sink]) -> None:
        self._plan = plan
        self._sinks = sinks
        self._alone = lie_alone(plan)

    def place(self, read: Read, length: int, buffer: Bytes, alignment: int) -> Placed:
        """Find a place for all bytes of a read.

        Args:
            read: of the plan.
            length: how many bytes it has.
            buffer: at least as long; aligned to `alignment`.
            alignment: of memory, so that reading into it is fast; see `Access`.
        """
        placed = Placed([], [], [])
        spare, zero = buffer.data, read.position
        end = zero
        for row, start, memory in self._memories(read):
            inner = _inner(start, memory, alignment) if memory is not None else None
            if memory is None or inner is None:
                placed.rows.append(row)
                continue
            low, part = inner
            high, stop = low + len(part), start + len(memory)
            for first, last in ((start, low), (high, stop)) if alignment > 1 else ():
                placed.edges.append((memory[first - start : last - start], spare[first - zero : last - zero]))
            if end < low:
                placed.parts.append(spare[end - zero : low - zero])
            placed.parts.append(part)
            end = high
        if end < zero + length:
            placed.parts.append(spare[end - zero : length])
        return placed

    def _memories(self, read: Read) -> Iterator[tuple[int, int, memoryview | None]]:
        """The pieces of a read: row, first position, and memory to which it could be read."""
        pieces, sinks = self._plan.pieces, self._sinks
        rows = slice(read.first, read.last)
        columns = (self._alone[rows], pieces.wanted[rows], pieces.offset[rows], pieces.size[rows], pieces.start[rows])
        columns_listed = (column.tolist() for column in columns)
        for row, (alone, wanted, offset, size, start) in enumerate(zip(*columns_listed, strict=True), read.first):
            yield row, start, sinks[wanted].memory(tuple(offset), tuple(size)) if alone else None

    def finish(self, read: Read, placed: Placed, buffer: Bytes) -> None:
        """Bring to their places what was read to the buffer."""
        for memory, found in placed.edges:
            memory[:] = found
        if placed.rows:
            for box in boxes_at(self._plan.chunks, self._plan.pieces, np.array(placed.rows)):
                self._sinks[box.wanted].put(box.offset, box.size, bits(box, buffer, read.position))


def _inner(start: int, memory: memoryview, alignment: int) -> tuple[int, memoryview] | None:
    """What of the memory for the bytes from position `start` on is read to: its first position, and it; None if nothing."""
    if alignment == 1:
        return start, memory
    low, high = -(-start // alignment) * alignment, (start + len(memory)) // alignment * alignment
    if high - low < _DIRECT_PART_BYTES:
        return None
    part = memory[low - start : high - start]
    return (low, part) if address_of(np.frombuffer(part, dtype=np.uint8)) % alignment == 0 else None
