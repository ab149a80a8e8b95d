"""What of lost hosts, files and parity can be rebuilt, and out of what. Pure.

Parity works byte by byte, so losses are looked at by ranges: a stripe with more than m damaged blocks can still be rebuilt
where no more than m of them are damaged at the same bytes. What counts as zeros because a host had less to give is known,
even if the host is lost. Called by what restores node-local checkpoints. Not here: reading and rebuilding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from giantstep.errors import BadArgumentError
from giantstep.planning.stripes import Stripe, data_range, stored_bytes, touched

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes that are lost in the same blocks of a stripe.

    Attributes:
        stripe: of which stripe.
        start, stop: the range in its blocks.
        lost: numbers of the blocks, data or parity, ascending.
    """

    stripe: Stripe
    start: int
    stop: int
    lost: tuple[int, ...]

    def lost_data(self, stream_bytes: Sequence[int]) -> list[tuple[int, int, int]]:
        """The lost data as hosts with ranges of their streams.

        Args:
            stream_bytes: [hosts] length of each host's stream.
        """
        found = []
        for block in self.lost:
            if block < len(self.stripe.data):
                host = self.stripe.data[block]
                first, _ = data_range(self.stripe, host, stream_bytes[host])
                found.append((host, first + self.start, first + self.stop))
        return found


@dataclass(frozen=True, slots=True)
class Source:
    """A block that helps to rebuild others.

    Attributes:
        block: its number.
        host: who has it.
        start, stop: what to read, in bytes of the host's stream if the block is data, or of its block of parity for the
            stripe. Shorter than what is rebuilt, or empty, where the rest counts as zeros.
    """

    block: int
    host: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Repair:
    """Damage that can be mended.

    Attributes:
        damage: what to rebuild.
        sources: as many blocks as the stripe has data; ascending.
    """

    damage: Damage
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Losses:
    """What is lost. All of it can be rebuilt if `missing` is empty.

    Attributes:
        repairs: what can be rebuilt, by stripe and position.
        missing: what cannot, by stripe and position.
    """

    repairs: tuple[Repair, ...]
    missing: tuple[Damage, ...]


def losses(
    stripes: Sequence[Stripe],
    stream_bytes: Sequence[int],
    lost_hosts: Collection[int] = (),
    lost_ranges: Mapping[int, Sequence[Range]] | None = None,
    lost_parity: Mapping[int, Collection[int]] | None = None,
) -> Losses:
    """What of the losses can be rebuilt, and out of what: all data that are left, and as little parity as will do.

    Args:
        stripes: all stripes.
        stream_bytes: [hosts] length of each host's stream.
        lost_hosts: hosts of which everything is lost.
        lost_ranges: of other hosts, lost ranges of their streams, such as those of files; in any order, they may overlap.
        lost_parity: of other hosts, numbers of the stripes of which their parity is lost.
    """
    lost_ranges, lost_parity = lost_ranges or {}, lost_parity or {}
    _check_hosts(stripes, stream_bytes, {*lost_hosts, *lost_ranges, *lost_parity})
    _check_parity(stripes, lost_parity)
    affected = _lost_blocks(stripes, stream_bytes, frozenset(lost_hosts), lost_ranges, lost_parity)
    repairs: list[Repair] = []
    missing: list[Damage] = []
    for stripe in stripes:
        for damage in _damages(stripe, affected.get((stripe.group, stripe.number), {})):
            if len(damage.lost) > len(stripe.parity):
                missing.append(damage)
            else:
                repairs.append(Repair(damage, _sources(damage, stream_bytes)))
    return Losses(tuple(repairs), tuple(missing))


def _lost_blocks(
    stripes: Sequence[Stripe],
    stream_bytes: Sequence[int],
    lost_hosts: frozenset[int],
    lost_ranges: Mapping[int, Sequence[Range]],
    lost_parity: Mapping[int, Collection[int]],
) -> dict[tuple[int, int], dict[int, list[Range]]]:
    """Lost ranges by stripe (its group and number) and block; none is empty."""
    found: dict[tuple[int, int], dict[int, list[Range]]] = defaultdict(lambda: defaultdict(list))
    of_host: dict[int, list[Stripe]] = defaultdict(list)
    for stripe in stripes:
        for block, host in enumerate(stripe.hosts):
            of_host[host].append(stripe)
            parity = block >= len(stripe.data) and stripe.number in lost_parity.get(host, ())
            if (host in lost_hosts or parity) and (length := stored_bytes(stripe, block, stream_bytes)):
                found[stripe.group, stripe.number][block].append((0, length))
    for host, ranges in lost_ranges.items():
        for start, stop in ranges:
            for stripe, first, last in touched(of_host[host], host, stream_bytes[host], start, stop):
                found[stripe.group, stripe.number][stripe.block_of(host)].append((first, last))
    return found


def _damages(stripe: Stripe, lost: Mapping[int, Sequence[Range]]) -> list[Damage]:
    """The ranges of a stripe in which the same blocks are lost."""
    found: list[Damage] = []
    for start, stop in pairwise(sorted({edge for ranges in lost.values() for bounds in ranges for edge in bounds})):
        blocks = tuple(sorted(block for block, ranges in lost.items() if any(a <= start < b for a, b in ranges)))
        if found and found[-1].stop == start and found[-1].lost == blocks:
            found[-1] = Damage(stripe, found[-1].start, stop, blocks)
        elif blocks:
            found.append(Damage(stripe, start, stop, blocks))
    return found


def _sources(damage: Damage, stream_bytes: Sequence[int]) -> tuple[Source, ...]:
    stripe = damage.stripe
    # All data that are left, and parity only instead of those that are lost.
    chosen = [block for block in range(len(stripe.hosts)) if block not in damage.lost][: len(stripe.data)]
    found = []
    for block in chosen:
        host = stripe.hosts[block]
        # Invariant: what a lost host never had to give counts as zeros, and nothing is read from it.
        stop = min(damage.stop, stored_bytes(stripe, block, stream_bytes))
        start = min(damage.start, stop)
        base = data_range(stripe, host, stream_bytes[host])[0] if block < len(stripe.data) else 0
        found.append(Source(block, host, base + start, base + stop))
    return tuple(found)


def _check_hosts(stripes: Sequence[Stripe], stream_bytes: Sequence[int], hosts: set[int]) -> None:
    known = {host for stripe in stripes for host in stripe.hosts}
    if strange := sorted(hosts - known):
        raise BadArgumentError(
            f"losses of parity: hosts {strange} are in no stripe, which are of {len(known)} hosts; pass all stripes, and hosts "
            "by their numbers in `parity_groups`"
        )
    if max(known, default=-1) >= len(stream_bytes):
        raise BadArgumentError(
            f"losses of parity: stripes are of hosts up to {max(known)}, found lengths of {len(stream_bytes)} streams; pass "
            "that of each host, 0 if it has no files"
        )


def _check_parity(stripes: Sequence[Stripe], lost_parity: Mapping[int, Collection[int]]) -> None:
    for host, numbers in lost_parity.items():
        held = {stripe.number for stripe in stripes if host in stripe.parity}
        if strange := sorted(set(numbers) - held):
            raise BadArgumentError(
                f"losses of parity: host {host} holds parity of stripes {sorted(held)} of its group, found {strange}; pass the "
                "numbers of these stripes"
            )
