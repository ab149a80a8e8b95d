"""`plan_load`: from wanted regions and stored chunks to byte runs and what goes where.

Each wanted region is met with the chunks of its tensor; every intersection becomes one or several pieces,
spans of bytes of one file that hold a box of the chunk; pieces that lie near each other are read together. Bytes
that nobody wants are read only where they share a block or fill a gap smaller than one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import CorruptionError
from giantstep.format.index import Index
from giantstep.shards.dtypes import ITEM_BYTES
from giantstep.shards.region import Int64s, Region, ragged_to_padded, sweep_axis


@dataclass(frozen=True, slots=True)
class ChunkTable:
    """Chunks of some tensors.

    Attributes:
        ends: [tensors + 1] chunks of a tensor are consecutive.
        item_bytes: [tensors] bytes per element.
        file, start: [chunks] where each lies.
        offset, size: [chunks, width] regions, padded in front.
    """

    ends: Int64s
    item_bytes: Int64s
    file: Int64s
    start: Int64s
    offset: Int64s
    size: Int64s

    @property
    def width(self) -> int:
        """Number of columns of a region."""
        return int(self.offset.shape[1])


@dataclass(frozen=True, slots=True)
class WantedTable:
    """Regions to be filled.

    Attributes:
        tensor: [wanted] row of the tensor in the chunk table.
        offset, size: [wanted, width] regions, padded in front.
        partial: [wanted] elements that no chunk holds are fine.
    """

    tensor: Int64s
    offset: Int64s
    size: Int64s
    partial: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a chunk as bytes of a file.

    Attributes:
        wanted: row of the wanted table.
        chunk: row of the chunk table.
        offset, size: the box in the global tensor, padded in front.
        start, stop: bytes of the file from the box's first element to its last.
    """

    wanted: int
    chunk: int
    offset: tuple[int, ...]
    size: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Read:
    """Consecutive bytes of one file, and the pieces among them."""

    file: int
    start: int
    stop: int
    pieces: tuple[Piece, ...]


def tabulate_chunks(index: Index) -> ChunkTable:
    """All chunks of an index."""
    dims = np.diff(index.tensor_dims_ends)
    width = int(dims.max(initial=1))
    chunk_dims = np.repeat(dims, np.diff(index.tensor_chunk_ends))
    starts = np.cumsum(chunk_dims) - chunk_dims
    return ChunkTable(
        ends=index.tensor_chunk_ends,
        item_bytes=np.array(ITEM_BYTES, dtype=np.int64)[index.tensor_dtype],
        file=index.chunk_file,
        start=index.chunk_start,
        offset=ragged_to_padded(index.chunk_offset, starts, chunk_dims, 0, width),
        size=ragged_to_padded(index.chunk_size, starts, chunk_dims, 1, width),
    )


def tabulate_wanted(tensors: Sequence[int], regions: Sequence[Region], partial: Sequence[bool], width: int) -> WantedTable:
    """Regions of tensors (rows of the chunk table), padded to `width` columns."""
    offset = np.zeros((len(regions), width), dtype=np.int64)
    size = np.ones((len(regions), width), dtype=np.int64)
    for row, region in enumerate(regions):
        dims = len(region.size)
        offset[row, width - dims :] = region.offset
        size[row, width - dims :] = region.size
    return WantedTable(np.array(tensors, dtype=np.int64), offset, size, np.array(partial, dtype=bool))


def plan_load(chunks: ChunkTable, wanted: WantedTable, *, block_bytes: int, buffer_bytes: int) -> list[Read]:
    """Decide which bytes to read for which wanted regions.

    Args:
        chunks, wanted: tables of equal width.
        block_bytes: reads begin and end on multiples of this, since that is what can be verified.
        buffer_bytes: no read spans more than this, but for rounding to blocks.

    Raises:
        CorruptionError: the chunks do not hold all of a wanted region.
    """
    pieces = _pieces(chunks, _intersections(chunks, wanted), block_bytes, buffer_bytes)
    return list(_coalesced(chunks, pieces, block_bytes, buffer_bytes))


@dataclass(frozen=True, slots=True)
class _Intersections:
    wanted: Int64s
    chunk: Int64s
    offset: Int64s
    size: Int64s


_PAIRS_PER_BATCH = 1 << 19


