"""Which wanted region shares elements with which chunk. Called by `load_plan` and `exchange_part`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from giantstep.errors import CorruptionError
from giantstep.planning.load_tables import ChunkTable, WantedTable
from giantstep.shards.region import Int64s, sweep_axis, volumes


@dataclass(frozen=True, slots=True)
class Intersections:
    """Boxes that a wanted region and a chunk share: rows of both, and the box in the global tensor, padded in front."""

    wanted: Int64s
    chunk: Int64s
    offset: Int64s
    size: Int64s


_PAIRS_PER_BATCH = 1 << 19
# Chunks per wanted region, on average, up to which all chunks of its tensor are met with it.
_FEW_CANDIDATES = 8


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
    np.add.at(held, found.wanted, volumes(found.size))
    lacking = np.flatnonzero((held != volumes(wanted.size)) & ~wanted.partial)
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
    first_wanted, first_held = np.take(wanted.offset, row, axis=0), np.take(chunks.offset, chunk, axis=0)
    low = np.maximum(first_wanted, first_held)
    high = np.minimum(first_wanted + np.take(wanted.size, row, axis=0), first_held + np.take(chunks.size, chunk, axis=0))
    hits = low[:, 0] < high[:, 0]
    for axis in range(1, low.shape[1]):
        hits &= low[:, axis] < high[:, axis]
    hit = np.flatnonzero(hits)
    low = np.take(low, hit, axis=0)
    return Intersections(row[hit], chunk[hit], low, np.take(high, hit, axis=0) - low)


def _candidates(chunks: ChunkTable, wanted: WantedTable) -> tuple[Int64s, Int64s, Int64s]:
    """Chunks in an order, and for each wanted region the range of it outside which no chunk can meet it.

    Per tensor, chunks are sorted by where they begin along the axis with most distinct beginnings. Those that begin
    before a wanted region ends are a prefix; those that end before it begins are left out by the largest end so far.
    """
    first, stop = chunks.ends[wanted.tensor], chunks.ends[wanted.tensor + 1]
    if int((stop - first).sum()) <= _FEW_CANDIDATES * (len(wanted.tensor) + 1):
        # To look at all chunks of all tensors takes less time than to sort them.
        return np.arange(len(chunks.file)), first, stop
    tensor = chunks.tensors()
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
