"""Wanted boxes of chunks cut into pieces: spans of bytes that are read, or sent, as a whole.

Bytes of all files lie on one line of *positions*: each file begins at its base, a multiple of the size of whatever the
line is cut into. Cuts divide the line, so that no byte is in two of their spans. The part of a chunk within one is a
flat range of the chunk, hence at most 2n-1 boxes (as `shards.flat` does it for one range); what is wanted of these are
the pieces. So pieces depend on the wanted region, the chunk and the cuts, and on nothing else that is wanted: ranks that
know these find the same ones. Called by `load_plan` and `exchange_part`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from giantstep.planning.intersections import Intersections
from giantstep.planning.load_tables import ChunkTable, row_strides
from giantstep.shards.region import Int64s


@dataclass(frozen=True, slots=True)
class Pieces:
    """Boxes of chunks, each within one span.

    Attributes:
        wanted: row of the wanted table.
        chunk: row of the chunk table.
        offset, size: [pieces, width] the box in the global tensor, padded in front.
        start, stop: positions from the box's first byte to its last.
        span: number of the span.
    """

    wanted: Int64s
    chunk: Int64s
    offset: Int64s
    size: Int64s
    start: Int64s
    stop: Int64s
    span: Int64s

    def __len__(self) -> int:
        return len(self.wanted)

    def rows(self, rows: Int64s | slice) -> Pieces:
        """Some of them."""
        columns = (self.wanted, self.chunk, self.offset, self.size, self.start, self.stop, self.span)
        if isinstance(rows, slice):
            return Pieces(*(column[rows] for column in columns))
        return Pieces(*(np.take(column, rows, axis=0) for column in columns))


class Cuts(Protocol):
    """Disjoint spans of positions, numbered in their order."""

    def between(self, start: Int64s, stop: Int64s) -> tuple[Int64s, Int64s]:
        """First and one past the last of the spans that may hold some of [start, stop)."""
        ...

    def bounds(self, span: Int64s) -> tuple[Int64s, Int64s]:
        """Where spans begin and end."""
        ...


@dataclass(frozen=True, slots=True)
class Grid:
    """Spans of equal size that cover everything."""

    span_bytes: int

    def between(self, start: Int64s, stop: Int64s) -> tuple[Int64s, Int64s]:
        return start // self.span_bytes, (stop - 1) // self.span_bytes + 1

    def bounds(self, span: Int64s) -> tuple[Int64s, Int64s]:
        return span * self.span_bytes, (span + 1) * self.span_bytes


@dataclass(frozen=True, slots=True)
class Runs:
    """Any spans, ascending; what lies between them makes no pieces."""

    start: Int64s
    stop: Int64s

    def between(self, start: Int64s, stop: Int64s) -> tuple[Int64s, Int64s]:
        return np.searchsorted(self.stop, start, side="right"), np.searchsorted(self.start, stop, side="left")

    def bounds(self, span: Int64s) -> tuple[Int64s, Int64s]:
        return self.start[span], self.stop[span]


def byte_strides(chunks: ChunkTable, chunk: Int64s, item_bytes: Int64s) -> Int64s:
    """[rows, width] bytes between neighbours along each axis of chunks."""
    return row_strides(chunks.size[chunk], item_bytes)


def cut_pieces(chunks: ChunkTable, found: Intersections, base: Int64s, cuts: Cuts, gap_bytes: int) -> Pieces:
    """All wanted boxes as pieces, in order of their positions, then of the wanted table.

    An element belongs to the span in which it begins. A piece holds no gap of `gap_bytes` or more that nobody wants.

    Args:
        chunks, found: the wanted boxes.
        base: position of each file.
        cuts: where to cut.
        gap_bytes: at least 1.
    """
    boxes = _Boxes.of(chunks, found, base)
    first, last = cuts.between(boxes.start, boxes.stop)
    counts = np.maximum(last - first, 0)
    parts = boxes.repeated(counts)
    span = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(len(parts.start))
    low, high = cuts.bounds(span)
    inside = (low <= parts.start) & (parts.stop <= high)
    across = np.flatnonzero(~inside)
    if len(across):
        cut, of = parts.rows(across).within(low[across], high[across])
        whole = np.flatnonzero(inside)
        parts, span = parts.rows(whole).joined(cut), np.concatenate((span[whole], span[across][of]))
    parts, of = parts.without_gaps(gap_bytes)
    span = np.take(span, of)
    offset = parts.offset + np.take(chunks.offset, parts.chunk, axis=0)
    pieces = Pieces(parts.wanted, parts.chunk, offset, parts.size, parts.start, parts.stop, span)
    return pieces.rows(np.lexsort((parts.wanted, parts.start)))


@dataclass(frozen=True, slots=True)
class _Boxes:
    """Boxes of chunks.

    Attributes:
        wanted, chunk: rows of the tables.
        offset, size: [boxes, width] the box inside the chunk.
        shape, stride: [boxes, width] sizes and byte strides of the chunk.
        item: bytes per element.
        origin: position of the chunk.
        start, stop: positions of the box.
    """

    wanted: Int64s
    chunk: Int64s
    offset: Int64s
    size: Int64s
    shape: Int64s
    stride: Int64s
    item: Int64s
    origin: Int64s
    start: Int64s
    stop: Int64s

    @classmethod
    def of(cls, chunks: ChunkTable, found: Intersections, base: Int64s) -> _Boxes:
        chunk = found.chunk
        item = chunks.chunk_item_bytes()[chunk]
        stride = byte_strides(chunks, chunk, item)
        origin = base[chunks.file[chunk]] + chunks.start[chunk]
        columns = (
            found.wanted,
            chunk,
            found.offset - chunks.offset[chunk],
            found.size,
            chunks.size[chunk],
            stride,
            item,
            origin,
        )
        return cls(*columns, origin, origin).placed()

    def placed(self) -> _Boxes:
        """The same with `start` and `stop` as the box has them."""
        start = self.origin.copy()
        stop = self.item.copy()
        for axis in range(self.stride.shape[1]):
            start += self.offset[:, axis] * self.stride[:, axis]
            stop += (self.size[:, axis] - 1) * self.stride[:, axis]
        stop += start
        return replace(self, start=start, stop=stop)

    def _columns(self) -> tuple[Int64s, ...]:
        first = (self.wanted, self.chunk, self.offset, self.size, self.shape, self.stride, self.item, self.origin)
        return (*first, self.start, self.stop)

    def rows(self, rows: Int64s) -> _Boxes:
        """Some of them."""
        return _Boxes(*(np.take(column, rows, axis=0) for column in self._columns()))

    def repeated(self, counts: Int64s) -> _Boxes:
        """Each as often as `counts` says."""
        if bool((counts == 1).all()):
            return self
        return self.rows(np.repeat(np.arange(len(counts)), counts))

    def joined(self, other: _Boxes) -> _Boxes:
        """These, then the others."""
        return _Boxes(*(np.concatenate(pair) for pair in zip(self._columns(), other._columns(), strict=True)))

    def boxed(self, offset: Int64s, size: Int64s) -> _Boxes:
        """Other boxes of the same chunks."""
        return replace(self, offset=offset, size=size).placed()

    def within(self, low: Int64s, high: Int64s) -> tuple[_Boxes, Int64s]:
        """What of each box begins in positions [low, high), as boxes, and of which row each is."""
        begin = np.maximum(0, -((self.origin - low) // self.item))
        end = np.minimum(self.shape.prod(axis=1), -((self.origin - high) // self.item))
        parts = []
        for row, offset, size in _flat_boxes(self.shape, begin, np.maximum(begin, end)):
            start = np.maximum(offset, self.offset[row])
            stop = np.minimum(offset + size, self.offset[row] + self.size[row])
            hit = np.flatnonzero((start < stop).all(axis=1))
            parts.append((row[hit], start[hit], (stop - start)[hit]))
        row, offset, size = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return self.rows(row).boxed(offset, size), row

    def without_gaps(self, gap_bytes: int) -> tuple[_Boxes, Int64s]:
        """The boxes, those with gaps of `gap_bytes` or more cut there, and of which row each is."""
        reach = (self.size - 1) * self.stride
        # What a box spans along the axes behind each one.
        inner = np.cumsum(reach[:, ::-1], axis=1)[:, ::-1] - reach + self.item[:, None]
        wide = (self.size > 1) & (self.stride - inner >= gap_bytes)
        every = np.arange(len(self.wanted))
        if not wide.any():
            return self, every
        # All axes up to the last one with wide gaps are cut into single rows: those before it have wider gaps then.
        width = wide.shape[1]
        outer = np.cumsum(wide[:, ::-1], axis=1)[:, ::-1] > 0
        row = np.repeat(every, np.where(outer, self.size, 1).prod(axis=1))
        within = np.arange(len(row)) - np.searchsorted(row, row, side="left")
        parts = self.rows(row)
        offset, size = parts.offset.copy(), parts.size.copy()
        for axis in range(width - 1, -1, -1):
            cut = outer[row, axis]
            count = np.where(cut, parts.size[:, axis], 1)
            offset[:, axis] += np.where(cut, within % count, 0)
            size[cut, axis] = 1
            within //= count
        return parts.boxed(offset, size), row


def _flat_boxes(shape: Int64s, begin: Int64s, end: Int64s) -> list[tuple[Int64s, Int64s, Int64s]]:
    """Elements [begin, end) of row-major boxes of `shape`, as boxes: rows, offsets, sizes; several triples.

    A leading incomplete row, whole rows and a trailing incomplete row on each axis, from the first on which begin and
    end differ: see `shards.flat`.
    """
    rows, width = shape.shape
    first, last = _coordinates(shape, begin), _coordinates(shape, end)
    differs = first != last
    axis_of = np.where(differs.any(axis=1), differs.argmax(axis=1), width)
    # [rows, axis] whether the beginning is inside a row of the axis, not at its first element.
    inside: NDArray[np.bool_] = np.zeros((rows, width + 1), dtype=bool)
    inside[:, :width] = np.cumsum((first != 0)[:, ::-1], axis=1)[:, ::-1] > 0
    found = []
    for axis in range(width):
        middle, below = np.flatnonzero(axis_of == axis), np.flatnonzero(axis_of < axis)
        start = first[:, axis] + inside[:, axis + 1]
        head = below[inside[below, axis]]
        tail = below[last[below, axis] > 0]
        for chosen, prefix, low, high in (
            (middle, first, start[middle], last[middle, axis]),
            (head, first, start[head], shape[head, axis]),
            (tail, last, np.zeros(len(tail), dtype=np.int64), last[tail, axis]),
        ):
            offset, size = np.zeros((len(chosen), width), dtype=np.int64), shape[chosen]
            offset[:, :axis], size[:, :axis] = prefix[chosen, :axis], 1
            offset[:, axis], size[:, axis] = low, high - low
            found.append((chosen, offset, size))
    return found


def _coordinates(shape: Int64s, element: Int64s) -> Int64s:
    """[rows, width] coordinates of flat elements; one past the last element is one row past the first axis."""
    found = np.zeros_like(shape)
    left = element.copy()
    for axis in range(shape.shape[1] - 1, 0, -1):
        found[:, axis] = left % shape[:, axis]
        left //= shape[:, axis]
    found[:, 0] = left
    return found
