"""Memory that is filled on load: which regions are wanted, who shares memory, and the sinks that write to it.

Two tensors of a state dict may be one piece of memory (tied weights). If the checkpoint stores them as one, it is
filled once; if it stores two, one is loaded and the other compared with it. Tensors without memory get it here, tied
ones together. Called by `load`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from giantstep.errors import BadArgumentError
from giantstep.held_memory import hold
from giantstep.mapping.leaves import TensorLeaf
from giantstep.mapping.overlap import memory_of
from giantstep.planning.in_place import Memory, nowhere
from giantstep.planning.load_tables import WantedTable, row_strides
from giantstep.reading.fetch import Sink, Sinks
from giantstep.reading.placing import SinkList
from giantstep.reading.tensor_sink import CompareSink, sink_for
from giantstep.requesting import Matched
from giantstep.sharing import meeting, overlapping
from giantstep.stored_state import StoredState
from giantstep.targets import Target, Targets
from giantstep.words import words_of


@dataclass(frozen=True, slots=True)
class Filling:
    """What is filled and what is compared.

    Attributes:
        filled: regions that are read into memory.
        compared: regions whose memory others fill: what is stored for them must be equal.
    """

    filled: Targets
    compared: Targets


def plan_filling(matched: Matched, stored: StoredState) -> Filling:
    """Give memory to tensors that have none, and decide which regions are read.

    Raises:
        BadArgumentError: tensors that cannot be compared with what is stored for them share memory with others.
    """
    _allocate(matched.leaves, matched.rows, stored)
    targets = Targets.of(matched.leaves, matched.rows, matched.extents, matched.extent_of)
    made = [view for source in matched.dequantised for _, view in source.leaf.pieces if view is not None and view.numel()]
    # Few regions meet others, and only those are looked at one by one.
    near = [targets[number] for number in meeting(targets, made)]
    kept, compared = _homes(near, stored)
    lapping = overlapping(kept, made)
    chosen = list({target.number: target for target in [*compared, *lapping]}.values())
    for target in chosen:
        leaf = target.leaf
        if leaf.allow_shape_mismatch and stored.shape(target.row) != leaf.global_shape:
            raise BadArgumentError(
                f"tensor {leaf.key!r} is loaded with another padding into memory that it shares with another tensor of "
                "the state dict. Load it into memory of its own."
            )
    compared_too = targets.chosen([target.number for target in chosen])
    if near:
        targets = targets.marked([target.number for target in lapping])
        left_out = {target.number for target in near} - {target.number for target in kept}
        targets = targets.chosen([number for number in range(len(targets)) if number not in left_out])
    return Filling(targets, compared_too)


def _homes(near: Sequence[Target], stored: StoredState) -> tuple[list[Target], list[Target]]:
    """Of regions that are one memory the first; and those for which other values may be stored, with theirs."""
    kept: list[Target] = []
    compared: list[Target] = []
    homes: dict[Hashable, Target] = {}
    for target in near:
        home = homes.setdefault(memory_of(target.view), target)
        if home is target:
            kept.append(target)
        elif home.region != target.region or stored.twin[home.row] != stored.twin[target.row]:
            compared += [home, target]
    return kept, compared


def _allocate(leaves: Sequence[TensorLeaf], rows: Sequence[int], stored: StoredState) -> None:
    """Tensors that are stored as one and are of one kind get one memory; each of several requests of one key its own."""
    # A leaf of one region that has a view has memory: mostly all are.
    if not [leaf for leaf in leaves if len(leaf.pieces) != 1 or leaf.pieces[0][1] is None]:
        return
    seen: dict[tuple[int, int], int] = {}
    homes: dict[Hashable, tuple[TensorLeaf, int]] = {}
    tied = stored.tied_rows
    for leaf, row in zip(leaves, rows, strict=True):
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


class _FillSinks:
    """The sinks of regions that are filled, each made when it is first needed: most are read in place and need none."""

    def __init__(self, targets: Targets, stored: StoredState) -> None:
        self._targets = targets
        self._stored = stored
        self._made: dict[int, Sink] = {}
        self._owner: Sequence[torch.UntypedStorage] = ()

    def __getitem__(self, row: int) -> Sink:
        # Called from several threads: should two of them make one sink, either will do.
        found = self._made.get(row)
        if found is None:
            targets, stored = self._targets, self._stored
            dtype = stored.dtype(targets.rows[row])
            found = self._made[row] = sink_for(targets.views[row], dtype, targets.regions[row].offset)
        return found

    def memory(self, wanted: WantedTable) -> Memory:
        targets, found = self._targets, nowhere(wanted)
        if not len(targets):
            return found
        codes = self._stored.index.tensor_dtype[np.array(targets.rows, dtype=np.int64)]
        # Bytes that were read to where others are read to, too, could not be checked there.
        plain = targets.on_host & (targets.dtype_code == codes) & ~targets.overlaps
        strides = row_strides(wanted.size, targets.item_bytes)
        for number in np.flatnonzero(plain & ~targets.contiguous).tolist():
            view = targets.views[number]
            strides[number, wanted.width - view.dim() :] = [stride * view.element_size() for stride in view.stride()]
        rows = np.flatnonzero(plain)
        # What is filled by its address exists until the load is through.
        held = hold([targets.views[row] for row in rows.tolist()], lambda row: targets.leaves[int(rows[row])].key)
        self._owner = held.owner
        address = np.zeros(len(targets), dtype=np.int64)
        address[rows] = held.address
        return Memory(address, strides)


def fill_sinks(targets: Targets, stored: StoredState) -> Sinks:
    """A sink per region. Rows that the stored tensor may not have become zero."""
    for number in np.flatnonzero(targets.partial).tolist():
        view = targets.views[number]
        lazy = view.is_conj() or view.is_neg()
        (view if lazy else words_of(view)).zero_()
    return _FillSinks(targets, stored)


def compare_sinks(targets: Targets, stored: StoredState) -> Sinks:
    """A sink per region that raises where what is stored is not what the memory holds."""
    columns = zip(targets.leaves, targets.rows, targets.regions, targets.views, strict=True)
    return SinkList([CompareSink(view, stored.dtype(row), region.offset, leaf.key) for leaf, row, region, view in columns])
