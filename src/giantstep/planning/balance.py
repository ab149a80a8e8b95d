"""Sharing replicated regions between their holders so that everybody moves equally much.

Regions with the same set of holders form one line of bytes. The line is cut at the points that level the
holders' loads ("water filling"), and a cut inside a large region divides it between two of its slices. Sets with
fewer holders go first, since they have less choice. So the work is vectorised per set, and every rank gets
consecutive regions. Called by `save_plan`, for writers, and by `exchange_plan`, for readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from giantstep.shards.region import Int64s

# A region smaller than this part of a rank's share is not divided, nor one smaller than that many bytes.
_SHARE_PARTS = 32
_FINE_BYTES = 4 << 10


@dataclass(frozen=True, slots=True)
class Regions:
    """Regions to be shared out.

    Attributes:
        slices: [groups] how many equal slices the region can be cut into.
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
        rank: [shares] the taker.
        first, count: [shares] slices taken.
    """

    group: Int64s
    rank: Int64s
    first: Int64s
    count: Int64s


def balance(
    regions: Regions,
    sets: Sequence[Int64s],
    set_of: Int64s,
    ranks: int,
    split_bytes: int,
    loads: Int64s | None = None,
) -> Shares:
    """Share all regions out.

    Args:
        regions: what is to be moved.
        sets: different sets of ranks, each ascending and not empty.
        set_of: [groups] which of them holds each region.
        ranks: number of ranks.
        split_bytes: regions smaller than this are divided only where their holders' shares are small too.
        loads: [ranks] bytes that each moves beside these; none if not given.
    """
    loads = np.zeros(ranks, dtype=np.int64) if loads is None else loads.astype(np.int64)
    members = np.array([len(held) for held in sets], dtype=np.int64)
    first_rank = np.array([int(held[0]) for held in sets], dtype=np.int64)
    alone = np.flatnonzero(members[set_of] == 1)
    takers = first_rank[set_of[alone]]
    np.add.at(loads, takers, regions.bytes[alone])
    parts = [Shares(alone, takers, np.zeros(len(alone), dtype=np.int64), regions.slices[alone])]
    order = np.argsort(set_of, kind="stable")
    ends = np.cumsum(np.bincount(set_of, minlength=len(sets)))
    lines = [
        (sets[number], order[ends[number - 1] if number else 0 : ends[number]])
        for number in np.argsort(members, kind="stable").tolist()
        if members[number] > 1
    ]
    lines = [(held, groups) for held, groups in lines if len(groups)]
    quotas = _levelled(lines, regions, loads)
    for (held, groups), quota in zip(lines, quotas, strict=True):
        # What lines before this one took is known by now; it may differ a little from what they were to take.
        loads[held] -= quota
        parts.append(_share_line(regions, groups, loads, held, split_bytes))
    return Shares(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("group", "rank", "first", "count")))


# Sweeps over sets that overlap; each moves loads along from set to set. With very many sets there are fewer, for the time
# that they take; then loads may stay a few percent apart.
_SWEEPS, _FEWEST_SWEEPS = 32, 2
_LEVELLINGS = 200_000


def _levelled(lines: Sequence[tuple[Int64s, Int64s]], regions: Regions, loads: Int64s) -> list[Int64s]:
    """What each holder is to take of each line, added to `loads`.

    One line after another is levelled, given what its holders take of the others, until nothing moves: the sum of squares
    of the loads falls with every step, and where no step lowers it, it is the lowest that the holders permit. Lines whose
    holders are disjoint or nested are level at once, so for them there is one sweep.
    """
    totals = [int(regions.bytes[groups].sum()) for _, groups in lines]
    quotas = [np.zeros(len(held), dtype=np.int64) for held, _ in lines]
    for _ in range(min(_SWEEPS, max(_FEWEST_SWEEPS, _LEVELLINGS // max(1, len(lines))))):
        moved = 0
        for number, (held, _) in enumerate(lines):
            others = loads[held] - quotas[number]
            found = _quotas(others, totals[number])
            moved = max(moved, int(np.abs(found - quotas[number]).max()))
            loads[held] = others + found
            quotas[number] = found
        if moved <= max(_FINE_BYTES, int(loads.max()) // 200):
            break
    return quotas


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
    share = int(ends[-1]) // len(holders)
    divisible = sizes[hit] >= min(split_bytes, max(_FINE_BYTES, share // _SHARE_PARTS))
    step = np.where(divisible, slice_bytes, sizes[hit])
    snapped = begin + (cuts - begin + step // 2) // step * step
    points = np.unique(np.concatenate(([0], ends, snapped)))
    first, stop = points[:-1], points[1:]
    line = np.searchsorted(ends, first, side="right")
    holder = np.searchsorted(snapped, first, side="right")
    group = groups[line]
    offset = first - (ends[line] - sizes[line])
    np.add.at(loads, holders[holder], stop - first)
    return Shares(group, holders[holder], offset // regions.slice_bytes[group], (stop - first) // regions.slice_bytes[group])
