"""Which chunks and objects of a save lie unchanged in files of an earlier step, and which of its files to use again.

Called by `reusing`, and by `difference` for regions that two checkpoints have in common. Not here: taking digests
(`writing.contents`), linking files (`commit.link`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.format.container import DATA_ALIGNMENT
from giantstep.format.index import Index
from giantstep.planning.load_tables import tabulate_chunks
from giantstep.planning.save_plan import SavePlan
from giantstep.shards.region import Int64s
from giantstep.shards.words import mixed

Digests = NDArray[np.uint64]

CHANGED, SETTLED, REUSED = 0, 1, 2
"""What becomes of an entry: it has changed and is written; it has not, but is written, with others like it; it lies in a file
that is used again."""

# A file with less than this part of what a rank writes on average is not used again, but written together with others: so
# there are never many times more files than ranks.
_SMALL_PARTS = 32
# But files of the greatest size allowed are used, however many a rank has.
_FULL_PARTS = 4


@dataclass(frozen=True, slots=True)
class RegionTable:
    """Regions of tensors.

    Attributes:
        keys: of the tensors.
        dtype, ndim: [tensors] codes of dtypes, numbers of dimensions.
        tensor: [rows] row in `keys`.
        offset, size: [rows, width] regions, padded in front.
    """

    keys: Sequence[str]
    dtype: NDArray[np.uint8]
    ndim: Int64s
    tensor: Int64s
    offset: Int64s
    size: Int64s


def planned_regions(plan: SavePlan) -> RegionTable:
    """The chunks of a plan."""
    return RegionTable(plan.keys, plan.dtype, plan.ndim, plan.tensor, plan.offset, plan.size)


def stored_regions(index: Index, keys: Sequence[str]) -> RegionTable:
    """The chunks of an index."""
    table = tabulate_chunks(index)
    return RegionTable(keys, index.tensor_dtype, np.diff(index.tensor_dims_ends), table.tensors(), table.offset, table.size)


def common_regions(first: RegionTable, second: RegionTable) -> tuple[Int64s, Int64s]:
    """Rows of both tables that are the same region of a tensor of the same key, dtype and number of dimensions."""
    number = {key: row for row, key in enumerate(second.keys)}
    twin = np.array([number.get(key, -1) for key in first.keys], dtype=np.int64)
    found = np.flatnonzero(twin >= 0)
    alike = (first.dtype[found] == second.dtype[twin[found]]) & (first.ndim[found] == second.ndim[twin[found]])
    twin[found[~alike]] = -1
    rows = np.flatnonzero(twin[first.tensor] >= 0)
    width = max(first.offset.shape[1], second.offset.shape[1])
    ours = np.column_stack(
        (twin[first.tensor[rows]], _widened(first.offset[rows], 0, width), _widened(first.size[rows], 1, width))
    )
    theirs = np.column_stack((second.tensor, _widened(second.offset, 0, width), _widened(second.size, 1, width)))
    # Sorting a word of each row is faster than sorting rows. Rows whose words are equal by chance are told apart below.
    _, left, right = np.intersect1d(_words(ours), _words(theirs), return_indices=True)
    same = (ours[left] == theirs[right]).all(axis=1)
    return rows[left[same]], right[same]


def _widened(table: Int64s, pad: int, width: int) -> Int64s:
    found = np.full((len(table), width), pad, dtype=np.int64)
    found[:, width - table.shape[1] :] = table
    return found


def _words(rows: Int64s) -> NDArray[np.uint64]:
    words = np.zeros(len(rows), dtype=np.uint64)
    for column in range(rows.shape[1]):
        words = mixed(words ^ mixed(rows[:, column], column), column)
    return words


@dataclass(frozen=True, slots=True)
class Contents:
    """What a save would write.

    Attributes:
        plan: its chunks.
        chunk_head, chunk_digest: [chunks, 1 and 2] of each, in the order of the plan; zeros where none was taken.
        object_keys: names of its objects, in any order.
        object_bytes, object_digest: their sizes and digests.
    """

    plan: SavePlan
    chunk_head: Digests
    chunk_digest: Digests
    object_keys: Sequence[str]
    object_bytes: Int64s
    object_digest: Digests

    @property
    def bytes(self) -> int:
        """All of it."""
        return int(self.plan.bytes.sum() + self.object_bytes.sum())


Pairs = tuple[Int64s, Int64s]
"""Chunks of a plan, and the chunks of an index that are the same regions."""


def always_changing(heads: Digests, pairs: Pairs, index: Index, recent: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[chunks of the plan] whether a chunk has changed since the earlier step, as its head shows, and was written at that one.

    A digest of such a chunk is of no use now, and probably not at the next step either. One that was used again at the
    earlier step may come to rest at once.

    Args:
        heads: of the chunks of the plan.
        pairs: regions that both have.
        index: of the earlier step.
        recent: [files] of that step, whether it has written it.
    """
    found = np.zeros(len(heads), dtype=bool)
    if index.chunk_head is not None:
        ours, theirs = pairs
        now, then = heads[ours, 0], index.chunk_head[theirs, 0]
        found[ours] = (now != then) & (now != 0) & (then != 0) & recent[index.chunk_file[theirs]]
    return found


