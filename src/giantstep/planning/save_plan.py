"""`plan_save`: from everybody's descriptions to the chunks of the checkpoint and who writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import PeerFailureError
from giantstep.planning.balance import Regions, balance
from giantstep.planning.coverage import check_coverage
from giantstep.planning.description import Description, pack_columns, pack_texts, unpack_columns, unpack_texts
from giantstep.planning.holders import Holders, group_holders
from giantstep.planning.objects import ObjectPlan, check_wrappers, plan_objects
from giantstep.planning.shard_table import ShardTable, tabulate
from giantstep.shards.region import Int64s, Region, padded_to_ragged, ragged_to_padded, split_region


@dataclass(frozen=True, slots=True)
class WritePart:
    """What one rank writes, as it learns it from rank 0.

    Attributes:
        row: [chunks] row of this rank's description that holds the chunk.
        offset, size: [chunks] regions of the global tensor, ragged.
        objects: names of the objects that it writes.
        differing: names of objects that are not the same on all ranks that hold them.
    """

    row: Int64s
    offset: Int64s
    size: Int64s
    objects: list[str]
    differing: list[str]

    def encode(self) -> bytes:
        """As bytes."""
        texts = pack_texts("objects", self.objects) | pack_texts("differing", self.differing)
        return pack_columns({"row": self.row, "offset": self.offset, "size": self.size, **texts})

    @classmethod
    def decode(cls, data: bytes) -> WritePart:
        """Inverse of `encode`."""
        columns = unpack_columns(data)
        row, offset, size = (columns[name].astype(np.int64) for name in ("row", "offset", "size"))
        return cls(row, offset, size, unpack_texts("objects", columns), unpack_texts("differing", columns))


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
    objects: ObjectPlan

    def chunks_of(self, rank: int) -> Int64s:
        """Rows of the chunks that a rank writes, in the order in which it gets and reports them."""
        return np.flatnonzero(self.writer == rank)

    def part_of(self, rank: int) -> WritePart:
        """What a rank needs to know."""
        rows = self.chunks_of(rank)
        dims = self.ndim[self.tensor[rows]]
        return WritePart(
            self.source_row[rows],
            padded_to_ragged(self.offset[rows], dims),
            padded_to_ragged(self.size[rows], dims),
            self.objects.of(rank),
            list(self.objects.differing()),
        )


def plan_save(descriptions: Sequence[Description], *, split_bytes: int, max_chunk_bytes: int) -> SavePlan:
    """Decide who writes what.

    Args:
        descriptions: of all ranks, in order.
        split_bytes: replicated regions at least this large may be divided between holders.
        max_chunk_bytes: larger chunks are divided.

    Raises:
        DisagreementError, CoverageError: see `tabulate`, `group_holders`, `check_coverage`, `plan_objects`.
    """
    table = tabulate(descriptions)
    holders = group_holders(table)
    check_coverage(table, holders)
    objects = plan_objects(descriptions)
    check_wrappers(table.keys, objects.keys)
    plan = _shares_to_plan(table, _untied(table, holders), len(descriptions), split_bytes, objects)
    return _sorted(_divided(plan, max_chunk_bytes))


def _untied(table: ShardTable, holders: Holders) -> Holders:
    """The groups without those of tied tensors, whose bytes are stored as another tensor's."""
    tensor = table.tensor[holders.first_rows]
    kept = table.tied[tensor] == tensor
    if kept.all():
        return holders
    counts = holders.counts[kept]
    return Holders(holders.rows[np.repeat(kept, holders.counts)], np.cumsum(counts) - counts, counts)


def _shares_to_plan(table: ShardTable, holders: Holders, ranks: int, split_bytes: int, objects: ObjectPlan) -> SavePlan:
    first = holders.first_rows
    tensor, offset, size = table.tensor[first], table.offset[first], table.size[first]
    groups = np.arange(len(first))
    # The axis to cut along: the first one longer than 1, or any if there is none.
    axis = np.argmax(size > 1, axis=1)
    slices = size[groups, axis]
    slice_bytes = size.prod(axis=1) // slices * table.item_bytes[tensor]
    shares = balance(Regions(slices, slice_bytes), table.rank[holders.rows], holders.starts, holders.counts, ranks, split_bytes)
    source = holders.rows[holders.starts[shares.group] + shares.holder]
    chunk_offset, chunk_size = offset[shares.group].copy(), size[shares.group].copy()
    rows = np.arange(len(shares.group))
    chunk_offset[rows, axis[shares.group]] += shares.first
    chunk_size[rows, axis[shares.group]] = shares.count
    return SavePlan(
        table.keys,
        table.dtype,
        table.ndim,
        table.shape,
        table.tied,
        tensor[shares.group],
        chunk_offset,
        chunk_size,
        shares.count * slice_bytes[shares.group],
        table.rank[source],
        table.row[source],
        objects,
    )


def _with_chunks(plan: SavePlan, rows: Int64s, offset: Int64s, size: Int64s, length: Int64s) -> SavePlan:
    """The plan with the chunks `rows`, in that order, having these regions."""
    return SavePlan(
        plan.keys,
        plan.dtype,
        plan.ndim,
        plan.shape,
        plan.tied,
        plan.tensor[rows],
        offset,
        size,
        length,
        plan.writer[rows],
        plan.source_row[rows],
        plan.objects,
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
    columns = [*(plan.offset[:, axis] for axis in reversed(range(plan.offset.shape[1]))), plan.tensor]
    order = np.lexsort(columns)
    return _with_chunks(plan, order, plan.offset[order], plan.size[order], plan.bytes[order])


def regions_of_part(part: WritePart, description: Description) -> list[Region]:
    """The regions of a rank's part, with the dimensions of the description's tensors."""
    dims = description.tensor_ndim[description.shard_tensor[part.row]]
    if int(dims.sum()) != len(part.offset) or len(part.offset) != len(part.size):
        raise PeerFailureError("rank 0 sent a part of the plan that does not fit this rank's tensors")
    width = int(dims.max()) if len(dims) else 0
    starts = np.cumsum(dims) - dims
    offset = ragged_to_padded(part.offset, starts, dims, 0, width).tolist()
    size = ragged_to_padded(part.size, starts, dims, 1, width).tolist()
    return [
        Region(tuple(offset[row][width - count :]), tuple(size[row][width - count :]))
        for row, count in enumerate(dims.tolist())
    ]
