"""A local tensor whose axes are put together of runs of the axes of global tensors: fused weights, groups of experts.

Along each axis the local tensor is a sequence of runs, each consecutive in the global axis too, so that it consists of
boxes, one for each choice of runs. It may lie in memory in another shape, and with its axes in another order. Pure integer
work; called by `mapping.arranged`. Not here: which runs a weight has (`axis_layouts`), memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from giantstep.errors import BadArgumentError
from giantstep.shards.flat import flat_range_to_regions
from giantstep.shards.region import Region


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive indices of a local axis that are consecutive in a global axis.

    Attributes:
        start: the first of them in the global axis.
        count: how many.
        tensor: which of the axis's global tensors, where it has several.
        replica: 0 on the rank that is to write them, another number on ranks that hold copies.
    """

    start: int
    count: int
    tensor: int = 0
    replica: int = 0


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a local tensor.

    Attributes:
        runs: in local order; neighbours that are one run are joined.
        lengths: of the global axis, for each of the global tensors that the local one is stored as.
        names: what they add to its key; mostly there is one, which adds nothing.
    """

    runs: tuple[Run, ...]
    lengths: tuple[int, ...]
    names: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(_joined(self.runs)))

    @classmethod
    def whole(cls, length: int) -> Axis:
        """An axis that is not divided."""
        return cls((Run(0, length),), (length,))

    @property
    def local_length(self) -> int:
        """Length of the local axis."""
        return sum(run.count for run in self.runs)


def _joined(runs: tuple[Run, ...]) -> Iterator[Run]:
    last: Run | None = None
    for run in runs:
        if not run.count:
            continue
        if last and (last.tensor, last.replica, last.start + last.count) == (run.tensor, run.replica, run.start):
            last = Run(last.start, last.count + run.count, last.tensor, last.replica)
            continue
        if last:
            yield last
        last = run
    if last:
        yield last


@dataclass(frozen=True, slots=True)
class PlacedBox:
    """One box of the local tensor, of one of the global tensors.

    Attributes:
        tensor, replica: see `Run`.
        local: where it lies in the local tensor, in the order of the stored axes.
        offset: where it lies in the global tensor.
    """

    tensor: int
    replica: int
    local: Region
    offset: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MemoryBox:
    """A box of memory, whose elements lie together.

    Attributes:
        position: of its first element in the flattened local tensor.
        size: per axis of `Arrangement.memory_shape`.
        held: boxes, or what lies in the box of them, and the slices of it, once its axes are in stored order.
    """

    position: int
    size: tuple[int, ...]
    held: list[tuple[PlacedBox, tuple[slice, ...]]]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Where the elements of a local tensor lie in global tensors.

    Attributes:
        data_shape: of the local tensor.
        memory_shape: the same elements, row-major, with as many axes as are stored.
        order: stored axis `i` is axis `order[i]` of `memory_shape`.
        axes: stored axes; at most one of them has several global tensors.
    """

    data_shape: tuple[int, ...]
    memory_shape: tuple[int, ...]
    order: tuple[int, ...]
    axes: tuple[Axis, ...]

    def __post_init__(self) -> None:
        lengths = tuple(self.memory_shape[axis] for axis in self.order)
        described = tuple(axis.local_length for axis in self.axes)
        if math.prod(self.data_shape) != math.prod(self.memory_shape) or lengths != described:
            raise BadArgumentError(
                f"a local tensor of shape {self.data_shape} is to be stored as one of shape {lengths}, but its axes describe "
                f"{described}"
            )
        if sum(any(axis.names) for axis in self.axes) > 1:
            raise BadArgumentError("several axes are fused of tensors with names of their own: name those of one axis only")

    @property
    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and global shape of each global tensor."""
        count = max(len(axis.lengths) for axis in self.axes)
        named = next((axis for axis in self.axes if any(axis.names)), self.axes[0])
        return [
            (named.names[n], tuple(axis.lengths[n if len(axis.lengths) > 1 else 0] for axis in self.axes)) for n in range(count)
        ]

    def boxes(self) -> list[PlacedBox]:
        """The boxes of which the local tensor consists."""
        placed = [_with_places(axis.runs) for axis in self.axes]
        return [
            PlacedBox(
                sum(run.tensor for _, run in chosen),
                sum(run.replica for _, run in chosen),
                Region(tuple(first for first, _ in chosen), tuple(run.count for _, run in chosen)),
                tuple(run.start for _, run in chosen),
            )
            for chosen in itertools.product(*placed)
        ]

    def memory_boxes(self, flat: slice | None) -> list[MemoryBox]:
        """The memory of the local tensor, or of a flat range of it, as boxes, and which boxes have elements there."""
        boxes = self.boxes()
        if flat is None:
            return [MemoryBox(0, self.memory_shape, [(placed, placed.local.slices()) for placed in boxes])]
        found = []
        for position, box in flat_range_to_regions(self.memory_shape, flat.start, flat.stop):
            stored = Region(tuple(box.offset[n] for n in self.order), tuple(box.size[n] for n in self.order))
            met = [(placed, placed.local.intersect(stored)) for placed in boxes]
            held = [
                (_narrowed(placed, region), region.relative_to(stored.offset).slices())
                for placed, region in met
                if region.elements
            ]
            found.append(MemoryBox(position, box.size, held))
        return found


def _with_places(runs: tuple[Run, ...]) -> list[tuple[int, Run]]:
    """The runs with their first local indices."""
    ends = itertools.accumulate(run.count for run in runs)
    return [(end - run.count, run) for end, run in zip(ends, runs, strict=True)]


def _narrowed(placed: PlacedBox, region: Region) -> PlacedBox:
    """The box with only a region of the local tensor."""
    offset = (a + b - c for a, b, c in zip(placed.offset, region.offset, placed.local.offset, strict=True))
    return PlacedBox(placed.tensor, placed.replica, region, tuple(offset))
