"""Which wanted region shares elements with which chunk. Called by `load_plan` and `exchange_part`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from giantstep.errors import CorruptionError
from giantstep.planning.load_tables import ChunkTable, WantedTable
from giantstep.shards.region import Int64s, sweep_axis


@dataclass(frozen=True, slots=True)
class Intersections:
    """Boxes that a wanted region and a chunk share: rows of both, and the box in the global tensor, padded in front."""

    wanted: Int64s
    chunk: Int64s
    offset: Int64s
    size: Int64s


_PAIRS_PER_BATCH = 1 << 19


def intersections(chunks: ChunkTable, wanted: WantedTable) -> Intersections:
    """All pairs of a wanted region and a chunk that share elements, by wanted region.

    Raises:
        CorruptionError: the chunks do not hold all of a wanted region that is not `partial`.
    """
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
    found = Intersections(
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
) -> Intersections:
    """The candidates of consecutive wanted rows that do share elements."""
    row = np.repeat(np.arange(len(counts)), counts)
    chunk = order[np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)]
    row = row + base
    low = np.maximum(wanted.offset[row], chunks.offset[chunk])
    high = np.minimum(wanted.offset[row] + wanted.size[row], chunks.offset[chunk] + chunks.size[chunk])
    hit = np.flatnonzero((low < high).all(axis=1))
    return Intersections(row[hit], chunk[hit], low[hit], high[hit] - low[hit])


def _candidates(chunks: ChunkTable, wanted: WantedTable) -> tuple[Int64s, Int64s, Int64s]:
    """Chunks in an order, and for each wanted region the range of it outside which no chunk can meet it.

    Per tensor, chunks are sorted by where they begin along the axis with most distinct beginnings. Those that begin
    before a wanted region ends are a prefix; those that end before it begins are left out by the largest end so far.
    """
    tensor = chunks.tensors()
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
