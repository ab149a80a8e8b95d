"""Which host gives which bytes to which stripe of parity, and which host holds the parity. Pure.

Hosts form groups in which all failure domains differ. In a group of g hosts there are g stripes, rotated as in RAID 5 and 6:
each host gives data to g-m of them and holds parity of the other m. A host's files one after another are one stream, cut
into g-m equal parts; a stripe takes one part each of g-m hosts, and gets m blocks of parity from them. Parts that are
shorter than the longest of their stripe count as filled up with zeros; nobody stores those.

Called by what saves and restores node-local checkpoints. Not here: the arithmetic (`tiers.parity`), and what can be
rebuilt (`planning.stripe_losses`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from giantstep.errors import BadArgumentError

# Parts begin at multiples of it.
PART_ALIGNMENT_BYTES = 64
# The blocks of a stripe are told apart by the elements of a field of 256.
MOST_HOSTS_OF_A_GROUP = 256


@dataclass(frozen=True, slots=True)
class Stripe:
    """Blocks that are kept safe together. Numbers of blocks: data first, then parity, in the orders given.

    Attributes:
        group, number: which stripe of which group; `number` is the position in the group where parity begins.
        parity: the m hosts that hold its parity.
        data: the other hosts of the group, in ring order after these.
    """

    group: int
    number: int
    parity: tuple[int, ...]
    data: tuple[int, ...]

    @property
    def hosts(self) -> tuple[int, ...]:
        """The host of each block."""
        return self.data + self.parity

    def block_of(self, host: int) -> int:
        """The number of the host's block: each host of the group has one."""
        if host not in self.hosts:
            raise BadArgumentError(
                f"stripe {self.number} of parity group {self.group}: host {host} is not of the group, whose hosts are "
                f"{sorted(self.hosts)}; ask a stripe of the host's own group"
            )
        return self.hosts.index(host)


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of one file.

    Attributes:
        file: number of the file.
        offset, length: in bytes.
    """

    file: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Stream:
    """A host's files, one after another.

    Attributes:
        ends: position behind the last byte of each file.
    """

    ends: tuple[int, ...]

    @classmethod
    def of(cls, file_bytes: Sequence[int]) -> Stream:
        """The stream of files of these sizes, in this order."""
        if any(size < 0 for size in file_bytes):
            raise BadArgumentError(f"files of a host: sizes are at least 0 bytes, found {min(file_bytes)}; pass sizes in bytes")
        return cls(tuple(accumulate(file_bytes)))

    @property
    def stream_bytes(self) -> int:
        """Bytes of all files."""
        return self.ends[-1] if self.ends else 0

    def range_of(self, file: int) -> tuple[int, int]:
        """First position of a file's bytes, and the one behind the last."""
        return (self.ends[file - 1] if file else 0), self.ends[file]

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """The parts of files that are the stream's bytes from `start` to before `stop`, in order; none of length 0."""
        check_range("stream of a host", start, stop, self.stream_bytes)
        found = []
        file = bisect_right(self.ends, start)
        while start < stop:
            begin, end = self.range_of(file)
            if end > start:
                found.append(Piece(file, start - begin, min(end, stop) - start))
                start = min(end, stop)
            file += 1
        return found


