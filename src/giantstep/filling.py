"""Memory that is filled on load: which regions are wanted, who shares memory, and the sinks that write to it.

Two tensors of a state dict may be one piece of memory (tied weights). If the checkpoint stores them as one, it is
filled once; if it stores two, one is loaded and the other compared with it. Tensors without memory get it here, tied
ones together. Called by `load`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from giantstep.errors import BadArgumentError
from giantstep.mapping.leaves import TensorLeaf
from giantstep.mapping.overlap import memory_of
from giantstep.reading.fetch import Sink
from giantstep.reading.tensor_sink import CompareSink, sink_for
from giantstep.requesting import StoredState
from giantstep.shards.region import Region
from giantstep.words import words_of


@dataclass(frozen=True, slots=True)
class Wanted:
    """A region of a leaf that is to be filled from row `row` of the index."""

    leaf: TensorLeaf
    piece: int
    row: int

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


def plan_filling(tensors: Sequence[tuple[TensorLeaf, int]], stored: StoredState) -> Filling:
    """Give memory to tensors that have none, and decide which regions are read."""
    _allocate(tensors, stored)
    filled: list[Wanted] = []
    compared: list[Wanted] = []
    begins: dict[int, list[Wanted]] = {}
    for leaf, row in tensors:
        for piece, (region, view) in enumerate(leaf.pieces):
            if not region.elements or view is None:
                continue
            wanted = Wanted(leaf, piece, row)
            others = begins.setdefault(view.data_ptr(), [])
            same = next((other for other in others if memory_of(other.view) == memory_of(view)), None)
            if same is None:
                others.append(wanted)
                filled.append(wanted)
            elif same.region != region or stored.twin[same.row] != stored.twin[row]:
                compared.append(wanted)
    return Filling(filled, compared + _overlapping(filled))


def _allocate(tensors: Sequence[tuple[TensorLeaf, int]], stored: StoredState) -> None:
    """Tensors that are stored as one and are of one kind get one memory; each of several requests of one key its own."""
    seen: dict[tuple[int, int], int] = {}
    homes: dict[Hashable, tuple[TensorLeaf, int]] = {}
    tied = stored.tied_rows
    for leaf, row in tensors:
        if row not in tied:
            leaf.allocate()
            continue
        twin = int(stored.twin[row])
        turn = seen[twin, row] = seen.get((twin, row), -1) + 1
        home, home_row = homes.setdefault((twin, turn, leaf.layout), (leaf, row))
        if leaf.lacks_memory and home is not leaf and home_row != row:
            leaf.share(home)
        else:
            leaf.allocate()


def _overlapping(filled: Sequence[Wanted]) -> list[Wanted]:
    """Of contiguous regions, those whose memory overlaps that of others without being the same."""
    spans = []
    for wanted in filled:
        view = wanted.view
        if view.is_contiguous() and view.device.type != "meta":
            start, device = view.data_ptr(), (view.device.type, view.device.index or 0)
            spans.append((device, start, start + view.numel() * view.element_size(), wanted))
    spans.sort(key=lambda span: span[:3])
    found: dict[int, Wanted] = {}
    there, end, holder = ("", 0), 0, None
    for where, start, stop, wanted in spans:
        if where == there and start < end and holder is not None:
            found[id(holder)], found[id(wanted)] = holder, wanted
        if where != there or stop > end:
            there, end, holder = where, stop, wanted
    return list(found.values())


def fill_sinks(wanted: Sequence[Wanted], stored: StoredState) -> list[Sink]:
    """A sink per region. Rows that the stored tensor may not have become zero."""
    sinks = []
    for item in wanted:
        if item.leaf.allow_shape_mismatch:
            words_of(item.view).zero_()
        sinks.append(sink_for(item.view, stored.dtype(item.row), item.region.offset))
    return sinks


def compare_sinks(wanted: Sequence[Wanted], stored: StoredState) -> list[Sink]:
    """A sink per region that raises where what is stored is not what the memory holds."""
    return [CompareSink(item.view, stored.dtype(item.row), item.region.offset, item.leaf.key) for item in wanted]
