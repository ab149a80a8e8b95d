"""Which files go where, so that each lies in enough failure domains: worked out on rank 0 from what all have written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from giantstep.errors import PeerFailureError
from giantstep.format.digests import Checksums
from giantstep.planning.columns import pack_column, pack_texts, unpack_column, unpack_texts
from giantstep.planning.description import Parts
from giantstep.planning.save_plan import SavePlan
from giantstep.planning.twins import file_groups
from giantstep.tiers.file_numbers import group_of_file
from giantstep.tiers.hosts import HostMap, Ring


@dataclass(frozen=True, slots=True)
class FileFacts:
    """Files that a rank has written: names, sizes, and the checksums of their blocks."""

    names: list[str]
    bytes: list[int]
    checksums: list[Checksums]

    def encode(self) -> Parts:
        """As a message."""
        blocks = np.array([len(found) for found in self.checksums], dtype=np.int64)
        sums = np.concatenate([np.empty(0, np.uint64), *self.checksums])
        return (
            *pack_texts(self.names),
            pack_column(np.array(self.bytes, dtype=np.int64)),
            pack_column(blocks),
            pack_column(sums),
        )

    @classmethod
    def decode(cls, parts: Parts) -> FileFacts:
        """Inverse of `encode`."""
        if len(parts) != FACTS_PARTS:
            raise PeerFailureError(f"a rank told of its files in {len(parts)} parts, expected {FACTS_PARTS}")
        names, sizes, blocks = unpack_texts(*parts[:2]), unpack_column(parts[2]), unpack_column(parts[3])
        sums = unpack_column(parts[4], np.uint64)
        return cls(names, sizes.tolist(), np.split(sums, np.cumsum(blocks)[:-1]) if len(blocks) else [])


FACTS_PARTS = 5


@dataclass(frozen=True, slots=True)
class Copying:
    """What is to be sent.

    Attributes:
        moves: (file's name, bytes, from, to, checksums), in the order in which they are carried.
        spared_bytes: of copies that twins wrote, which were not sent.
        diverged: names of files that a twin wrote otherwise than their owner: the owner's is sent.
    """

    moves: list[tuple[str, int, int, int, Checksums]]
    spared_bytes: int
    diverged: list[str]


def plan_copies(plan: SavePlan, hosts: HostMap, copies: int, own: Sequence[FileFacts], twins: Sequence[FileFacts]) -> Copying:
    """Work out what is to be sent.

    Args:
        plan: which says who the twins of each file are.
        hosts: all of them.
        copies: of each file, besides the first.
        own, twins: by rank, its own files, and those that it wrote as a twin.
    """
    found = Copying([], 0, [])
    if not copies:
        return found
    ring = Ring(hosts)
    twins_of = _twins_of_groups(plan)
    written = [dict(zip(facts.names, facts.checksums, strict=True)) for facts in twins]
    spared = 0
    for rank, facts in enumerate(own):
        for name, size, sums in zip(facts.names, facts.bytes, facts.checksums, strict=True):
            named = twins_of.get((rank, group_of_file(name)), ())
            good = [twin for twin in named if np.array_equal(written[twin].get(name, ()), sums)]
            spared += size * len(good)
            others = [twin for twin in named if twin not in good]
            if others:
                found.diverged.append(name)
            taken = {hosts.domain[hosts.host[twin]] for twin in named}
            targets = [*others, *ring.targets(rank, taken, copies - len(named))]
            if len(good) + len(targets) < copies:
                raise PeerFailureError(f"{name} can be copied to {len(good) + len(targets)} failure domains, expected {copies}")
            found.moves.extend((name, size, rank, target, sums) for target in targets)
    return Copying(found.moves, spared, found.diverged)


def _twins_of_groups(plan: SavePlan) -> Mapping[tuple[int, int], tuple[int, ...]]:
    """By writer and group of files, the twins."""
    groups = file_groups(plan.writer, plan.twin)
    rows = np.unique(np.column_stack((plan.writer, groups, plan.twin)), axis=0)
    return {(row[0], row[1]): tuple(twin for twin in row[2:] if twin >= 0) for row in rows.tolist()}
