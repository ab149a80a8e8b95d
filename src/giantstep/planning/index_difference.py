"""What two indexes say of the chunks and objects that two checkpoints have in common: equal, different, or not known.

Called by `difference`, which reads what is not known. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.format.index import Index
from giantstep.planning.previous import common_regions, stored_regions
from giantstep.shards.region import Int64s

UNKNOWN, EQUAL, DIFFERENT = 0, 1, 2

States = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two checkpoints.

    Attributes:
        index, keys, object_keys: what it holds.
        file_names: of its data files. No two saves use one name, so equal names are equal files.
        block_bytes: size of its blocks.
    """

    index: Index
    keys: Sequence[str]
    object_keys: Sequence[str]
    file_names: Sequence[str]
    block_bytes: int


@dataclass(frozen=True, slots=True)
class _Places:
    """Where entries of one kind lie, and their digests."""

    file: Int64s
    start: Int64s
    bytes: Int64s
    digest: NDArray[np.uint64] | None
    head: NDArray[np.uint64] | None


def compare_chunks(first: Side, second: Side) -> States:
    """[chunks of `first`] whether the same region of the same tensor of `second` has the same bytes.

    UNKNOWN also where `second` is divided otherwise; DIFFERENT only where the bytes of the region are known to differ.
    """
    ours, theirs = common_regions(stored_regions(first.index, first.keys), stored_regions(second.index, second.keys))
    states = np.full(len(first.index.chunk_file), UNKNOWN, dtype=np.uint8)
    states[ours] = _compare(first, second, ours, theirs, _places(first.index, "chunk"), _places(second.index, "chunk"))
    return states


def compare_objects(first: Side, second: Side) -> States:
    """[objects of `first`] whether the object of `second` with the same key has the same bytes."""
    number = {key: row for row, key in enumerate(second.object_keys)}
    twin = np.array([number.get(key, -1) for key in first.object_keys], dtype=np.int64)
    ours = np.flatnonzero(twin >= 0)
    theirs = twin[ours]
    states = np.full(len(twin), UNKNOWN, dtype=np.uint8)
    states[ours] = np.where(first.index.object_bytes[ours] == second.index.object_bytes[theirs], UNKNOWN, DIFFERENT)
    same = states[ours] == UNKNOWN
    ours, theirs = ours[same], theirs[same]
    states[ours] = _compare(first, second, ours, theirs, _places(first.index, "object"), _places(second.index, "object"))
    return states


def _places(index: Index, kind: str) -> _Places:
    head = index.chunk_head if kind == "chunk" else None
    file, start, size, digest = (getattr(index, f"{kind}_{part}") for part in ("file", "start", "bytes", "digest"))
    return _Places(file, start, size, digest, head)


def _compare(first: Side, second: Side, ours: Int64s, theirs: Int64s, left: _Places, right: _Places) -> States:
    """Of pairs of entries of equal length: by place, by digest, by digest of their heads, by the blocks that they lie in."""
    number = {name: row for row, name in enumerate(second.file_names)}
    twin = np.array([number.get(name, -1) for name in first.file_names], dtype=np.int64)
    same = (twin[left.file[ours]] == right.file[theirs]) & (left.start[ours] == right.start[theirs])
    states = np.where(same, EQUAL, UNKNOWN).astype(np.uint8)
    for mine, yours, equality_counts in ((left.digest, right.digest, True), (left.head, right.head, False)):
        rows = np.flatnonzero(states == UNKNOWN)
        if mine is not None and yours is not None:
            first_words, second_words = mine[ours[rows]], yours[theirs[rows]]
            taken = first_words.any(axis=1) & second_words.any(axis=1)
            equal = (first_words == second_words).all(axis=1)
            states[rows[taken & ~equal]] = DIFFERENT
            if equality_counts:
                states[rows[taken & equal]] = EQUAL
    if first.block_bytes == second.block_bytes:
        rows = np.flatnonzero(states == UNKNOWN)
        aligned = (left.start[ours[rows]] - right.start[theirs[rows]]) % first.block_bytes == 0
        for row in rows[aligned].tolist():
            states[row] = _compare_blocks(first, second, int(ours[row]), int(theirs[row]), left, right)
    return states


def _compare_blocks(first: Side, second: Side, ours: int, theirs: int, left: _Places, right: _Places) -> int:
    """Of two entries that begin at the same byte of a block: blocks at the ends also hold bytes of their neighbours."""
    size, length = first.block_bytes, int(left.bytes[ours])
    if not length:
        return EQUAL
    found = []
    for side, places, row in ((first, left, ours), (second, right, theirs)):
        base = int(side.index.file_block_ends[places.file[row]])
        start = int(places.start[row])
        found.append(side.index.block_checksum[base + start // size : base + (start + length - 1) // size + 1])
    equal = found[0] == found[1]
    if equal.all():
        return EQUAL
    start = int(left.start[ours])
    inner = slice(1 if start % size else 0, len(equal) - (1 if (start + length) % size else 0))
    return UNKNOWN if equal[inner].all() else DIFFERENT
