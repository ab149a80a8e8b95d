"""`plan_save`: from everybody's descriptions to the chunks of the checkpoint and who writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import PeerFailureError
from giantstep.planning.balance import Regions, Shares, balance
from giantstep.planning.columns import pack_column, pack_texts, unpack_column, unpack_texts
from giantstep.planning.coverage import check_coverage
from giantstep.planning.description import Description, Parts
from giantstep.planning.holders import Holders, group_holders, holder_sets, positions, rows_at
from giantstep.planning.objects import ObjectPlan, check_wrappers, plan_objects
from giantstep.planning.shard_table import ShardTable, tabulate
from giantstep.planning.twins import NOBODY, Replication, file_groups, twins_of
from giantstep.planning.write_part import CopyPart, WritePart
from giantstep.shards.flat import flat_range_to_regions
from giantstep.shards.region import Int64s, Region, padded_to_ragged, same_rows, split_region, volumes


@dataclass(frozen=True, slots=True)
class SavePlan:
    """Chunks of the checkpoint, in the order of the index: by key, then by offset.

    Attributes:
        keys, dtype, ndim, shape, tied: tensors, as in `ShardTable`. A tensor tied to another has no chunks of its own.
        tensor: [chunks] row in `keys`.
        offset, size: [chunks, width] regions, padded in front.
        bytes: [chunks] length.
        writer: [chunks] rank that writes it.
        source_row: [chunks] row in that rank's description.
        whole: [chunks] whether it is all of the region that that row describes.
        twin, twin_row: [chunks, copies] ranks that write it too, or -1, and the rows in their descriptions.
        ranks: number of ranks.
        objects: the objects of the checkpoint.
    """

    keys: list[str]
    dtype: NDArray[np.uint8]
    ndim: Int64s
    shape: Int64s
    tied: Int64s
    tensor: Int64s
    offset: Int64s
    size: Int64s
    bytes: Int64s
    writer: Int64s
    source_row: Int64s
    whole: NDArray[np.bool_]
    twin: Int64s
    twin_row: Int64s
    ranks: int
    objects: ObjectPlan

    def encode(self) -> Parts:
        """As parts, to be kept."""
        objects = self.objects
        columns = [getattr(self, name) for name in _COLUMNS]
        columns += [objects.writer, objects.holders, objects.bytes, objects.differs, np.array([self.ranks])]
        return (*pack_texts(self.keys), *pack_texts(objects.keys), *map(pack_column, columns))

    @classmethod
    def decode(cls, parts: Parts) -> SavePlan:
        """Inverse of `encode`."""
        if len(parts) != _PLAN_PARTS:
            raise PeerFailureError(f"a plan in {len(parts)} parts cannot be read, expected {_PLAN_PARTS}")
        values: dict[str, Any] = {name: unpack_column(part) for name, part in zip(_COLUMNS, parts[4:-5], strict=True)}
        writer, holders, sizes, differs, ranks = (unpack_column(part) for part in parts[-5:])
        width = len(values["shape"]) // max(1, len(values["ndim"]))
        values |= {name: values[name].reshape(-1, max(1, width)) for name in ("shape", "offset", "size")}
        objects = ObjectPlan(unpack_texts(*parts[2:4]), writer, holders, sizes, differs.astype(bool))
        copies = len(values["twin"]) // max(1, len(values["tensor"]))
        values |= {name: values[name].reshape(len(values["tensor"]), copies) for name in ("twin", "twin_row")}
        values |= {"dtype": values["dtype"].astype(np.uint8), "whole": values["whole"].astype(bool)}
        return cls(keys=unpack_texts(*parts[:2]), ranks=int(ranks[0]), objects=objects, **values)

    def chunks_by_writer(self) -> list[Int64s]:
        """By rank, the rows of the chunks that it writes, in the order in which it gets and reports them."""
        narrow = self.writer.astype(np.uint16) if self.ranks <= 1 << 16 else self.writer
        ends = np.cumsum(np.bincount(self.writer, minlength=self.ranks))
        return np.split(np.argsort(narrow, kind="stable"), ends[:-1])

    def parts(self, descriptions: Sequence[Description]) -> list[WritePart]:
        """By rank, what it needs to know. `descriptions`: from which the plan was made."""
        dims = self.ndim[self.tensor]
        objects, differing = self.objects.by_writer(), list(self.objects.differing())
        weights = self.objects.weights(descriptions)
        groups = file_groups(self.writer, self.twin) if self.twin.shape[1] else None
        copies = self._copies(groups, dims) if groups is not None else [CopyPart.of_nothing()] * self.ranks
        found = []
        for rank, rows in enumerate(self.chunks_by_writer()):
            cut = np.flatnonzero(~self.whole[rows])
            chosen = rows[cut]
            found.append(
                WritePart(
                    self.source_row[rows],
                    cut,
                    padded_to_ragged(self.offset[chosen], dims[chosen]),
                    padded_to_ragged(self.size[chosen], dims[chosen]),
                    objects.get(rank, []),
                    differing,
                    weights[rank],
                    np.zeros(0, dtype=np.int64) if groups is None else groups[rows],
                    copies[rank],
                )
            )
        return found

    def _copies(self, groups: Int64s, dims: Int64s) -> list[CopyPart]:
        chunk, number = np.nonzero(self.twin >= 0)
        twin, row = self.twin[chunk, number], self.twin_row[chunk, number]
        order = np.lexsort((chunk, groups[chunk], self.writer[chunk], twin))
        chunk, twin, row = chunk[order], twin[order], row[order]
        ends = np.cumsum(np.bincount(twin, minlength=self.ranks))
        found = []
        for chunks, rows in zip(np.split(chunk, ends[:-1]), np.split(row, ends[:-1]), strict=True):
            cut = np.flatnonzero(~self.whole[chunks])
            chosen = chunks[cut]
            regions = (padded_to_ragged(table[chosen], dims[chosen]) for table in (self.offset, self.size))
            found.append(CopyPart(self.writer[chunks], groups[chunks], rows, cut, *regions))
        return found


_COLUMNS = (
    *("dtype", "ndim", "shape", "tied", "tensor", "offset", "size", "bytes", "writer", "source_row", "whole"),
    *("twin", "twin_row"),
)
_PLAN_PARTS = 4 + len(_COLUMNS) + 5


def plan_save(
    descriptions: Sequence[Description],
    *,
    split_bytes: int,
    max_chunk_bytes: int,
    cells: Int64s | None = None,
    steady: bool = False,
    replication: Replication | None = None,
) -> SavePlan:
    """Plan a save.

    Args:
        descriptions: by rank.
        split_bytes: replicated regions of at least this size may be divided between holders (see `balance`).
        max_chunk_bytes: larger chunks are divided.
        cells: by rank, the number of the ranks among which it shares writing; None: all share with all. A region is
            written by holders of the cell of its main replica, which is the lowest rank where any may be main.
        steady: regions are to be divided as in the next save, whose objects may be a little longer or shorter.
        replication: which ranks are to write copies of what they hold too.

    Raises:
        CoverageError, DisagreementError: the descriptions do not fit together.
    """
    table = tabulate(descriptions)
    holders = group_holders(table)
    check_coverage(table, holders)
    objects = plan_objects(descriptions)
    check_wrappers(table.keys, objects.keys)
    holders = _untied(table, holders)
    weighed = replace(objects, bytes=objects.bytes // _STEADY_BYTES * _STEADY_BYTES) if steady else objects
    plan = _shared_out(table, holders, weighed, len(descriptions), split_bytes, cells, replication)
    plan = replace(plan, objects=objects)
    return _sorted(_divided(plan, max_chunk_bytes))


def _untied(table: ShardTable, holders: Holders) -> Holders:
    """Without the regions of tensors that are stored as another one's."""
    kept = np.flatnonzero(table.tied[table.tensor[holders.first_rows]] == table.tensor[holders.first_rows])
    if len(kept) == len(holders.starts):
        return holders
    counts = holders.counts[kept]
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = holders.rows[np.repeat(holders.starts[kept], counts) + within]
    return Holders(rows, np.cumsum(counts) - counts, counts, holders.main[kept])


