"""`plan_load`: from wanted regions and stored chunks to reads and what goes where.

Each wanted region is met with the chunks of its tensor; every intersection becomes one or several pieces (`pieces`);
pieces that lie near each other are read together. Bytes that nobody wants are read only where they share a block or fill
a gap smaller than one. Data files are divided into segments, and no read crosses the border of one, so no block is read
twice by one plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from giantstep.errors import CorruptionError
from giantstep.planning.intersections import Intersections, intersections
from giantstep.planning.load_tables import ChunkTable, WantedTable
from giantstep.planning.pieces import Grid, Pieces, byte_strides, cut_pieces
from giantstep.shards.region import MAX_ELEMENTS, Int64s, volumes


@dataclass(frozen=True, slots=True)
class Read:
    """Consecutive bytes of one file; `stop` may lie behind its end.

    Attributes:
        file, start, stop: what is read.
        position: of its first byte.
        first, last: rows of the pieces that lie in it.
    """

    file: int
    start: int
    stop: int
    position: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What to read and what to make of it.

    Attributes:
        chunks, wanted: what it was made from, and the pieces refer to.
        found: the wanted boxes, from which other plans can be made.
        pieces: sorted by position.
        reads: in the order of the files; together they hold all pieces.
    """

    chunks: ChunkTable
    wanted: WantedTable
    found: Intersections
    pieces: Pieces
    reads: list[Read]

    @property
    def bytes(self) -> int:
        """Bytes to read, whole blocks."""
        return sum(read.stop - read.start for read in self.reads)


@dataclass(frozen=True, slots=True)
class Box:
    """A piece, ready to be cut out of bytes.

    Attributes:
        wanted, offset, size: as in `Pieces`.
        position: of its first byte.
        item_bytes: bytes per element.
        strides: bytes between neighbours, as they lie in the file.
    """

    wanted: int
    offset: tuple[int, ...]
    size: tuple[int, ...]
    position: int
    item_bytes: int
    strides: tuple[int, ...]


def plan_load(chunks: ChunkTable, wanted: WantedTable, *, block_bytes: int, buffer_bytes: int) -> LoadPlan:
    """Decide which bytes to read for which wanted regions.

    Args:
        chunks, wanted: tables of equal width.
        block_bytes: reads begin and end on multiples of this, since that is what can be verified.
        buffer_bytes: a segment is the whole blocks that fit this, at least one.

    Raises:
        CorruptionError: the chunks do not hold all of a wanted region, or lie where no file can reach.
    """
    found = intersections(chunks, wanted)
    segment_bytes = max(1, buffer_bytes // block_bytes) * block_bytes
    base = _bases(chunks, segment_bytes)
    pieces = cut_pieces(chunks, found, base, Grid(segment_bytes), block_bytes)
    return LoadPlan(chunks, wanted, found, pieces, list(_reads(chunks, pieces, base, block_bytes)))


def boxes(chunks: ChunkTable, pieces: Pieces, first: int, last: int) -> Iterator[Box]:
    """Pieces [first, last), one by one."""
    return boxes_at(chunks, pieces, slice(first, last))


def boxes_at(chunks: ChunkTable, pieces: Pieces, rows: slice | Int64s) -> Iterator[Box]:
    """Some pieces, one by one."""
    chunk = pieces.chunk[rows]
    item = chunks.item_bytes[np.searchsorted(chunks.ends, chunk, side="right") - 1]
    columns = (pieces.wanted[rows], pieces.offset[rows], pieces.size[rows], pieces.start[rows], item)
    strides = byte_strides(chunks, chunk, item)
    for wanted, offset, size, start, item_bytes, stride in zip(*(c.tolist() for c in (*columns, strides)), strict=True):
        yield Box(wanted, tuple(offset), tuple(size), start, item_bytes, tuple(stride))


def _bases(chunks: ChunkTable, segment_bytes: int) -> Int64s:
    """[files] where each file begins on the line of positions; a multiple of `segment_bytes`, with room for all chunks."""
    sizes = np.zeros(int(chunks.file.max(initial=-1)) + 1, dtype=np.int64)
    np.maximum.at(sizes, chunks.file, chunks.start + volumes(chunks.size) * chunks.chunk_item_bytes())
    rooms = (sizes // segment_bytes + 2) * segment_bytes
    if float(rooms.astype(np.float64).sum()) > MAX_ELEMENTS:
        raise CorruptionError(f"chunks lie in {len(sizes)} files of up to {int(sizes.max())} bytes: more than there can be")
    return np.cumsum(rooms) - rooms


def _reads(chunks: ChunkTable, pieces: Pieces, base: Int64s, block_bytes: int) -> Iterator[Read]:
    """Pieces of one segment joined while they touch each other's blocks."""
    if not len(pieces):
        return
    file = chunks.file[pieces.chunk]
    zero = base[file]
    low = zero + (pieces.start - zero) // block_bytes * block_bytes
    high = zero - (zero - pieces.stop) // block_bytes * block_bytes
    reach = np.maximum.accumulate(high)
    new = np.ones(len(pieces), dtype=bool)
    new[1:] = (low[1:] > reach[:-1]) | (pieces.span[1:] != pieces.span[:-1])
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(pieces))
    stop = np.maximum.reduceat(high, first)
    columns = (file[first], zero[first], low[first], stop, first, last)
    for number, begin, start, end, row, after in zip(*(column.tolist() for column in columns), strict=True):
        yield Read(number, start - begin, end - begin, start, row, after)
