"""Everybody's descriptions as one table: one row per shard of any class of ranks, keys numbered in stored order.

Ranks that describe the same form a *class* and have their rows once: replicas cost nothing. Classes that differ only in
regions, roles and digests share a *structure*, and are handled as one array.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import DisagreementError
from giantstep.planning.description import TENSOR_COLUMNS, Description
from giantstep.planning.local_names import local_name_hint
from giantstep.shards.dtypes import BY_CODE, ITEM_BYTES
from giantstep.shards.region import Int64s, ragged_to_padded


@dataclass(frozen=True, slots=True)
class ShardTable:
    """All shards of all ranks.

    Attributes:
        keys: distinct keys, sorted by their UTF-8 bytes.
        dtype: [tensors] dtype codes.
        ndim: [tensors] number of dimensions.
        shape: [tensors, width] global shapes, padded in front with 1.
        tied: [tensors] row of the tensor in whose memory this one lies on every rank that holds it; mostly its own.
        ranks: the ranks of each class, ascending.
        member: [rows] class whose ranks hold the shard.
        row: [rows] its row in the description of that class.
        tensor: [rows] row in `keys`.
        role, mesh, digest: as in `Description`.
        offset, size: [rows, width] regions, padded in front.
    """

    keys: list[str]
    dtype: NDArray[np.uint8]
    ndim: Int64s
    shape: Int64s
    tied: Int64s
    ranks: list[Int64s]
    member: Int64s
    row: Int64s
    tensor: Int64s
    role: NDArray[np.uint8]
    mesh: Int64s
    digest: NDArray[np.uint64]
    offset: Int64s
    size: Int64s

    @property
    def item_bytes(self) -> Int64s:
        """[tensors] bytes per element."""
        return np.array(ITEM_BYTES, dtype=np.int64)[self.dtype]

    @property
    def first_rank(self) -> Int64s:
        """[classes] lowest rank of each."""
        return np.array([int(ranks[0]) for ranks in self.ranks], dtype=np.int64)

    def ranks_of(self, rows: Iterable[int]) -> list[int]:
        """The ranks that hold some rows, ascending."""
        classes = {int(self.member[row]) for row in rows}
        return sorted(rank for number in classes for rank in self.ranks[number].tolist())

    def region_text(self, row: int) -> str:
        """The region of a row, for messages."""
        dims = int(self.ndim[self.tensor[row]])
        width = self.offset.shape[1]
        starts, counts = self.offset[row, width - dims :].tolist(), self.size[row, width - dims :].tolist()
        return "[" + ",".join(f"{start}:{start + count}" for start, count in zip(starts, counts, strict=True)) + "]"


@dataclass(slots=True)
class _Structure:
    """Classes whose ranks hold as many shards of the same tensors in the same order."""

    classes: list[int]
    descriptions: list[Description]
    keys: Int64s

    @property
    def one(self) -> Description:
        return self.descriptions[0]

    @property
    def tensor(self) -> Int64s:
        """[shards] row of each shard's tensor in the table."""
        return self.keys[self.one.shard_tensor]


def classes_of(descriptions: Sequence[Description], columns: Sequence[str]) -> tuple[list[Description], list[Int64s]]:
    """One of each kind of descriptions that share some columns (the same objects), and the ranks that gave each.

    By lowest rank; ranks ascending. Other columns of ranks of one kind may differ.
    """
    ranks: dict[tuple[int, ...], list[int]] = {}
    columns_of = operator.attrgetter(*columns)
    for rank, description in enumerate(descriptions):
        ranks.setdefault(tuple(map(id, columns_of(description))), []).append(rank)
    groups = [np.array(found, dtype=np.int64) for found in ranks.values()]
    return [descriptions[int(found[0])] for found in groups], groups


def tabulate(descriptions: Sequence[Description]) -> ShardTable:
    """Merge the descriptions of all ranks, in order of rank. Ranks that share all columns about tensors form a class.

    Raises:
        DisagreementError: one key has different dtypes or global shapes on different ranks.
    """
    different, ranks = classes_of(descriptions, TENSOR_COLUMNS)
    lists = {id(description.keys): description.keys for description in different}
    keys = sorted(set().union(*lists.values()), key=lambda key: key.encode("utf-8"))
    number = {key: position for position, key in enumerate(keys)}
    rows = {name: np.array([number[key] for key in found], dtype=np.int64) for name, found in lists.items()}
    structures: dict[Hashable, _Structure] = {}
    for position, found in enumerate(different):
        same = (id(found.keys), *map(id, (found.dtype, found.dims_ends, found.dims, found.shard_tensor)))
        structure = structures.setdefault(same, _Structure([], [], rows[id(found.keys)]))
        structure.classes.append(position)
        structure.descriptions.append(found)
    return _table(keys, list(structures.values()), ranks)


