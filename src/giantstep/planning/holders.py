"""Which shards hold the same region, and whether they may: replicas grouped, contents compared, holders named."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import CoverageError, DisagreementError
from giantstep.planning.description import COPY, IMPLICIT, MAIN
from giantstep.planning.local_names import local_name_hint
from giantstep.planning.shard_table import ShardTable
from giantstep.shards.region import MAX_ELEMENTS, Int64s, same_rows, volumes
from giantstep.shards.words import mixed


@dataclass(frozen=True, slots=True)
class Holders:
    """Shards grouped by equal region. Groups without a main replica, and empty regions, are left out.

    Attributes:
        rows: rows of the shard table, group by group; groups by tensor and offset.
        starts: [groups] where each group begins in `rows`.
        counts: [groups] number of rows.
        main: [groups] rank of the main replica; the lowest of those that hold it where any may be it.
    """

    rows: Int64s
    starts: Int64s
    counts: Int64s
    main: Int64s

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
    rows, new = _by_region(table)
    group = np.cumsum(new) - 1
    starts = np.flatnonzero(new)
    _check_single_main(table, rows, group, len(starts))
    _check_contents(table, rows, group, starts)
    if not len(rows):
        return Holders(rows, starts, starts, starts)
    usable = np.logical_or.reduceat(table.role[rows] != COPY, starts)
    counts = np.diff(starts, append=len(rows))
    first_rank = table.first_rank
    main = np.minimum.reduceat(first_rank[table.member[rows]], starts)
    declared = np.flatnonzero(table.role[rows] == MAIN)
    main[group[declared]] = first_rank[table.member[rows[declared]]]
    if not usable.all():
        rows, counts, main = rows[usable[group]], counts[usable], main[usable]
    return Holders(rows, np.cumsum(counts) - counts, counts, main)


def positions(tensor: Int64s, offset: Int64s, shape: Int64s) -> Int64s | None:
    """[rows] numbers that order regions by tensor, then by offset; None where they would not fit 64 bits."""
    elements = np.maximum(shape, 1)
    with np.errstate(over="ignore"):
        total = elements.astype(np.float64).prod(axis=1).sum()
    if total > MAX_ELEMENTS:
        return None
    sizes = volumes(elements)
    strides = np.ones_like(elements)
    strides[:, :-1] = np.cumprod(elements[:, :0:-1], axis=1)[:, ::-1]
    result: Int64s = (np.cumsum(sizes) - sizes)[tensor]
    for axis in range(shape.shape[1]):
        result = result + offset[:, axis] * strides[tensor, axis]
    return result


def _by_region(table: ShardTable) -> tuple[Int64s, NDArray[np.bool_]]:
    """Rows of all regions that are not empty, equal ones together, and where a new region begins."""
    kept = np.flatnonzero(volumes(table.size))
    position = positions(table.tensor[kept], table.offset[kept], table.shape)
    if position is not None:
        order = np.argsort(position, kind="stable")
        rows, position = kept[order], position[order]
        new = np.ones(len(rows), dtype=bool)
        new[1:] = position[1:] != position[:-1]
        resized = np.zeros(len(rows), dtype=bool)
        sizes = table.size[rows]
        resized[1:] = ~same_rows(sizes[1:], sizes[:-1])
        if not (resized & ~new).any():
            return rows, new
    # Regions of several sizes begin at one place: rare, and slower to sort.
    columns = [*(table.size[kept, axis] for axis in range(table.size.shape[1]))]
    columns += [*(table.offset[kept, axis] for axis in reversed(range(table.offset.shape[1]))), table.tensor[kept]]
    rows = kept[np.lexsort(columns)]
    new = np.ones(len(rows), dtype=bool)
    a, b = rows[1:], rows[:-1]
    new[1:] = table.tensor[a] != table.tensor[b]
    new[1:] |= ~(same_rows(table.offset[a], table.offset[b]) & same_rows(table.size[a], table.size[b]))
    return rows, new


def holder_sets(table: ShardTable, holders: Holders, cells: Int64s | None) -> tuple[list[Int64s], Int64s]:
    """The different sets of ranks that may write a group's region, each ascending; and [groups] which of them does.

    Args:
        table, holders: who holds what.
        cells: by rank, the number of the ranks among which it shares; None if all share with all. Only holders whose cell is
            the main replica's belong to a group's set.
    """
    if not len(holders.rows):
        return [], np.zeros(0, dtype=np.int64)
    set_of, examples = _sets_of_classes(table, holders, cells)
    member = table.member[holders.rows]
    found = []
    for group in examples.tolist():
        classes = member[holders.starts[group] : holders.starts[group] + holders.counts[group]]
        ranks = table.ranks[int(classes[0])]
        if len(classes) > 1:
            ranks = np.unique(np.concatenate([table.ranks[number] for number in classes.tolist()]))
        if cells is not None:
            ranks = ranks[cells[ranks] == cells[holders.main[group]]]
        found.append(ranks)
    return found, set_of


def _sets_of_classes(table: ShardTable, holders: Holders, cells: Int64s | None) -> tuple[Int64s, Int64s]:
    """[groups] number of the set of classes (and of the cell) that holds each, and [sets] one group of each set."""
    member = table.member[holders.rows]
    first = member[holders.starts]
    set_of = np.zeros(len(holders.starts), dtype=np.int64)
    examples: list[Int64s] = []
    count = 0
    # Groups with one row, which may be millions, are told apart by their class: its lowest rank says the cell.
    single = np.flatnonzero(holders.counts == 1)
    if len(single):
        marks = first[single]
        example = np.full(int(marks.max()) + 1, -1, dtype=np.int64)
        example[marks] = single
        there = np.flatnonzero(example >= 0)
        number = np.zeros(len(example), dtype=np.int64)
        number[there] = np.arange(len(there))
        set_of[single] = number[marks]
        examples.append(example[there])
        count = len(there)
    several = np.flatnonzero(holders.counts > 1)
    if len(several):
        # A set of classes is recognised by two sums of well-mixed 64-bit numbers of its members.
        sums = [np.add.reduceat(mixed(member, salt), holders.starts)[several] for salt in (1, 2)]
        if cells is not None:
            sums.append(cells[holders.main[several]].astype(np.uint64))
        order = np.lexsort(sums)
        new = np.ones(len(order), dtype=bool)
        new[1:] = np.logical_or.reduce([mark[order][1:] != mark[order][:-1] for mark in sums])
        set_of[several[order]] = count + np.cumsum(new) - 1
        examples.append(several[order[new]])
    return set_of, np.concatenate(examples)


def rows_at(table: ShardTable, holders: Holders, groups: Int64s, ranks: Int64s) -> Int64s:
    """The row by which a rank holds a group's region, for pairs of groups and ranks that do hold them."""
    class_of = np.zeros(sum(len(held) for held in table.ranks), dtype=np.int64)
    for number, held in enumerate(table.ranks):
        class_of[held] = number
    result = holders.rows[holders.starts[groups]]
    several = np.flatnonzero(holders.counts[groups] > 1)
    if len(several):
        # Only the groups that are asked for: pairs of (group, class) as one number, in order.
        asked = np.unique(groups[several])
        counts = holders.counts[asked]
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = holders.rows[np.repeat(holders.starts[asked], counts) + within]
        pair = np.repeat(asked, counts) * len(table.ranks) + table.member[rows]
        order = np.argsort(pair, kind="stable")
        wanted = groups[several] * len(table.ranks) + class_of[ranks[several]]
        result[several] = rows[order[np.searchsorted(pair[order], wanted)]]
    return result