def equal_digests(first: Digests, second: Digests) -> NDArray[np.bool_]:
    """Per row whether both were taken, and are equal."""
    found: NDArray[np.bool_] = (first == second).all(axis=1) & first.any(axis=1)
    return found


@dataclass(frozen=True, slots=True)
class Unchanged:
    """Per chunk of a plan and per object: its row in the index of the earlier step; -1 if it is not there as it is now."""

    chunk: Int64s
    object: Int64s


def find_unchanged(contents: Contents, pairs: Pairs, index: Index, object_keys: Sequence[str]) -> Unchanged:
    """What lies in the earlier step as it is: the same region of the same key and dtype, with the same digest.

    Args:
        contents: of the save.
        pairs: regions that both have.
        index, object_keys: of the earlier step; without digests nothing is found.
    """
    found = Unchanged(
        np.full(len(contents.plan.tensor), -1, dtype=np.int64), np.full(len(contents.object_keys), -1, dtype=np.int64)
    )
    if index.chunk_digest is not None:
        ours, theirs = pairs
        same = equal_digests(contents.chunk_digest[ours], index.chunk_digest[theirs])
        ours, theirs = ours[same], theirs[same]
        # Invariant: no place is used for two chunks: tensors that are tied no longer do not share bytes.
        _, first = np.unique(np.stack((index.chunk_file[theirs], index.chunk_start[theirs])), axis=1, return_index=True)
        found.chunk[ours[first]] = theirs[first]
    if index.object_digest is not None:
        number = {key: row for row, key in enumerate(object_keys)}
        rows = np.array([number.get(key, -1) for key in contents.object_keys], dtype=np.int64)
        held = np.flatnonzero(rows >= 0)
        same = equal_digests(contents.object_digest[held], index.object_digest[rows[held]])
        same &= contents.object_bytes[held] == index.object_bytes[rows[held]]
        found.object[held[same]] = rows[held[same]]
    return found


@dataclass(frozen=True, slots=True)
class FileUse:
    """What of each file of the earlier step is wanted.

    Attributes:
        live: [files] bytes that are unchanged.
        total: [files] bytes of all entries.
        worth: [files] whether it is to be used again.
    """

    live: Int64s
    total: Int64s
    worth: NDArray[np.bool_]


def choose_files(
    unchanged: Unchanged, index: Index, file_bytes: Int64s, contents: Contents, *, least_live: float, max_file_bytes: int
) -> FileUse:
    """Decide which files of the earlier step are used again: not those that are mostly dead, nor very small ones.

    Args:
        unchanged, contents: what is wanted.
        index, file_bytes: of the earlier step.
        least_live: part of a file that must be wanted.
        max_file_bytes: greatest size of files.
    """
    live = np.zeros(len(file_bytes), dtype=np.int64)
    for row, file, size in (
        (unchanged.chunk, index.chunk_file, index.chunk_bytes),
        (unchanged.object, index.object_file, index.object_bytes),
    ):
        wanted = row[row >= 0]
        np.add.at(live, file[wanted], size[wanted])
    # Headers are a few KiB more than this at most, and count as dead.
    total = np.maximum(live, file_bytes - DATA_ALIGNMENT)
    small = min(contents.bytes // contents.plan.ranks // _SMALL_PARTS, max_file_bytes // _FULL_PARTS)
    return FileUse(live, total, (live > 0) & (live >= least_live * total) & (live >= small))


def states_of(rows: Int64s, file: Int64s, linked: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Per entry CHANGED, SETTLED or REUSED.

    Args:
        rows: of entries, in the index of the earlier step; -1 for changed ones.
        file: column of that index.
        linked: [files] of that step, whether it is used again.
    """
    found = np.full(len(rows), CHANGED, dtype=np.uint8)
    held = np.flatnonzero(rows >= 0)
    found[held] = np.where(linked[file[rows[held]]], REUSED, SETTLED)
    return found
