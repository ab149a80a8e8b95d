"""A tensor cut into a bounded grid of cells, and who holds what of each: the picture that `drawing` draws, without the lines.

Axes of length 1 do not count. Of the others, two are drawn, those that are cut before those that are not; a cell spans the
tensor along all further ones.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from giantstep.planning.description import COPY, IMPLICIT, MAIN
from giantstep.shards.region import Region, overlapping_pair, subtract

# A cell with an overlap among more regions than this is not searched for gaps besides.
_SEARCHED = 200


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank holds of a tensor.

    Attributes:
        rank: who holds it.
        role: MAIN, COPY or IMPLICIT.
        regions: of the tensor, empty ones left out; several for a flat range.
    """

    rank: int
    role: int
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """Who holds a part of a tensor.

    Attributes:
        shards: positions, among all shards, of those that hold some of it.
        mains, equals, copies: ranks with MAIN, IMPLICIT and COPY shards, ascending.
        gap: some of it is held by no main replica.
        twice: some of it is held by several.
        several: it holds more than one region.
    """

    shards: frozenset[int] = frozenset()
    mains: tuple[int, ...] = ()
    equals: tuple[int, ...] = ()
    copies: tuple[int, ...] = ()
    gap: bool = False
    twice: bool = False
    several: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells by row and column.

    Attributes:
        axes: the tensor's axes that are drawn as rows and columns; None where there is no such axis.
        rows, columns: where cells begin along these axes, and where the last ones end.
        cells: [row][column].
        coarse: neighbouring parts were joined to keep the grid small.
    """

    axes: tuple[int | None, int | None]
    rows: list[int]
    columns: list[int]
    cells: list[list[Cell]]
    coarse: bool


@dataclass(slots=True)
class _Content:
    """What lies in a cell: whole regions with the part that is inside, and the shards that they belong to."""

    shards: set[int] = field(default_factory=set)
    regions: dict[Region, Region] = field(default_factory=dict)
    mains: list[Region] = field(default_factory=list)


def long_axes(shape: Sequence[int]) -> list[int]:
    """Axes of more than one element."""
    return [axis for axis, size in enumerate(shape) if size > 1]


def grid_of(shape: Sequence[int], shards: Sequence[Shard], *, max_rows: int, max_columns: int, upright: bool = False) -> Grid:
    """Cut a tensor where its shards begin and end.

    Args:
        shape: its global shape, without zeros.
        shards: in any order.
        max_rows, max_columns: neighbouring parts are joined where there would be more.
        upright: draw a tensor with one axis from top to bottom instead of from left to right.
    """
    regions = [region for shard in shards for region in shard.regions]
    axes = _drawn_axes(shape, regions)
    drawn: tuple[int | None, int | None] = (None, axes[0] if axes else None)
    if len(axes) > 1 or upright:
        drawn = (axes[0] if axes else None, axes[1] if len(axes) > 1 else None)
    all_rows, all_columns = (_cuts(axis, shape, regions) for axis in drawn)
    rows, columns = _thinned(all_rows, max_rows), _thinned(all_columns, max_columns)
    contents = _contents(shards, drawn, rows, columns)
    cells = []
    for row in range(len(rows) - 1):
        line = []
        for column in range(len(columns) - 1):
            whole = _clipped(Region.whole(shape), drawn, rows[row : row + 2], columns[column : column + 2])
            content = contents.get((row, column))
            line.append(Cell(gap=True) if content is None else _cell(content, shards, whole))
        cells.append(line)
    coarse = len(rows) < len(all_rows) or len(columns) < len(all_columns)
    return Grid(drawn, rows, columns, cells, coarse)


def _drawn_axes(shape: Sequence[int], regions: Sequence[Region]) -> list[int]:
    """At most two axes, ascending."""
    long = long_axes(shape)
    cut = [axis for axis in long if any(region.size[axis] < shape[axis] for region in regions)]
    return sorted([*cut, *(axis for axis in long if axis not in cut)][:2])


def _cuts(axis: int | None, shape: Sequence[int], regions: Iterable[Region]) -> list[int]:
    if axis is None:
        return [0, 1]
    ends = {point for region in regions for point in (region.offset[axis], region.end[axis])}
    return sorted(ends | {0, shape[axis]})


def _thinned(cuts: list[int], parts: int) -> list[int]:
    if len(cuts) - 1 <= parts:
        return cuts
    return [cuts[place * (len(cuts) - 1) // parts] for place in range(parts + 1)]


def _contents(
    shards: Sequence[Shard], axes: tuple[int | None, int | None], rows: list[int], columns: list[int]
) -> dict[tuple[int, int], _Content]:
    found: dict[tuple[int, int], _Content] = {}
    for number, shard in enumerate(shards):
        for region in shard.regions:
            for row in _touched(region, axes[0], rows):
                for column in _touched(region, axes[1], columns):
                    content = found.setdefault((row, column), _Content())
                    content.shards.add(number)
                    if shard.role == COPY:
                        continue
                    content.regions[region] = _clipped(region, axes, rows[row : row + 2], columns[column : column + 2])
                    if shard.role == MAIN:
                        content.mains.append(region)
    return found


def _touched(region: Region, axis: int | None, cuts: list[int]) -> range:
    """Parts between `cuts` that the region meets."""
    if axis is None:
        return range(1)
    return range(bisect_right(cuts, region.offset[axis]) - 1, bisect_left(cuts, region.end[axis]))


def _clipped(region: Region, axes: tuple[int | None, int | None], *spans: list[int]) -> Region:
    low, high = list(region.offset), list(region.end)
    for axis, (start, stop) in zip(axes, spans, strict=True):
        if axis is not None:
            low[axis], high[axis] = max(low[axis], start), min(high[axis], stop)
    return Region(tuple(low), tuple(stop - start for start, stop in zip(low, high, strict=True)))


def _cell(content: _Content, shards: Sequence[Shard], whole: Region) -> Cell:
    held = sorted(content.shards)
    by_role = {role: sorted({shards[n].rank for n in held if shards[n].role == role}) for role in (MAIN, IMPLICIT, COPY)}
    parts = list(content.regions.values())
    overlap = _overlap(parts)
    return Cell(
        frozenset(held),
        tuple(by_role[MAIN]),
        tuple(by_role[IMPLICIT]),
        tuple(by_role[COPY]),
        gap=_has_gap(whole, parts, overlap=overlap),
        twice=overlap or len(content.mains) > len(set(content.mains)),
        several=len(parts) > 1,
    )


def _overlap(parts: Sequence[Region]) -> bool:
    if len(parts) < 2:
        return False
    # A 0-d tensor has one region only, so there is an axis here.
    offset, size = (np.array([getattr(part, name) for part in parts], dtype=np.int64) for name in ("offset", "size"))
    return overlapping_pair(np.zeros(len(parts), dtype=np.int64), offset, size) is not None


def _has_gap(whole: Region, parts: Sequence[Region], *, overlap: bool) -> bool:
    if not overlap:
        return sum(part.elements for part in parts) < math.prod(whole.size)
    left = [whole] if len(parts) <= _SEARCHED else []
    for part in parts:
        left = [rest for region in left for rest in subtract(region, part)]
    return bool(left)