def _check_single_main(table: ShardTable, rows: Int64s, group: Int64s, groups: int) -> None:
    main = np.flatnonzero(table.role[rows] == MAIN)
    multiplicity = np.array([len(ranks) for ranks in table.ranks], dtype=np.int64)[table.member[rows[main]]]
    doubled = np.flatnonzero(np.bincount(group[main], multiplicity, minlength=groups) > 1)
    if len(doubled):
        chosen = rows[main[group[main] == doubled[0]]]
        ranks = table.ranks_of(chosen)
        count = int(multiplicity[group[main] == doubled[0]].sum())
        key = table.keys[int(table.tensor[chosen[0]])]
        error = CoverageError(
            f"tensor {key!r}: region {table.region_text(int(chosen[0]))} has "
            f"{count} main replicas, on rank {', '.join(map(str, ranks[:20]))}. Give all but one of them a replica_id "
            "other than 0, or different regions." + _more(len(doubled) - 1) + local_name_hint(key)
        )
        error.tensor_key = key
        raise error


def _check_contents(table: ShardTable, rows: Int64s, group: Int64s, starts: Int64s) -> None:
    """Implicit replicas of one mesh are vouched for by the mesh; all others must have equal digests."""
    leader = rows[starts[group]]
    others = np.flatnonzero((rows != leader) & (table.role[rows] == IMPLICIT) & (table.role[leader] == IMPLICIT))
    if not len(others):
        return
    rows, leader = rows[others], leader[others]
    compared = (table.mesh[rows] != table.mesh[leader]) | (table.mesh[rows] == 0)
    taken = (table.digest[rows] != 0).any(axis=1) & (table.digest[leader] != 0).any(axis=1)
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
    ranks = ", ".join(map(str, table.ranks_of(rows[wrong & (leader == good)].tolist())[:20]))
    key = table.keys[int(table.tensor[bad])]
    first = int(table.ranks[int(table.member[good])][0])
    raise DisagreementError(
        f"tensor {key!r}, region {table.region_text(bad)}: rank {first} and rank {ranks} {problem}"
        + _more(len(np.unique(table.tensor[rows[found]])) - 1)
        + local_name_hint(key)
    )


def _check_one_way(table: ShardTable) -> None:
    """One key is either a ShardedTensor on all ranks, whose replica ids say who is main, or on none."""
    implicit = table.role == IMPLICIT
    counts = len(table.keys)
    ways = np.zeros((counts, 2), dtype=bool)
    ways[table.tensor[implicit], 1] = True
    ways[table.tensor[~implicit], 0] = True
    both = np.flatnonzero(ways.all(axis=1))
    if len(both):
        mine = table.tensor == both[0]
        explicit_rank, implicit_rank = (table.ranks_of(np.flatnonzero(mine & way)[:1])[0] for way in (~implicit, implicit))
        raise DisagreementError(
            f"tensor {table.keys[int(both[0])]!r} is a ShardedTensor on rank {explicit_rank} and a plain tensor or DTensor on "
            f"rank {implicit_rank}. Describe it in one way on all ranks." + _more(len(both) - 1)
        )


def _more(count: int) -> str:
    return f" {count} more like this." if count > 0 else ""
