"""Which shards hold the same region, and whether they may: replicas grouped, contents compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import CoverageError, DisagreementError
from giantstep.planning.description import COPY, IMPLICIT, MAIN
from giantstep.planning.shard_table import ShardTable
from giantstep.shards.region import Int64s


@dataclass(frozen=True, slots=True)
class Holders:
    """Shards grouped by equal region. Groups without a main replica, and empty regions, are left out.

    Attributes:
        rows: rows of the shard table, group by group, by rank inside a group.
        starts: [groups] where each group begins in `rows`.
        counts: [groups] number of holders.
    """

    rows: Int64s
    starts: Int64s
    counts: Int64s

    @property
    def first_rows(self) -> Int64s:
        """[groups] one row per group."""
        return self.rows[self.starts]


def group_holders(table: ShardTable) -> Holders:
    """Group equal regions.

    Raises:
        DisagreementError: replicas that are not known to be equal differ in content, or in how they are described.
        CoverageError: two shards of one region both claim to be its main replica.
    """
    _check_one_way(table)
    kept = np.flatnonzero((table.size > 0).all(axis=1))
    columns = [table.rank[kept], *(table.size[kept, axis] for axis in range(table.size.shape[1]))]
    columns += [*(table.offset[kept, axis] for axis in range(table.offset.shape[1])), table.tensor[kept]]
    rows = kept[np.lexsort(columns)]
    new = np.ones(len(rows), dtype=bool)
    if len(rows) > 1:
        a, b = rows[1:], rows[:-1]
        new[1:] = (
            (table.tensor[a] != table.tensor[b])
            | (table.offset[a] != table.offset[b]).any(axis=1)
            | (table.size[a] != table.size[b]).any(axis=1)
        )
    group = np.cumsum(new) - 1
    starts = np.flatnonzero(new)
    groups = len(starts)
    _check_single_main(table, rows, group, groups)
    _check_contents(table, rows, group, starts)
    usable = np.bincount(group[table.role[rows] != COPY], minlength=groups) > 0
    keep_rows = usable[group] if groups else np.zeros(0, dtype=bool)
    counts = np.bincount(group, minlength=groups)[usable] if groups else np.zeros(0, dtype=np.int64)
    return Holders(rows[keep_rows], np.cumsum(counts) - counts, counts)


def _check_single_main(table: ShardTable, rows: Int64s, group: Int64s, groups: int) -> None:
    main = table.role[rows] == MAIN
    doubled = np.flatnonzero(np.bincount(group[main], minlength=groups) > 1)
    if len(doubled):
        chosen = rows[main & (group == doubled[0])]
        ranks = sorted({int(rank) for rank in table.rank[chosen]})
        error = CoverageError(
            f"tensor {table.keys[int(table.tensor[chosen[0]])]!r}: region {table.region_text(int(chosen[0]))} has "
            f"{len(chosen)} main replicas, on rank {', '.join(map(str, ranks[:20]))}. Give all but one of them a replica_id "
            "other than 0, or different regions." + _more(len(doubled) - 1)
        )
        error.tensor_key = table.keys[int(table.tensor[chosen[0]])]
        raise error


def _check_contents(table: ShardTable, rows: Int64s, group: Int64s, starts: Int64s) -> None:
    """Implicit replicas of one mesh are vouched for by the mesh; all others must have equal digests."""
    if not len(rows):
        return
    leader = rows[starts[group]]
    taken = (table.digest[rows] != 0).any(axis=1) & (table.digest[leader] != 0).any(axis=1)
    vouched = (table.mesh[rows] == table.mesh[leader]) & (table.mesh[rows] != 0)
    compared = (table.role[rows] == IMPLICIT) & (table.role[leader] == IMPLICIT) & (rows != leader) & ~vouched
    _raise_first(
        table,
        rows,
        leader,
        compared & ~taken,
        "describe it in different ways (a DTensor here, a plain tensor or another mesh there), so that nothing shows that they "
        "hold the same values. Describe it in one way on all ranks.",
    )
    _raise_first(
        table,
        rows,
        leader,
        compared & (table.digest[rows] != table.digest[leader]).any(axis=1),
        "hold different values. A plain tensor, or a DTensor on several meshes, means the same values on all ranks. If they "
        "are parts of one tensor, wrap them in ShardedTensor; if they are different tensors, give them different keys.",
    )


def _raise_first(table: ShardTable, rows: Int64s, leader: Int64s, wrong: NDArray[np.bool_], problem: str) -> None:
    found = np.flatnonzero(wrong)
    if not len(found):
        return
    bad, good = int(rows[found[0]]), int(leader[found[0]])
    ranks = ", ".join(map(str, table.rank[rows[wrong & (leader == good)][:20]].tolist()))
    key = table.keys[int(table.tensor[bad])]
    raise DisagreementError(
        f"tensor {key!r}, region {table.region_text(bad)}: rank {int(table.rank[good])} and rank {ranks} {problem}"
        + _more(len(np.unique(table.tensor[rows[found]])) - 1)
    )


def _check_one_way(table: ShardTable) -> None:
    """One key is either a ShardedTensor on all ranks, whose replica ids say who is main, or on none."""
    implicit = table.role == IMPLICIT
    counts = len(table.keys)
    both = np.flatnonzero(
        (np.bincount(table.tensor[implicit], minlength=counts) > 0)
        & (np.bincount(table.tensor[~implicit], minlength=counts) > 0)
    )
    if len(both):
        mine = table.tensor == both[0]
        explicit_rank, implicit_rank = (int(table.rank[mine & chosen][0]) for chosen in (~implicit, implicit))
        raise DisagreementError(
            f"tensor {table.keys[int(both[0])]!r} is a ShardedTensor on rank {explicit_rank} and a plain tensor or DTensor on "
            f"rank {implicit_rank}. Describe it in one way on all ranks." + _more(len(both) - 1)
        )


def _more(count: int) -> str:
    return f" {count} more like this." if count > 0 else ""