def _table(keys: list[str], structures: list[_Structure], ranks: list[Int64s]) -> ShardTable:
    # At least one column, so that 0-d tensors are boxes of one element like all others.
    width = max([1, *(int(s.one.tensor_ndim.max(initial=0)) for s in structures)])
    tensor = _joined([s.keys for s in structures])
    dtype = _joined([s.one.dtype for s in structures], np.uint8)
    ndim = _joined([s.one.tensor_ndim for s in structures])
    shape = _joined([ragged_to_padded(s.one.dims, s.one.dims_ends[:-1], s.one.tensor_ndim, 1, width) for s in structures])
    teller = np.repeat([int(ranks[s.classes[0]][0]) for s in structures], [len(s.keys) for s in structures])
    first = _check_agreement(keys, tensor, teller, dtype, ndim, shape.reshape(-1, width))
    counts = [(len(s.one.shard_tensor), len(s.classes)) for s in structures]

    def spread(name: str) -> list[NDArray[Any]]:
        """One column of all structures, shard by shard, and for each shard class by class."""
        return [_stacked([getattr(d, name) for d in s.descriptions]) for s in structures]

    return ShardTable(
        keys=keys,
        dtype=dtype[first],
        ndim=ndim[first],
        shape=shape.reshape(-1, width)[first],
        tied=_tied(len(keys), structures),
        ranks=ranks,
        member=_joined([np.tile(s.classes, shards) for s, (shards, _) in zip(structures, counts, strict=True)]),
        row=_joined([np.repeat(np.arange(shards), classes) for shards, classes in counts]),
        tensor=_joined([np.repeat(s.tensor, classes) for s, (_, classes) in zip(structures, counts, strict=True)]),
        role=_joined(spread("shard_role"), np.uint8),
        mesh=_joined(spread("shard_mesh")),
        digest=_joined(spread("shard_digest"), np.uint64).reshape(-1, 2),
        offset=_joined([_regions(s, "shard_offset", 0, width) for s in structures]).reshape(-1, width),
        size=_joined([_regions(s, "shard_size", 1, width) for s in structures]).reshape(-1, width),
    )


def _stacked(columns: list[NDArray[Any]]) -> NDArray[Any]:
    """[shards, classes, ...] from one array per class, flattened to rows."""
    stacked = np.stack(columns, axis=1) if len({id(column) for column in columns}) > 1 else None
    if stacked is None:
        return np.repeat(columns[0], len(columns), axis=0)
    return stacked.reshape(-1, *stacked.shape[2:])


def _regions(structure: _Structure, name: str, pad: int, width: int) -> Int64s:
    """[shards * classes, width] one side of the regions, padded in front."""
    dims = structure.one.tensor_ndim[structure.one.shard_tensor]
    starts = np.cumsum(dims) - dims
    columns = [getattr(description, name) for description in structure.descriptions]
    if len({id(column) for column in columns}) == 1:
        return np.repeat(ragged_to_padded(columns[0], starts, dims, pad, width), len(columns), axis=0)
    table = np.full((len(dims), len(columns), width), pad, dtype=np.int64)
    values = np.stack(columns)
    for count in np.unique(dims).tolist():
        if count:
            chosen = np.flatnonzero(dims == count)
            found = values[:, starts[chosen, None] + np.arange(count)]
            table[chosen, :, width - count :] = found.transpose(1, 0, 2)
    return table.reshape(-1, width)


def _tied(count: int, structures: Sequence[_Structure]) -> Int64s:
    """Per tensor, the one that all ranks that hold it say it is tied to; itself if they do not agree."""
    low, high = np.full(count, count, dtype=np.int64), np.full(count, -1, dtype=np.int64)
    for structure in structures:
        said = np.stack(list({id(d.tied): d.tied for d in structure.descriptions}.values()))
        told = np.where(said < 0, -1, structure.keys[said])
        low[structure.keys] = np.minimum(low[structure.keys], np.where(told < 0, count, told).min(axis=0))
        high[structure.keys] = np.maximum(high[structure.keys], told.max(axis=0))
    return np.where(low == high, low, np.arange(count))


def _joined(parts: Sequence[NDArray[Any]], dtype: type[np.generic] = np.int64) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype=dtype)


def _check_agreement(
    keys: list[str], tensor: Int64s, rank: Int64s, dtype: NDArray[np.uint8], ndim: Int64s, shape: Int64s
) -> Int64s:
    """Per key, the first row that describes it, once all rows of the key are seen to say the same."""
    _, first = np.unique(tensor, return_index=True)
    same = (dtype == dtype[first][tensor]) & (ndim == ndim[first][tensor]) & (shape == shape[first][tensor]).all(axis=1)
    wrong = np.flatnonzero(~same)
    if len(wrong):
        bad = int(wrong[0])
        good = int(first[tensor[bad]])

        def told(row: int) -> str:
            dims = shape[row, shape.shape[1] - int(ndim[row]) :].tolist()
            return f"{BY_CODE[int(dtype[row])].name} {tuple(dims)} on rank {int(rank[row])}"

        raise DisagreementError(
            f"tensor {keys[int(tensor[bad])]!r} is {told(good)} but {told(bad)}. One key has one dtype and global shape on "
            "all ranks: give different tensors different keys, or describe shards of one tensor with ShardedTensor."
            + (f" {len(wrong) - 1} more shards disagree." if len(wrong) > 1 else "")
            + local_name_hint(keys[int(tensor[bad])])
        )
    return first
