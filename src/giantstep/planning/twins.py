"""Who writes the copies of what several ranks hold: in other failure domains, from their own memory, so that nothing is sent.

A *twin* of a writer writes the same bytes in a file of the same name in its own host's place. Of the ranks that hold a
region, those of each domain stand in a row; a writer's twins are the ranks at its place in the rows of the next domains, so
that equal shares of writing make equal shares of copying. Called by `save_plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from giantstep.shards.region import Int64s

NOBODY = -1


@dataclass(frozen=True, slots=True)
class Replication:
    """How often bytes are to be there besides the first time, and what can be lost at once.

    Attributes:
        copies: how many.
        domain: [ranks] number of the failure domain of each.
        circle: [ranks] number of the circle of hosts of each: copies stay within it.
    """

    copies: int
    domain: Int64s
    circle: Int64s


def twins_of(sets: Sequence[Int64s], set_of: Int64s, writer: Int64s, replication: Replication) -> Int64s:
    """[chunks, copies] the twins of each chunk's writer; `NOBODY` where no further domain holds the chunk.

    Args:
        sets: ranks that hold the same, each ascending.
        set_of: [chunks] which of them holds each.
        writer: [chunks].
        replication: how many copies, and the domains.
    """
    ranks = len(replication.domain)
    pairs, pair_of = np.unique(set_of * ranks + writer, return_inverse=True)
    found = np.full((len(pairs), replication.copies), NOBODY, dtype=np.int64)
    for row, pair in enumerate(pairs.tolist()):
        held, first = sets[pair // ranks], pair % ranks
        twins = _next_domains(held, first, replication)
        found[row, : len(twins)] = twins
    result: Int64s = found[pair_of.reshape(-1)]
    return result


def _next_domains(held: Int64s, writer: int, replication: Replication) -> Int64s:
    held = held[replication.circle[held] == replication.circle[writer]]
    domain = replication.domain[held]
    names = np.unique(domain)
    own = int(np.searchsorted(names, replication.domain[writer]))
    order = np.roll(names, -own)[1 : 1 + replication.copies]
    place = int(np.searchsorted(held[domain == names[own]], writer))
    rows = [held[domain == name] for name in order.tolist()]
    return np.array([row[place % len(row)] for row in rows], dtype=np.int64)


def file_groups(writer: Int64s, twins: Int64s) -> Int64s:
    """[chunks] number of its group: chunks of one writer that have the same twins, and so lie in the same files."""
    if not len(writer):
        return np.zeros(0, dtype=np.int64)
    _, group = np.unique(np.column_stack((writer, twins)), axis=0, return_inverse=True)
    group = group.reshape(-1)
    first = np.full(int(writer.max()) + 1, len(writer), dtype=np.int64)
    np.minimum.at(first, writer, group)
    result: Int64s = group - first[writer]
    return result
