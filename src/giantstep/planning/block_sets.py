"""Blocks of all data files in one numbering, and which of them are wanted by the same set of requests.

The blocks of file f are the numbers from `ends[f]` to `ends[f + 1]`, as the rows of the index's block checksums. A
*request* is what some ranks want alike; it is given as runs of blocks. Called by `exchange_plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from giantstep.shards.region import Int64s
from giantstep.shards.words import mixed


@dataclass(frozen=True, slots=True)
class BlockTable:
    """The blocks of some files.

    Attributes:
        ends: [files + 1] number of the first block of each file.
        file_bytes: [files].
        block_bytes: of all but a file's last one.
    """

    ends: Int64s
    file_bytes: Int64s
    block_bytes: int

    def bytes_of(self, first: Int64s, count: Int64s) -> Int64s:
        """Bytes of runs of blocks."""
        return self._before(first + count) - self._before(first)

    def _before(self, block: Int64s) -> Int64s:
        """Bytes of all files before a block."""
        if not len(self.file_bytes):
            return np.zeros(len(block), dtype=np.int64)
        file = np.clip(np.searchsorted(self.ends, block, side="right") - 1, 0, len(self.file_bytes) - 1)
        within = np.minimum((block - self.ends[file]) * self.block_bytes, self.file_bytes[file])
        found: Int64s = np.cumsum(self.file_bytes)[file] - self.file_bytes[file] + within
        return found

    def place(self, block: int) -> tuple[int, int]:
        """File and first byte of a block."""
        file = int(np.searchsorted(self.ends, block, side="right")) - 1
        return file, (block - int(self.ends[file])) * self.block_bytes


def cut_runs(first: Int64s, count: Int64s, borders: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """Runs cut at ascending borders: first, count, and the run that each part is of."""
    low = np.searchsorted(borders, first, side="right")
    parts = np.searchsorted(borders, first + count, side="left") - low + 1
    run = np.repeat(np.arange(len(first)), parts)
    number = np.arange(len(run)) - np.searchsorted(run, run, side="left")
    border = np.append(borders, np.iinfo(np.int64).max)[low[run] + number]
    stop = np.minimum(border, (first + count)[run])
    start = first[run]
    start[1:] = np.where(number[1:] > 0, stop[:-1], start[1:])
    return start, stop - start, run


@dataclass(frozen=True, slots=True)
class SharedRuns:
    """Runs of blocks, each wanted by one set of requests; ascending and disjoint.

    Attributes:
        first, count: [runs] blocks.
        set_of: [runs] row of `sets`.
        sets: ascending requests; all different.
    """

    first: Int64s
    count: Int64s
    set_of: Int64s
    sets: list[Int64s]


def shared_runs(requests: Sequence[tuple[Int64s, Int64s]]) -> SharedRuns:
    """Cut what several requests want where the set of those that want it changes.

    Args:
        requests: first and count of the runs of each, ascending and disjoint.
    """
    owner = np.repeat(np.arange(len(requests)), [len(first) for first, _ in requests])
    start = np.concatenate([np.zeros(0, dtype=np.int64), *(first for first, _ in requests)])
    stop = start + np.concatenate([np.zeros(0, dtype=np.int64), *(count for _, count in requests)])
    points = np.unique(np.concatenate((start, stop)))
    low, high = np.searchsorted(points, start), np.searchsorted(points, stop)
    # A set is known by its size and the sum of well-mixed words of its members, added where they begin and taken off
    # where they end.
    size = np.cumsum(np.bincount(low, minlength=len(points)) - np.bincount(high, minlength=len(points)))[:-1]
    words = np.zeros((2, len(points)), dtype=np.uint64)
    for salt in range(2):
        word = mixed(np.arange(len(requests)), salt + 1)[owner]
        np.add.at(words[salt], low, word)
        np.subtract.at(words[salt], high, word)
    known = np.cumsum(words, axis=1)[:, :-1]
    number, example = _numbered(known, size)
    wanted = size > 0
    new = wanted.copy()
    new[1:] &= (number[1:] != number[:-1]) | ~wanted[:-1]
    begin = np.flatnonzero(new)
    # A run ends where the next one begins, or where nobody wants anything.
    run = np.cumsum(new) - 1
    first = points[begin]
    last = np.zeros(len(begin), dtype=np.int64)
    last[run[wanted]] = points[1:][wanted]
    return SharedRuns(first, last - first, number[begin], _members(low, high, owner, example))


def _numbered(known: np.ndarray, size: Int64s) -> tuple[Int64s, Int64s]:
    """A number for each interval, equal for equal sets, and the first interval of each number; -1 for the empty set."""
    number = np.full(len(size), -1, dtype=np.int64)
    held = np.flatnonzero(size > 0)
    if not len(held):
        return number, held
    order = held[np.lexsort((known[1, held], known[0, held], size[held]))]
    new = np.ones(len(order), dtype=bool)
    same = (np.diff(size[order]) == 0) & (known[:, order[1:]] == known[:, order[:-1]]).all(axis=0)
    new[1:] = ~same
    # Numbers in the order of the first intervals, which are also those looked at to tell the members.
    example = np.minimum.reduceat(order, np.flatnonzero(new))
    rank = np.empty(len(example), dtype=np.int64)
    rank[np.argsort(example)] = np.arange(len(example))
    number[order] = rank[np.cumsum(new) - 1]
    return number, np.sort(example)


def _members(low: Int64s, high: Int64s, owner: Int64s, example: Int64s) -> list[Int64s]:
    """The requests that want each of some intervals; `low` to `high` are the intervals of each run of a request."""
    begin, end = np.searchsorted(example, low), np.searchsorted(example, high)
    counts = end - begin
    member = np.repeat(owner, counts)
    found = np.repeat(begin - (np.cumsum(counts) - counts), counts) + np.arange(len(member))
    order = np.lexsort((member, found))
    return np.split(member[order], np.searchsorted(found[order], np.arange(1, len(example)))) if len(example) else []