def _intersections(chunks: ChunkTable, wanted: WantedTable) -> _Intersections:
    """All pairs of a wanted region and a chunk that share elements."""
    order, first, stop = _candidates(chunks, wanted)
    counts = np.maximum(stop - first, 0)
    parts = []
    # Batches of whole rows, so that memory is bounded however many candidates there are.
    ends = np.cumsum(counts)
    row = 0
    while row < len(counts):
        base = int(ends[row - 1]) if row else 0
        last = max(row + 1, int(np.searchsorted(ends, base + _PAIRS_PER_BATCH, side="right")))
        parts.append(_matching_pairs(chunks, wanted, order, first[row:last], counts[row:last], row))
        row = last
    found = _Intersections(
        *(
            np.concatenate([getattr(part, name) for part in parts] or [empty])
            for name, empty in zip(("wanted", "chunk", "offset", "size"), _nothing(chunks.width), strict=True)
        )
    )
    held = np.zeros(len(counts), dtype=np.int64)
    np.add.at(held, found.wanted, found.size.prod(axis=1))
    lacking = np.flatnonzero((held != wanted.size.prod(axis=1)) & ~wanted.partial)
    if len(lacking):
        raise CorruptionError(
            f"the index holds {int(held[lacking[0]])} of the {int(wanted.size[lacking[0]].prod())} elements of wanted "
            f"region {int(lacking[0])}, tensor {int(wanted.tensor[lacking[0]])}: chunks are missing or overlap"
        )
    return found


def _nothing(width: int) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    rows, table = np.zeros(0, dtype=np.int64), np.zeros((0, width), dtype=np.int64)
    return rows, rows, table, table


def _matching_pairs(
    chunks: ChunkTable, wanted: WantedTable, order: Int64s, first: Int64s, counts: Int64s, base: int
) -> _Intersections:
    """The candidates of consecutive wanted rows that do share elements."""
    row = np.repeat(np.arange(len(counts)), counts)
    chunk = order[np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)]
    row = row + base
    low = np.maximum(wanted.offset[row], chunks.offset[chunk])
    high = np.minimum(wanted.offset[row] + wanted.size[row], chunks.offset[chunk] + chunks.size[chunk])
    hit = np.flatnonzero((low < high).all(axis=1))
    return _Intersections(row[hit], chunk[hit], low[hit], high[hit] - low[hit])


def _candidates(chunks: ChunkTable, wanted: WantedTable) -> tuple[Int64s, Int64s, Int64s]:
    """Chunks in an order, and for each wanted region the range of it outside which no chunk can meet it.

    Per tensor, chunks are sorted by where they begin along the axis with most distinct beginnings. Those that begin
    before a wanted region ends are a prefix; those that end before it begins are left out by the largest end so far.
    """
    tensor = np.repeat(np.arange(len(chunks.ends) - 1), np.diff(chunks.ends))
    if not len(tensor) or not len(wanted.tensor):
        zeros = np.zeros(len(wanted.tensor), dtype=np.int64)
        return np.zeros(0, dtype=np.int64), zeros, zeros
    axis = np.zeros(len(chunks.ends) - 1, dtype=np.int64)
    axis[tensor] = sweep_axis(tensor, chunks.offset)
    rows, asked = np.arange(len(tensor)), np.arange(len(wanted.tensor))
    start = chunks.offset[rows, axis[tensor]]
    end = start + chunks.size[rows, axis[tensor]]
    low = wanted.offset[asked, axis[wanted.tensor]]
    high = low + wanted.size[asked, axis[wanted.tensor]]
    coordinates = np.unique(np.concatenate((start, end, low, high)))
    step = np.int64(len(coordinates) + 1)

    def key(tensors: Int64s, values: Int64s) -> Int64s:
        # Coordinates as ranks among all coordinates, so that (tensor, coordinate) fits one integer.
        found: Int64s = tensors * step + np.searchsorted(coordinates, values)
        return found

    order = np.lexsort((start, tensor))
    starts, largest = key(tensor, start)[order], np.maximum.accumulate(key(tensor, end)[order])
    first = np.searchsorted(largest, key(wanted.tensor, low), side="right")
    stop = np.searchsorted(starts, key(wanted.tensor, high), side="left")
    return order, first, stop


