"""Which pieces of a load are read straight to where they are wanted, and to which memory.

Pure: memory is known by its addresses. Called by `reading.placing`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.planning.load_plan import LoadPlan
from giantstep.planning.load_tables import WantedTable, row_strides
from giantstep.shards.region import Int64s, volumes


@dataclass(frozen=True, slots=True)
class Memory:
    """Where wanted regions lie in memory.

    Attributes:
        start: [wanted] address of the first element; 0 where elements are not to lie as they are stored: they are cast,
            compared, or sent to another device.
        strides: [wanted, width] bytes between neighbours along each axis; those of axes of length 1 do not count.
    """

    start: Int64s
    strides: Int64s


def nowhere(wanted: WantedTable) -> Memory:
    """Regions that nothing is read straight to."""
    return Memory(np.zeros(len(wanted.tensor), dtype=np.int64), np.zeros_like(wanted.size))


@dataclass(frozen=True, slots=True)
class Runs:
    """What is read straight to memory. Pieces that follow each other both in the file and in memory are one run.

    Attributes:
        start, stop: [runs] positions of the bytes; ascending.
        address: [runs] where the first byte is to lie.
        first: [runs] row of the first piece.
        left: rows of the pieces that are in no run, ascending.
    """

    start: Int64s
    stop: Int64s
    address: Int64s
    first: Int64s
    left: Int64s


def lie_alone(plan: LoadPlan) -> NDArray[np.bool_]:
    """[pieces] whether the elements follow each other in the file, and no byte of them belongs to another piece."""
    pieces = plan.pieces
    dense = pieces.stop - pieces.start == volumes(pieces.size) * plan.chunks.chunk_item_bytes()[pieces.chunk]
    # Pieces are in order of their first bytes.
    before = np.concatenate(([0], np.maximum.accumulate(pieces.stop)))[: len(pieces)]
    after = np.append(pieces.start, np.iinfo(np.int64).max)[1:]
    alone: NDArray[np.bool_] = dense & (before <= pieces.start) & (pieces.stop <= after)
    return alone


def runs_in_place(plan: LoadPlan, memory: Memory) -> Runs:
    """The runs of a plan whose wanted regions lie in `memory`. No run goes beyond a read."""
    pieces = plan.pieces
    address = _addresses(plan, memory)
    rows = np.flatnonzero(address)
    start, stop, address = pieces.start[rows], pieces.stop[rows], address[rows]
    follows = (start[1:] == stop[:-1]) & (address[1:] - address[:-1] == stop[:-1] - start[:-1])
    begins = np.isin(rows, np.array([read.first for read in plan.reads], dtype=np.int64))
    first = np.flatnonzero(begins | np.concatenate((np.ones(min(1, len(rows)), dtype=bool), ~follows)))
    last = np.append(first[1:], len(rows))[: len(first)] - 1
    missing = np.ones(len(pieces), dtype=bool)
    missing[rows] = False
    return Runs(start[first], stop[last], address[first], rows[first], np.flatnonzero(missing))


def _addresses(plan: LoadPlan, memory: Memory) -> Int64s:
    """[pieces] where the bytes of a piece can be read to as they lie in the file; 0 where they cannot."""
    pieces = plan.pieces
    start, strides = memory.start[pieces.wanted], memory.strides[pieces.wanted]
    dense = row_strides(pieces.size, plan.chunks.chunk_item_bytes()[pieces.chunk])
    offset = pieces.offset - plan.wanted.offset[pieces.wanted]
    fits = (start != 0) & lie_alone(plan)
    for axis in range(strides.shape[1]):
        fits &= (pieces.size[:, axis] == 1) | (strides[:, axis] == dense[:, axis])
        start += offset[:, axis] * strides[:, axis]
    return np.where(fits, start, 0)