def parity_groups(domains: Sequence[int], k: int, m: int) -> list[tuple[int, ...]]:
    """Hosts in groups of which each survives the loss of any m hosts.

    Sizes differ by 1 at most, and are as near to k+m as the number of hosts allows. Groups are smaller than that where hosts
    of one domain would meet otherwise.

    Args:
        domains: failure domain of each host; hosts of equal numbers may be lost together.
        k: data blocks of a stripe, where hosts suffice.
        m: parity blocks of a stripe.

    Returns:
        The hosts of each group, ascending. All domains of a group differ, and each host is in one group.
    """
    if k < 1 or m < 1 or k + m > MOST_HOSTS_OF_A_GROUP:
        raise BadArgumentError(
            f"parity=({k}, {m}): expected at least 1 data block and 1 parity block, {MOST_HOSTS_OF_A_GROUP} in all; choose "
            "other numbers"
        )
    hosts, largest = len(domains), max(Counter(domains).values(), default=0)
    most = hosts // (m + 1)
    if most == 0:
        raise BadArgumentError(
            f"parity=({k}, {m}): expected at least {m + 1} hosts, each in a failure domain of its own; found {hosts} "
            f"hosts in {len(set(domains))} domains; choose a smaller m, or add hosts"
        )
    if largest > most:
        raise BadArgumentError(
            f"parity=({k}, {m}): a group has at least {m + 1} hosts, all in different failure domains, so {hosts} hosts need "
            f"at least {-(-hosts // most)} domains with at most {most} hosts each; found {len(set(domains))} domains, the "
            f"largest with {largest} hosts; choose a smaller m, or divide the domains"
        )
    # The nearest number of groups: one host more than k+m must not make two groups of half the size, of twice the overhead.
    count = min(max((2 * hosts + k + m) // (2 * (k + m)), largest, 1), most)
    if -(-hosts // count) > MOST_HOSTS_OF_A_GROUP:
        raise BadArgumentError(
            f"parity=({k}, {m}): {hosts} hosts give {count} groups of {-(-hosts // count)}, and a group has at most "
            f"{MOST_HOSTS_OF_A_GROUP}; choose a smaller m"
        )
    # Dealt out domain by domain: as no domain has more hosts than there are groups, none of them meet.
    dealt = sorted(range(hosts), key=lambda host: domains[host])
    return [tuple(sorted(dealt[group::count])) for group in range(count)]


def stripes_of(groups: Sequence[Sequence[int]], m: int) -> list[Stripe]:
    """All stripes, group by group and by number within each.

    Args:
        groups: hosts of each group, in ring order; no host in two of them.
        m: parity blocks of a stripe.
    """
    found: list[Stripe] = []
    for group, hosts in enumerate(groups):
        if not 1 <= m < len(hosts):
            raise BadArgumentError(
                f"parity group {group}: {m} parity blocks need at least 1 host for them and 1 more; found {len(hosts)} "
                "hosts; divide hosts with `parity_groups`"
            )
        for number in range(len(hosts)):
            ring = [*hosts[number:], *hosts[:number]]
            found.append(Stripe(group, number, tuple(ring[:m]), tuple(ring[m:])))
    if (total := sum(map(len, groups))) != len({host for hosts in groups for host in hosts}):
        raise BadArgumentError(f"parity groups: {total} places, and some host has two; each host is in one group, once")
    return found


def data_range(stripe: Stripe, host: int, stream_bytes: int) -> tuple[int, int]:
    """The bytes of a host's stream that are its data block: first position, and the one behind the last.

    Args:
        stripe: one to which the host gives data.
        host: the host.
        stream_bytes: length of its stream.
    """
    block, parts = stripe.block_of(host), len(stripe.data)
    if block >= parts:
        raise BadArgumentError(
            f"stripe {stripe.number} of parity group {stripe.group}: host {host} holds parity, data come from "
            f"{list(stripe.data)}; ask for one of these"
        )
    return _part_range(stripe, block, stream_bytes)


def stored_bytes(stripe: Stripe, block: int, stream_bytes: Sequence[int]) -> int:
    """Bytes that the host of a block has of it; what follows counts as zeros.

    Args:
        stripe: of which stripe.
        block: number of the block.
        stream_bytes: [hosts] length of each host's stream.
    """
    if block >= len(stripe.data):
        return block_bytes(stripe, stream_bytes)
    start, stop = _part_range(stripe, block, stream_bytes[stripe.data[block]])
    return stop - start


def block_bytes(stripe: Stripe, stream_bytes: Sequence[int]) -> int:
    """Length of a stripe's blocks: that of its longest part.

    Args:
        stripe: the stripe.
        stream_bytes: [hosts] length of each host's stream.
    """
    return max(stored_bytes(stripe, block, stream_bytes) for block in range(len(stripe.data)))


def touched(stripes: Sequence[Stripe], host: int, stream_bytes: int, start: int, stop: int) -> list[tuple[Stripe, int, int]]:
    """The ranges within the host's data blocks that are the stream's bytes from `start` to before `stop`.

    Args:
        stripes: at least those of the host's group; others are passed over.
        host: the host.
        stream_bytes: length of its stream.
        start, stop: the bytes.

    Returns:
        Stripes with first position and the one behind the last, counted from the block's begin; none is empty.
    """
    check_range(f"stream of host {host}", start, stop, stream_bytes)
    found = []
    for stripe in stripes:
        if host in stripe.data:
            first, last = data_range(stripe, host, stream_bytes)
            if max(first, start) < min(last, stop):
                found.append((stripe, max(first, start) - first, min(last, stop) - first))
    return found


def check_range(what: str, start: int, stop: int, length: int) -> None:
    """Raise unless the range lies within the length."""
    if not 0 <= start <= stop <= length:
        raise BadArgumentError(f"{what}: expected a range within its {length} bytes, found {start} to {stop}; pass one that is")


def _part_range(stripe: Stripe, block: int, stream_bytes: int) -> tuple[int, int]:
    """`data_range` of the host whose data block has this number."""
    parts = len(stripe.data)
    part_bytes = -(-stream_bytes // (parts * PART_ALIGNMENT_BYTES)) * PART_ALIGNMENT_BYTES
    # Parts go to the stripes after the host's own position, in ring order; in each next one its block is one earlier.
    part = parts - 1 - block
    return min(part * part_bytes, stream_bytes), min((part + 1) * part_bytes, stream_bytes)
