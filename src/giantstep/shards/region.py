"""Regions: n-d boxes inside a global tensor, one by one and as arrays of many.

A table of regions is a pair of int64 arrays `offsets`, `sizes` of shape [rows, dims]. Tables that mix
tensors of several ranks pad each row *in front* with offset 0 and size 1, which leaves row-major order
and volumes unchanged. Not here: which rank holds what, bytes in files.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import BadArgumentError

Int64s: TypeAlias = NDArray[np.int64]

MAX_DIMS = 64
MAX_ELEMENTS = 1 << 62


@dataclass(frozen=True, slots=True)
class Region:
    """A box of `size` elements beginning at `offset`; both have one entry per dimension."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offset) != len(self.size):
            raise BadArgumentError(f"region offset {self.offset} and size {self.size} differ in their number of dimensions")
        if min(self.offset, default=0) < 0 or min(self.size, default=0) < 0:
            raise BadArgumentError(f"region offset {self.offset} and size {self.size} must not be negative")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """The region that is all of a tensor of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def elements(self) -> int:
        """Number of elements; 1 for the region of a 0-d tensor."""
        return math.prod(self.size)

    @property
    def end(self) -> tuple[int, ...]:
        """One past the last index, per dimension."""
        return tuple([start + count for start, count in zip(self.offset, self.size, strict=True)])

    def intersect(self, other: Region) -> Region:
        """The common box; some size is 0 where there is none."""
        offset = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        end = (min(a, b) for a, b in zip(self.end, other.end, strict=True))
        return Region(offset, tuple(max(0, stop - start) for start, stop in zip(offset, end, strict=True)))

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the region lies inside a tensor of `shape`."""
        return len(shape) == len(self.size) and all(stop <= size for stop, size in zip(self.end, shape, strict=True))

    def relative_to(self, origin: Sequence[int]) -> Region:
        """The same box with `origin` as its zero."""
        return Region(tuple(a - b for a, b in zip(self.offset, origin, strict=True)), self.size)

    def slices(self) -> tuple[slice, ...]:
        """Indexing that cuts the region out of an array of the global shape."""
        return tuple([slice(start, start + count) for start, count in zip(self.offset, self.size, strict=True)])

    def __str__(self) -> str:
        return "[" + ",".join([f"{start}:{start + count}" for start, count in zip(self.offset, self.size, strict=True)]) + "]"


def as_ints(values: Sequence[int], what: str) -> tuple[int, ...]:
    """The values as a tuple of ints; raises `BadArgumentError` naming `what` where one is no integer."""
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError as error:
        raise BadArgumentError(f"{what} must be integers, not {values!r}") from error


def check_shape(shape: Sequence[int], what: str) -> tuple[int, ...]:
    """The shape as a tuple of ints that a tensor can have; raises `BadArgumentError` naming `what` otherwise."""
    result = as_ints(shape, f"the shape of {what}")
    # Of an empty tensor the dimensions that are not 0 count: readers refuse others.
    if len(result) > MAX_DIMS or any(part < 0 for part in result) or math.prod(part or 1 for part in result) > MAX_ELEMENTS:
        raise BadArgumentError(
            f"{what} cannot have shape {result}: expected at most {MAX_DIMS} dimensions, none negative, "
            f"and at most 2**62 elements, dimensions of 0 not counted"
        )
    return result


def is_shape(shape: object) -> bool:
    """Whether `check_shape` would return the shape as it is: a tuple of ints, in bounds."""
    if type(shape) is not tuple or len(shape) > MAX_DIMS:
        return False
    elements = 1
    for part in shape:
        if type(part) is not int or part < 0:
            return False
        elements *= part or 1
    return elements <= MAX_ELEMENTS


