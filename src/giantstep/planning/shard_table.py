"""Everybody's descriptions as one table: one row per shard of any rank, keys numbered in stored order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import DisagreementError
from giantstep.planning.description import Description
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
        rank: [rows] rank that holds the shard.
        row: [rows] its row in that rank's description.
        tensor: [rows] row in `keys`.
        role, mesh, digest: as in `Description`.
        offset, size: [rows, width] regions, padded in front.
    """

    keys: list[str]
    dtype: NDArray[np.uint8]
    ndim: Int64s
    shape: Int64s
    tied: Int64s
    rank: Int64s
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

    def region_text(self, row: int) -> str:
        """The region of a row, for messages."""
        dims = int(self.ndim[self.tensor[row]])
        width = self.offset.shape[1]
        starts, counts = self.offset[row, width - dims :].tolist(), self.size[row, width - dims :].tolist()
        return "[" + ",".join(f"{start}:{start + count}" for start, count in zip(starts, counts, strict=True)) + "]"


def tabulate(descriptions: Sequence[Description]) -> ShardTable:
    """Merge the descriptions of all ranks, in order of rank.

    Raises:
        DisagreementError: one key has different dtypes or global shapes on different ranks.
    """
    keys = sorted({key for description in descriptions for key in description.keys}, key=lambda key: key.encode("utf-8"))
    number = {key: position for position, key in enumerate(keys)}
    # At least one column, so that 0-d tensors are boxes of one element like all others.
    width = max([1, *(int(d.tensor_ndim.max()) for d in descriptions if len(d.keys))])
    global_rows = [np.array([number[key] for key in d.keys], dtype=np.int64) for d in descriptions]
    tensor_rank = np.repeat(np.arange(len(descriptions)), [len(d.keys) for d in descriptions])
    tensor = _ints(global_rows)
    dtype = _codes(d.dtype for d in descriptions)
    ndim = _ints([d.tensor_ndim for d in descriptions])
    shape = np.concatenate(
        [np.empty((0, width), np.int64)]
        + [ragged_to_padded(d.dims, d.dims_ends[:-1], d.tensor_ndim, 1, width) for d in descriptions]
    )
    first = _check_agreement(keys, tensor, tensor_rank, dtype, ndim, shape)
    shard_ndim = [d.tensor_ndim[d.shard_tensor] for d in descriptions]
    starts = [np.cumsum(dims) - dims for dims in shard_ndim]

    def padded(name: str, pad: int) -> Int64s:
        tables = [
            ragged_to_padded(getattr(d, name), start, dims, pad, width)
            for d, start, dims in zip(descriptions, starts, shard_ndim, strict=True)
        ]
        return np.concatenate([np.empty((0, width), np.int64), *tables])

    counts = [len(d.shard_tensor) for d in descriptions]
    return ShardTable(
        keys=keys,
        dtype=dtype[first],
        ndim=ndim[first],
        shape=shape[first],
        tied=_tied(tensor, [np.where(d.tied < 0, -1, rows[d.tied]) for rows, d in zip(global_rows, descriptions, strict=True)]),
        rank=np.repeat(np.arange(len(descriptions)), counts),
        row=_ints([np.arange(count) for count in counts]),
        tensor=_ints([rows[d.shard_tensor] for rows, d in zip(global_rows, descriptions, strict=True)]),
        role=_codes(d.shard_role for d in descriptions),
        mesh=_ints([d.shard_mesh for d in descriptions]),
        digest=np.concatenate([np.empty((0, 2), np.uint64), *(d.shard_digest for d in descriptions)]),
        offset=padded("shard_offset", 0),
        size=padded("shard_size", 1),
    )


def _tied(tensor: Int64s, parts: list[Int64s]) -> Int64s:
    """Per tensor, the one that all ranks that hold it say it is tied to; itself if they do not agree."""
    count = int(tensor.max(initial=-1)) + 1
    said = _ints(parts)
    holding = said >= 0
    low, high = np.full(count, count, dtype=np.int64), np.full(count, -1, dtype=np.int64)
    np.minimum.at(low, tensor[holding], said[holding])
    np.maximum.at(high, tensor[holding], said[holding])
    return np.where(low == high, low, np.arange(count))


def _ints(parts: Iterable[NDArray[Any]]) -> Int64s:
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64, copy=False)


def _codes(parts: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return np.concatenate([np.empty(0, np.uint8), *parts])


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
        )
    return first
