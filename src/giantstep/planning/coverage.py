"""Is every global tensor covered exactly once? Gaps and overlaps, named with regions and ranks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import CoverageError
from giantstep.planning.description import COPY
from giantstep.planning.holders import Holders
from giantstep.planning.local_names import local_name_hint
from giantstep.planning.shard_table import ShardTable
from giantstep.shards.partition import partitioned
from giantstep.shards.region import Int64s, Region, overlapping_pair, subtract

# A tensor in more pieces than this gets its gap counted, not located.
_LOCATED_PIECES = 20_000


def check_coverage(table: ShardTable, holders: Holders) -> None:
    """Raise `CoverageError` unless the groups of `holders` partition every tensor of the table."""
    rows = holders.first_rows
    count, width = table.shape.shape
    boxes, dims = np.bincount(table.tensor[rows], minlength=count), np.full(count, width)
    exact = partitioned(boxes, dims, table.shape.reshape(-1), table.offset[rows].reshape(-1), table.size[rows].reshape(-1))
    if not exact.all():
        raise _fault(table, ~exact, rows[~exact[table.tensor[rows]]])


def _fault(table: ShardTable, wrong: NDArray[np.bool_], rows: Int64s) -> CoverageError:
    """What is wrong with some tensors that their regions, given by rows, do not partition."""
    tensors, offset, size = table.tensor[rows], table.offset[rows], table.size[rows]
    pair = overlapping_pair(tensors, offset, size)
    if pair is not None:
        a, b = int(rows[pair[0]]), int(rows[pair[1]])
        return _refusal(
            table.keys[int(table.tensor[a])],
            f"tensor {table.keys[int(table.tensor[a])]!r}: regions {table.region_text(a)} of rank {table.ranks_of([a])[0]} and "
            f"{table.region_text(b)} of rank {table.ranks_of([b])[0]} overlap. Main replicas must cover each element once."
            + local_name_hint(table.keys[int(table.tensor[a])]),
        )
    # Without overlaps a tensor is covered if and only if the volumes add up.
    covered = _volumes(tensors, size, len(table.keys))
    total = table.shape.prod(axis=1)
    short = np.flatnonzero(wrong & (covered != total))
    if len(short):
        return _refusal(
            table.keys[int(short[0])],
            _gap_message(table, int(short[0]), int(total[short[0]] - covered[short[0]]), tensors, rows, len(short)),
        )
    key = table.keys[int(np.flatnonzero(wrong)[0])]
    return _refusal(key, f"tensor {key!r}: some of its regions do not lie inside it. Regions must lie inside the global shape.")


def _refusal(key: str, message: str) -> CoverageError:
    error = CoverageError(message)
    error.tensor_key = key
    return error


def _volumes(tensors: np.ndarray, size: np.ndarray, count: int) -> np.ndarray:
    volumes = np.zeros(count, dtype=np.int64)
    np.add.at(volumes, tensors, size.prod(axis=1))
    return volumes


def _region(table: ShardTable, row: int) -> Region:
    dims = int(table.ndim[table.tensor[row]])
    width = table.offset.shape[1]
    return Region(tuple(table.offset[row, width - dims :].tolist()), tuple(table.size[row, width - dims :].tolist()))


def _gap_message(table: ShardTable, tensor: int, missing: int, tensors: np.ndarray, rows: np.ndarray, short: int) -> str:
    mine = rows[tensors == tensor]
    width, dims = table.shape.shape[1], int(table.ndim[tensor])
    shape = tuple(table.shape[tensor, width - dims :].tolist())
    parts = [Region.whole(shape)]
    if len(mine) <= _LOCATED_PIECES:
        for row in mine:
            parts = [left for part in parts for left in subtract(part, _region(table, int(row)))]
        where = f"region {parts[0]}" + (f" and {len(parts) - 1} more" if len(parts) > 1 else "")
    else:
        where = "some of its elements"
    held = np.flatnonzero((table.tensor == tensor) & (table.role == COPY))
    copies = table.ranks_of(row for row in held.tolist() if any(_region(table, row).intersect(part).elements for part in parts))
    hint = (
        f" Rank {', '.join(map(str, copies[:20]))} holds part of it, but with a replica_id other than 0: one holder of "
        "each region must have replica_id 0."
        if copies
        else " The ranks that hold the tensor: " + (", ".join(map(str, table.ranks_of(mine.tolist())[:20])) or "none") + "."
    )
    more = f" {short - 1} more tensors have gaps." if short > 1 else ""
    return f"tensor {table.keys[tensor]!r} of shape {shape}: no rank saves {where} ({missing} elements).{hint}{more}"