def _strides(size: Int64s) -> Int64s:
    """[rows, width] elements between neighbours along each axis of row-major boxes."""
    strides = np.ones_like(size)
    if size.shape[1] > 1:
        strides[:, :-1] = np.cumprod(size[:, :0:-1], axis=1)[:, ::-1]
    return strides


def _pieces(chunks: ChunkTable, found: _Intersections, block_bytes: int, buffer_bytes: int) -> list[Piece]:
    item = np.repeat(chunks.item_bytes, np.diff(chunks.ends))[found.chunk]
    strides = _strides(chunks.size[found.chunk])
    begin = ((found.offset - chunks.offset[found.chunk]) * strides).sum(axis=1) * item + chunks.start[found.chunk]
    span = (((found.size - 1) * strides).sum(axis=1) + 1) * item
    waste = span - found.size.prod(axis=1) * item
    whole = (span <= buffer_bytes) & (waste < block_bytes)
    stop = begin + span
    pieces = []
    columns = (found.wanted, found.chunk, found.offset, found.size, begin, stop, strides, item, whole)
    for wanted, chunk, offset, size, low, high, stride, item_bytes, fits in zip(*(c.tolist() for c in columns), strict=True):
        if fits:
            pieces.append(Piece(wanted, chunk, tuple(offset), tuple(size), low, high))
        else:
            box = _Box(tuple(offset), tuple(size), low)
            byte_strides = tuple(step * item_bytes for step in stride)
            for part in _divided(box, byte_strides, item_bytes, block_bytes, buffer_bytes):
                end = part.start + _span(part.size, byte_strides, item_bytes)
                pieces.append(Piece(wanted, chunk, part.offset, part.size, part.start, end))
    return pieces


@dataclass(frozen=True, slots=True)
class _Box:
    """A box and the byte of the file at which its first element lies."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    start: int


def _span(size: Sequence[int], byte_strides: Sequence[int], item_bytes: int) -> int:
    return sum((count - 1) * stride for count, stride in zip(size, byte_strides, strict=True)) + item_bytes


def _divided(box: _Box, byte_strides: tuple[int, ...], item_bytes: int, block_bytes: int, buffer_bytes: int) -> Iterator[_Box]:
    """Boxes that partition `box`, each spanning at most `buffer_bytes` and without gaps of a block or more."""
    axis = next((axis for axis, count in enumerate(box.size) if count > 1), None)
    span = _span(box.size, byte_strides, item_bytes)
    if axis is None:
        yield box
        return
    inner = _span((1,) * (axis + 1) + box.size[axis + 1 :], byte_strides, item_bytes)
    gap = byte_strides[axis] - inner
    inner_waste = inner - item_bytes * int(np.prod(box.size[axis + 1 :], dtype=np.int64))
    if gap < block_bytes and inner_waste < block_bytes and span <= buffer_bytes:
        yield box
        return
    step = 1 if gap >= block_bytes or inner_waste >= block_bytes else max(1, (buffer_bytes - inner) // byte_strides[axis] + 1)
    for first in range(0, box.size[axis], step):
        count = min(step, box.size[axis] - first)
        part = _Box(
            (*box.offset[:axis], box.offset[axis] + first, *box.offset[axis + 1 :]),
            (*box.size[:axis], count, *box.size[axis + 1 :]),
            box.start + first * byte_strides[axis],
        )
        if count == 1:
            yield from _divided(part, byte_strides, item_bytes, block_bytes, buffer_bytes)
        else:
            yield part


def _coalesced(chunks: ChunkTable, pieces: list[Piece], block_bytes: int, buffer_bytes: int) -> Iterator[Read]:
    """Pieces in file order, joined while they touch each other's blocks and fit a buffer."""
    files = chunks.file.tolist()
    pieces.sort(key=lambda piece: (files[piece.chunk], piece.start))
    group: list[Piece] = []
    file, start, stop = -1, 0, 0
    for piece in pieces:
        low, high = piece.start // block_bytes * block_bytes, -(-piece.stop // block_bytes) * block_bytes
        joins = file == files[piece.chunk] and low <= stop and max(stop, high) - start <= buffer_bytes + 2 * block_bytes
        if group and not joins:
            yield Read(file, start, stop, tuple(group))
            group = []
        if not group:
            file, start, stop = files[piece.chunk], low, high
        group.append(piece)
        stop = max(stop, high)
    if group:
        yield Read(file, start, stop, tuple(group))