def split_region(region: Region, max_elements: int) -> Iterator[Region]:
    """Boxes of at most `max_elements` that partition the region in row-major order.

    Cuts as far out as possible: whole leading slices while one fits, else slice by slice further in.
    """
    if region.elements <= max_elements:
        if region.elements:
            yield region
        return
    axis = next(axis for axis, count in enumerate(region.size) if count > 1)
    slice_elements = region.elements // region.size[axis]
    step = max(1, max_elements // slice_elements)
    for start in range(0, region.size[axis], step):
        count = min(step, region.size[axis] - start)
        part = Region(
            (*region.offset[:axis], region.offset[axis] + start, *region.offset[axis + 1 :]),
            (*region.size[:axis], count, *region.size[axis + 1 :]),
        )
        yield from split_region(part, max_elements)


def subtract(region: Region, hole: Region) -> list[Region]:
    """Boxes that partition `region` without `hole`; at most two per dimension."""
    common = region.intersect(hole)
    if not common.elements:
        return [region] if region.elements else []
    parts: list[Region] = []
    offset, size = list(region.offset), list(region.size)
    for axis in range(len(size)):
        before = common.offset[axis] - offset[axis]
        after = offset[axis] + size[axis] - common.end[axis]
        for start, count in ((offset[axis], before), (common.end[axis], after)):
            if count:
                parts.append(Region((*offset[:axis], start, *offset[axis + 1 :]), (*size[:axis], count, *size[axis + 1 :])))
        offset[axis], size[axis] = common.offset[axis], common.size[axis]
    return parts


def volumes(sizes: Int64s) -> Int64s:
    """[rows] elements of each box of a table; column by column, which for few columns is many times faster than by row."""
    result = sizes[:, 0].copy()
    for axis in range(1, sizes.shape[1]):
        result *= sizes[:, axis]
    return result


def same_rows(a: Int64s, b: Int64s) -> NDArray[np.bool_]:
    """[rows] whether the rows of two tables are equal; column by column."""
    result: NDArray[np.bool_] = a[:, 0] == b[:, 0]
    for axis in range(1, a.shape[1]):
        result &= a[:, axis] == b[:, axis]
    return result


def ragged_to_padded(values: Int64s, starts: Int64s, dims: Int64s, pad: int, width: int) -> Int64s:
    """Rows of `dims[i]` values beginning at `values[starts[i]]` as a [rows, width] table, padded in front."""
    rows = len(dims)
    if rows and bool((dims == width).all()) and bool((np.diff(starts) == width).all()):
        # Rows that lie one after another, without a pad, are a table already.
        first = int(starts[0])
        return values[first : first + rows * width].reshape(rows, width).astype(np.int64)
    table = np.full((rows, width), pad, dtype=np.int64)
    for count in np.unique(dims):
        if count:
            chosen = np.flatnonzero(dims == count)
            table[chosen, width - int(count) :] = values[starts[chosen, None] + np.arange(int(count))]
    return table


def padded_to_ragged(table: Int64s, dims: Int64s) -> Int64s:
    """Inverse of `ragged_to_padded`: the last `dims[i]` values of each row, one after another."""
    keep = np.arange(table.shape[1])[None, :] >= (table.shape[1] - dims)[:, None]
    values: Int64s = table[keep]
    return values


def overlapping_pair(tensors: Int64s, offsets: Int64s, sizes: Int64s) -> tuple[int, int] | None:
    """Two rows of one tensor whose regions share an element, or None.

    Args:
        tensors: [rows], the tensor of each row.
        offsets, sizes: [rows, dims] table; rows of size 0 never overlap.

    A sweep per tensor over the dimension with most distinct starts, so that a grid of shards costs about
    rows x (shards along its other dimensions) comparisons, done in bounded batches.
    """
    kept = np.flatnonzero((sizes > 0).all(axis=1))
    if len(kept) < 2:
        return None
    tensors, offsets, sizes = tensors[kept], offsets[kept], sizes[kept]
    axis = sweep_axis(tensors, offsets)
    rows = np.arange(len(kept))
    start, stop = offsets[rows, axis], offsets[rows, axis] + sizes[rows, axis]
    # Coordinates become ranks among all coordinates, so that (tensor, coordinate) fits one integer.
    coordinates = np.unique(np.concatenate((start, stop)))
    base = tensors * np.int64(len(coordinates) + 1)
    start_key = base + np.searchsorted(coordinates, start)
    stop_key = base + np.searchsorted(coordinates, stop)
    order = np.argsort(start_key, kind="stable")
    start_key, stop_key = start_key[order], stop_key[order]
    last = np.searchsorted(start_key, stop_key, side="left")
    return _first_overlap(order, last, offsets, sizes, kept)


def sweep_axis(tensors: Int64s, offsets: Int64s) -> Int64s:
    """[rows] the dimension in which each row's tensor has most distinct starts; at least one row."""
    count = int(tensors.max()) + 1
    distinct = np.zeros((count, offsets.shape[1]), dtype=np.int64)
    for axis in range(offsets.shape[1]):
        order = np.lexsort((offsets[:, axis], tensors))
        sorted_tensors, sorted_starts = tensors[order], offsets[order, axis]
        new = np.ones(len(order), dtype=bool)
        new[1:] = (sorted_tensors[1:] != sorted_tensors[:-1]) | (sorted_starts[1:] != sorted_starts[:-1])
        distinct[:, axis] = np.bincount(sorted_tensors[new], minlength=count)
    best: Int64s = distinct.argmax(axis=1).astype(np.int64)
    return best[tensors]


_PAIRS_PER_BATCH = 1 << 20


def _first_overlap(order: Int64s, last: Int64s, offsets: Int64s, sizes: Int64s, kept: Int64s) -> tuple[int, int] | None:
    """Test each sorted row i against rows i+1 .. last[i]-1, a bounded number of pairs at a time."""
    rows = np.arange(len(order))
    counts = np.maximum(last - rows - 1, 0)
    ends = np.cumsum(counts)
    total, done = int(ends[-1]), 0
    while done < total:
        pair = np.arange(done, min(total, done + _PAIRS_PER_BATCH))
        left = np.searchsorted(ends, pair, side="right")
        right = left + 1 + pair - (ends[left] - counts[left])
        a, b = order[left], order[right]
        low = np.maximum(offsets[a], offsets[b])
        high = np.minimum(offsets[a] + sizes[a], offsets[b] + sizes[b])
        hits = np.flatnonzero((low < high).all(axis=1))
        if len(hits):
            return int(kept[a[hits[0]]]), int(kept[b[hits[0]]])
        done += len(pair)
    return None