def _shared_out(
    table: ShardTable,
    holders: Holders,
    objects: ObjectPlan,
    ranks: int,
    split_bytes: int,
    cells: Int64s | None,
    replication: Replication | None,
) -> SavePlan:
    first = holders.first_rows
    tensor, offset, size = table.tensor[first], table.offset[first], table.size[first]
    sets, set_of = holder_sets(table, holders, cells)
    item = table.item_bytes[tensor]
    length = volumes(size) * item
    members, lowest = _members(sets)
    shared = np.flatnonzero(members[set_of] > 1)
    plan = SavePlan(
        table.keys,
        table.dtype,
        table.ndim,
        table.shape,
        table.tied,
        tensor,
        offset,
        size,
        length,
        lowest[set_of],
        table.row[first],
        np.ones(len(first), dtype=bool),
        *_no_twins(len(first), replication),
        ranks,
        objects,
    )
    if not len(shared) and (holders.counts == 1).all():
        return plan
    alone = np.flatnonzero(members[set_of] == 1)
    loads = np.bincount(plan.writer[alone], length[alone], minlength=ranks)
    loads = (loads + np.bincount(objects.writer, objects.bytes, minlength=ranks)).astype(np.int64)
    depth, slices = _granularity(size[shared], item[shared], sets, set_of[shared])
    regions = Regions(slices, length[shared] // slices)
    parts = _boxes(size[shared], depth, balance(regions, sets, set_of[shared], ranks, split_bytes, loads))
    group = np.concatenate((alone, shared[parts.group]))
    writer = np.concatenate((plan.writer[alone], parts.rank))
    divided = np.concatenate((size[alone], parts.size))
    twin, twin_row = _no_twins(len(group), replication)
    if replication is not None:
        twin = twins_of(sets, set_of[group], writer, replication)
        chunk, number = np.nonzero(twin >= 0)
        twin_row[chunk, number] = table.row[rows_at(table, holders, group[chunk], twin[chunk, number])]
    return replace(
        plan,
        tensor=tensor[group],
        offset=np.concatenate((offset[alone], offset[shared[parts.group]] + parts.offset)),
        size=divided,
        bytes=volumes(divided) * item[group],
        writer=writer,
        source_row=table.row[rows_at(table, holders, group, writer)],
        whole=same_rows(divided, size[group]),
        twin=twin,
        twin_row=twin_row,
    )


def _no_twins(chunks: int, replication: Replication | None) -> tuple[Int64s, Int64s]:
    shape = (chunks, 0 if replication is None else replication.copies)
    return np.full(shape, NOBODY, dtype=np.int64), np.zeros(shape, dtype=np.int64)


def _members(sets: Sequence[Int64s]) -> tuple[Int64s, Int64s]:
    """How many ranks each set has, and the lowest of them."""
    return (
        np.array([len(held) for held in sets], dtype=np.int64),
        np.array([int(held[0]) for held in sets], dtype=np.int64),
    )


# Objects count in multiples of this where plans are to be steady.
_STEADY_BYTES = 1 << 20
# A unit of division is at most this part of a rank's share, but need not be smaller than that many bytes.
_UNIT_PARTS = 64
_UNIT_BYTES = 4096


def _granularity(size: Int64s, item: Int64s, sets: Sequence[Int64s], set_of: Int64s) -> tuple[Int64s, Int64s]:
    """Per region, along how many leading axes it may be divided, less one, and into how many slices.

    Along the first axis with more than one element, and further in where its slices would be too coarse for equal shares.
    """
    groups = np.arange(len(size))
    depth = np.argmax(size > 1, axis=1)
    slices = np.cumprod(size, axis=1)
    elements = slices[:, -1]
    members, _ = _members(sets)
    total = np.bincount(set_of, elements * item, minlength=len(sets))
    # Of a rank that is in many sets, its share of each set need not be as exact as the sum.
    mean = total.sum() / max(1, int(members[np.unique(set_of)].sum()))
    limit = np.maximum(np.maximum(total / members, mean) / _UNIT_PARTS, _UNIT_BYTES)[set_of]
    while True:
        coarse = (elements // slices[groups, depth] * item > limit) & (depth < size.shape[1] - 1)
        if not coarse.any():
            return depth, slices[groups, depth]
        depth = depth + coarse


@dataclass(frozen=True, slots=True)
class _Boxes:
    """Boxes that ranks take of regions, relative to these."""

    group: Int64s
    rank: Int64s
    offset: Int64s
    size: Int64s


def _boxes(size: Int64s, depth: Int64s, shares: Shares) -> _Boxes:
    """The boxes that the shares consist of: mostly one each; several where slices of several axes are taken."""
    group = shares.group
    rows = np.arange(len(group))
    offset, taken = np.zeros_like(size[group]), size[group].copy()
    slices = np.cumprod(taken, axis=1)[rows, depth[group]]
    # Along one axis slices make a box.
    plain = (shares.count == slices) | (slices == taken[rows, depth[group]])
    offset[rows[plain], depth[group[plain]]] = np.where(shares.count == slices, 0, shares.first)[plain]
    taken[rows[plain], depth[group[plain]]] = np.where(shares.count == slices, taken[rows, depth[group]], shares.count)[plain]
    more: list[tuple[int, Region]] = []
    for row in np.flatnonzero(~plain).tolist():
        axes, first = int(depth[group[row]]) + 1, int(shares.first[row])
        inner = tuple(taken[row, axes:].tolist())
        for _, box in flat_range_to_regions(taken[row, :axes].tolist(), first, first + int(shares.count[row])):
            more.append((row, Region((*box.offset, *(0 for _ in inner)), (*box.size, *inner))))
    kept = np.concatenate((np.flatnonzero(plain), np.array([row for row, _ in more], dtype=np.int64)))
    width = size.shape[1]
    extra = [np.array([getattr(box, name) for _, box in more], dtype=np.int64) for name in ("offset", "size")]
    return _Boxes(
        group[kept],
        shares.rank[kept],
        *(
            np.concatenate((table[plain], boxes.reshape(-1, width)))
            for table, boxes in zip((offset, taken), extra, strict=True)
        ),
    )


def _with_chunks(plan: SavePlan, rows: Int64s, offset: Int64s, size: Int64s, length: Int64s) -> SavePlan:
    """The plan with the chunks `rows`, in that order, having these regions."""
    return replace(
        plan,
        tensor=plan.tensor[rows],
        offset=offset,
        size=size,
        bytes=length,
        writer=plan.writer[rows],
        source_row=plan.source_row[rows],
        whole=plan.whole[rows] & (length == plan.bytes[rows]),
        twin=plan.twin[rows],
        twin_row=plan.twin_row[rows],
    )


def _divided(plan: SavePlan, max_chunk_bytes: int) -> SavePlan:
    large = np.flatnonzero(plan.bytes > max_chunk_bytes)
    if not len(large):
        return plan
    rows, offsets, sizes = [], [], []
    for row in large.tolist():
        region = Region(tuple(plan.offset[row].tolist()), tuple(plan.size[row].tolist()))
        item_bytes = int(plan.bytes[row]) // region.elements
        for part in split_region(region, max(1, max_chunk_bytes // item_bytes)):
            rows.append(row)
            offsets.append(part.offset)
            sizes.append(part.size)
    small = np.flatnonzero(plan.bytes <= max_chunk_bytes)
    chosen = np.concatenate((small, np.array(rows, dtype=np.int64)))
    offset = np.concatenate((plan.offset[small], np.array(offsets, dtype=np.int64)))
    size = np.concatenate((plan.size[small], np.array(sizes, dtype=np.int64)))
    item = plan.bytes[chosen] // plan.size[chosen].prod(axis=1)
    return _with_chunks(plan, chosen, offset, size, size.prod(axis=1) * item)


def _sorted(plan: SavePlan) -> SavePlan:
    position = positions(plan.tensor, plan.offset, plan.shape)
    if position is not None and (position[1:] > position[:-1]).all():
        return plan
    if position is not None:
        order = np.argsort(position, kind="stable")
    else:
        order = np.lexsort([*(plan.offset[:, axis] for axis in reversed(range(plan.offset.shape[1]))), plan.tensor])
    return _with_chunks(plan, order, plan.offset[order], plan.size[order], plan.bytes[order])
