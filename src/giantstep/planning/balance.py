"""Sharing replicated regions between their holders so that everybody writes equally much.

Regions with the same set of holders form one line of bytes. The line is cut at the points that level the
holders' loads ("water filling"), and a cut inside a large region divides it between two of its slices. Sets with
fewer holders go first, since they have less choice. So the work is vectorised per set, and every rank gets
consecutive regions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from giantstep.shards.region import Int64s


@dataclass(frozen=True, slots=True)
class Regions:
    """Regions to be shared out.

    Attributes:
        slices: [groups] how many equal slices the region can be cut into: its size along its first dimension
            larger than 1.
        slice_bytes: [groups] bytes of one of them.
    """

    slices: Int64s
    slice_bytes: Int64s

    @property
    def bytes(self) -> Int64s:
        """[groups] bytes of each region."""
        return self.slices * self.slice_bytes


@dataclass(frozen=True, slots=True)
class Shares:
    """Who takes which slices of which region.

    Attributes:
        group: [shares] region.
        holder: [shares] position of the taker among the region's holders.
        first, count: [shares] slices taken.
    """

    group: Int64s
    holder: Int64s
    first: Int64s
    count: Int64s


def balance(regions: Regions, holder_rank: Int64s, starts: Int64s, counts: Int64s, ranks: int, split_bytes: int) -> Shares:
    """Share all regions out.

    Args:
        regions: what is to be written.
        holder_rank: ranks that hold each region, region by region, ascending within one.
        starts, counts: [groups] where each region's holders lie in `holder_rank`.
        ranks: number of ranks.
        split_bytes: regions smaller than this are not divided.
    """
    loads = np.zeros(ranks, dtype=np.int64)
    parts: list[Shares] = []
    alone = np.flatnonzero(counts == 1)
    np.add.at(loads, holder_rank[starts[alone]], regions.bytes[alone])
    zeros = np.zeros(len(alone), dtype=np.int64)
    parts.append(Shares(alone, zeros, zeros, regions.slices[alone]))
    for groups in _by_holder_set(holder_rank, starts, counts):
        holders = holder_rank[starts[groups[0]] : starts[groups[0]] + counts[groups[0]]]
        parts.append(_share_line(regions, groups, loads, holders, split_bytes))
    return Shares(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("group", "holder", "first", "count")))


def _by_holder_set(holder_rank: Int64s, starts: Int64s, counts: Int64s) -> list[Int64s]:
    """Groups with several holders, those with equal sets together; smaller sets first."""
    several = np.flatnonzero(counts > 1)
    if not len(several):
        return []
    # A set is recognised by two sums of well-mixed 64-bit numbers of its members.
    mixed = [_mix(holder_rank, salt) for salt in (1, 2)]
    signature = [np.add.reduceat(values, starts)[several] for values in mixed]
    order = np.lexsort((several, signature[1], signature[0], counts[several]))
    ordered = several[order]
    change = np.ones(len(order), dtype=bool)
    change[1:] = (
        (np.diff(counts[ordered]) != 0)
        | (signature[0][order][1:] != signature[0][order][:-1])
        | (signature[1][order][1:] != signature[1][order][:-1])
    )
    return np.split(ordered, np.flatnonzero(change)[1:])


def _mix(values: Int64s, salt: int) -> np.ndarray:
    """SplitMix64 (Steele, Lea, Flood 2014) of each value."""
    x = values.astype(np.uint64) + np.uint64((salt * 0x9E3779B97F4A7C15) & (2**64 - 1))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _quotas(loads: Int64s, total: int) -> Int64s:
    """How much each holder takes of `total` so that the lowest loads are levelled; sums to `total`."""
    order = np.argsort(loads, kind="stable")
    sorted_loads = loads[order]
    # Filling the k lowest up to the next one's load costs k * load[k] - sum(load[:k]).
    prefix = np.cumsum(sorted_loads)
    counts = np.arange(1, len(loads) + 1)
    full = np.concatenate((sorted_loads[1:] * counts[:-1] - prefix[:-1], [np.iinfo(np.int64).max]))
    filled = int(np.argmax(full >= total)) + 1
    level, extra = divmod(total + int(prefix[filled - 1]), filled)
    quotas = np.zeros(len(loads), dtype=np.int64)
    quotas[order[:filled]] = level - sorted_loads[:filled]
    quotas[order[:extra]] += 1
    return quotas


def _share_line(regions: Regions, groups: Int64s, loads: Int64s, holders: Int64s, split_bytes: int) -> Shares:
    """Lay the groups out on a line, cut it by quota, and add what each holder gets to `loads`."""
    sizes = regions.bytes[groups]
    ends = np.cumsum(sizes)
    cuts = np.cumsum(_quotas(loads[holders], int(ends[-1])))[:-1]
    hit = np.minimum(np.searchsorted(ends, cuts, side="right"), len(groups) - 1)
    begin = ends[hit] - sizes[hit]
    slice_bytes = regions.slice_bytes[groups[hit]]
    divisible = sizes[hit] >= split_bytes
    step = np.where(divisible, slice_bytes, sizes[hit])
    snapped = begin + (cuts - begin + step // 2) // step * step
    points = np.unique(np.concatenate(([0], ends, snapped)))
    first, stop = points[:-1], points[1:]
    line = np.searchsorted(ends, first, side="right")
    holder = np.searchsorted(snapped, first, side="right")
    group = groups[line]
    offset = first - (ends[line] - sizes[line])
    np.add.at(loads, holders[holder], stop - first)
    return Shares(group, holder, offset // regions.slice_bytes[group], (stop - first) // regions.slice_bytes[group])
