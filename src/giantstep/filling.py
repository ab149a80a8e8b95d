"""Memory that is filled on load: which regions are wanted, who shares memory, and the sinks that write to it.

Two tensors of a state dict may be one piece of memory (tied weights). If the checkpoint stores them as one, it is
filled once; if it stores two, one is loaded and the other compared with it. Tensors without memory get it here, tied
ones together. Called by `load`.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from giantstep.errors import BadArgumentError
from giantstep.mapping.leaves import TensorLeaf
from giantstep.mapping.overlap import disjoint, memory_of, span_of
from giantstep.reading.fetch import Sink
from giantstep.reading.tensor_sink import CompareSink, sink_for
from giantstep.requesting import Matched, StoredState
from giantstep.shards.region import Region
from giantstep.words import words_of

_MOST_TESTS = 20_000


class Wanted(NamedTuple):
    """A region of a leaf that is to be filled from row `row` of the index.

    Attributes:
        overlaps: whether some of its memory is, or may be, that of another region that is filled.
    """

    leaf: TensorLeaf
    piece: int
    row: int
    overlaps: bool = False

    @property
    def region(self) -> Region:
        """The region of the global tensor."""
        return self.leaf.pieces[self.piece][0]

    @property
    def view(self) -> torch.Tensor:
        """The memory of the region; raises `BadArgumentError` before it is allocated."""
        view = self.leaf.pieces[self.piece][1]
        if view is None:
            raise BadArgumentError(f"tensor {self.leaf.key!r} has no memory")
        return view


@dataclass(frozen=True, slots=True)
class Filling:
    """What is filled and what is compared.

    Attributes:
        filled: regions that are read into memory.
        compared: regions whose memory others fill: what is stored for them must be equal.
    """

    filled: list[Wanted]
    compared: list[Wanted]


def plan_filling(matched: Matched, stored: StoredState) -> Filling:
    """Give memory to tensors that have none, and decide which regions are read.

    Raises:
        BadArgumentError: tensors that cannot be compared with what is stored for them share memory with others.
    """
    _allocate(matched.tensors, stored)
    filled: list[Wanted] = []
    compared: list[Wanted] = []
    begins: dict[int, Wanted] = {}
    # Few regions begin where another does, and only those are looked at more closely.
    again: dict[int, list[Wanted]] = {}
    for leaf, row in matched.tensors:
        for piece, (region, view) in enumerate(leaf.pieces):
            if view is None or not view.numel():
                continue
            wanted = Wanted(leaf, piece, row)
            begin = view.data_ptr()
            first = begins.setdefault(begin, wanted)
            if first is wanted:
                filled.append(wanted)
                continue
            others = again.setdefault(begin, [first])
            same = next((other for other in others if memory_of(other.view) == memory_of(view)), None)
            if same is None:
                others.append(wanted)
                filled.append(wanted)
            elif same.region != region or stored.twin[same.row] != stored.twin[row]:
                compared += [same, wanted]
    made = [view for source in matched.dequantised for _, view in source.leaf.pieces if view is not None and view.numel()]
    overlapping = _overlapping(filled, made)
    compared += overlapping
    chosen = list({id(wanted): wanted for wanted in compared}.values())
    for wanted in chosen:
        if wanted.leaf.allow_shape_mismatch and stored.shapes[wanted.row] != wanted.leaf.global_shape:
            raise BadArgumentError(
                f"tensor {wanted.leaf.key!r} is loaded with another padding into memory that it shares with another tensor of "
                "the state dict. Load it into memory of its own."
            )
    if overlapping:
        marked = set(map(id, overlapping))
        filled = [wanted._replace(overlaps=True) if id(wanted) in marked else wanted for wanted in filled]
    return Filling(filled, chosen)


def _allocate(tensors: Sequence[tuple[TensorLeaf, int]], stored: StoredState) -> None:
    """Tensors that are stored as one and are of one kind get one memory; each of several requests of one key its own."""
    seen: dict[tuple[int, int], int] = {}
    homes: dict[Hashable, tuple[TensorLeaf, int]] = {}
    tied = stored.tied_rows
    for leaf, row in tensors:
        if row not in tied:
            if leaf.lacks_memory:
                leaf.allocate()
            continue
        twin = int(stored.twin[row])
        turn = seen[twin, row] = seen.get((twin, row), -1) + 1
        home, home_row = homes.setdefault((twin, turn, leaf.layout), (leaf, row))
        if leaf.lacks_memory and home is not leaf and home_row != row:
            leaf.share(home)
        else:
            leaf.allocate()


def _overlapping(filled: Sequence[Wanted], made: Sequence[torch.Tensor]) -> list[Wanted]:
    """Regions whose memory overlaps that of others, or may, without being the same.

    Raises:
        BadArgumentError: tensors that are made by dequantising do.
    """
    # None stands for the memory of a dequantised tensor, of which nothing is stored to compare it with.
    views = [*(wanted.view for wanted in filled), *made]
    owners: list[Wanted | None] = [*filled, *([None] * len(made))]
    spans = [(*span_of(views[place]), views[place], owners[place]) for place in _near(views)]
    spans.sort(key=lambda span: span[:3])
    found: list[Wanted | None] = []
    # Spans that reach beyond where the present one begins, the first to end on top.
    active: list[tuple[tuple[tuple[str, int], int], int]] = []
    tests = 0
    for place, (device, start, stop, view, wanted) in enumerate(spans):
        while active and active[0][0] <= (device, start):
            heapq.heappop(active)
        # If very many reach over each other, to look at all pairs takes longer than to read all of them twice.
        exhausted = tests > _MOST_TESTS
        pairs = [other for _, other in active if exhausted or not disjoint(spans[other][3], view)]
        tests += len(active)
        if pairs:
            found += [spans[other][4] for other in pairs] + [wanted]
        heapq.heappush(active, ((device, stop), place))
        if exhausted:
            active = [max(active)]
    if None in found:
        raise BadArgumentError(
            "two tensors of the state dict share memory, or may, and one of them is to be dequantised from another stored "
            "tensor. Load them into memory of their own."
        )
    return [item for item in found if item is not None]


def _near(views: Sequence[torch.Tensor]) -> list[int]:
    """Which of some tensors with elements reach over memory that others of them reach over too, judged by their spans."""
    devices: dict[torch.device, int] = {}
    device, start, size = [], [], []
    for view in views:
        device.append(devices.setdefault(view.device, len(devices)))
        if view.is_contiguous():
            start.append(view.data_ptr())
            size.append(view.nbytes)
        else:
            _, low, high = span_of(view)
            start.append(low)
            size.append(high - low)
    devices_of, starts = np.array(device, dtype=np.int64), np.array(start, dtype=np.int64)
    order = np.lexsort((starts, devices_of))
    devices_of, starts = devices_of[order], starts[order]
    ends = starts + np.array(size, dtype=np.int64)[order]
    meets = np.zeros(len(order) + 1, dtype=bool)
    for number in range(len(devices)):
        low, high = (int(place) for place in np.searchsorted(devices_of, (number, number + 1)))
        meets[low + 1 : high] = starts[low + 1 : high] < np.maximum.accumulate(ends[low:high])[:-1]
    near: list[int] = order[meets[:-1] | meets[1:]].tolist()
    return near


class _Shared:
    """A sink whose memory is not given away: bytes that were read to where others are read to could not be checked there."""

    def __init__(self, sink: Sink) -> None:
        self.put = sink.put

    def memory(self, offset: tuple[int, ...], size: tuple[int, ...]) -> None:
        """None: see `Sink`."""


def fill_sinks(wanted: Sequence[Wanted], stored: StoredState) -> list[Sink]:
    """A sink per region. Rows that the stored tensor may not have become zero."""
    sinks = []
    for leaf, piece, row, overlaps in wanted:
        region, view = leaf.pieces[piece]
        if view is None:
            raise BadArgumentError(f"tensor {leaf.key!r} has no memory")
        if leaf.extent.allow_shape_mismatch:
            lazy = view.is_conj() or view.is_neg()
            (view if lazy else words_of(view)).zero_()
        sink = sink_for(view, stored.dtypes[row], region.offset)
        sinks.append(_Shared(sink) if overlaps else sink)
    return sinks


def compare_sinks(wanted: Sequence[Wanted], stored: StoredState) -> list[Sink]:
    """A sink per region that raises where what is stored is not what the memory holds."""
    return [CompareSink(item.view, stored.dtypes[item.row], item.region.offset, item.leaf.key) for item in wanted]
