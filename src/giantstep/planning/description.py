"""What one rank tells the planner of its shards: compact columns, and their form on the wire."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import PeerFailureError
from giantstep.planning.columns import pack_column, pack_texts, unpack_column, unpack_texts
from giantstep.shards.region import Int64s

MAIN, COPY, IMPLICIT = 0, 1, 2
"""Roles of a shard: declared main replica, declared further replica, or one of equals of which any may be main."""


@dataclass(frozen=True, slots=True)
class Description:
    """One rank's tensors and shards.

    Attributes:
        keys: distinct tensor keys.
        dtype: [tensors] dtype codes.
        dims_ends, dims: global shapes, one after another.
        shard_tensor: [shards] row in `keys`.
        shard_role: [shards] MAIN, COPY or IMPLICIT.
        shard_mesh: [shards] the set of ranks within which IMPLICIT holders are known to be equal; 0 for none.
        shard_offset, shard_size: regions, ragged: as many values per shard as its tensor has dimensions.
        shard_digest: [shards, 2] digest of the content; zeros where none was taken.
        tied: [tensors] row of the tensor (itself, or another) in whose memory the tensor lies on this rank; -1 where
            this rank holds nothing of it.
        object_keys: names of the objects that this rank holds.
        object_role: [objects] MAIN, COPY or IMPLICIT.
        object_digest: [objects, 2] digest of the value.
        object_bytes: [objects] size as stored; 0 where this rank will not write it.
    """

    keys: list[str]
    dtype: NDArray[np.uint8]
    dims_ends: Int64s
    dims: Int64s
    shard_tensor: Int64s
    shard_role: NDArray[np.uint8]
    shard_mesh: Int64s
    shard_offset: Int64s
    shard_size: Int64s
    shard_digest: NDArray[np.uint64]
    tied: Int64s
    object_keys: list[str]
    object_role: NDArray[np.uint8]
    object_digest: NDArray[np.uint64]
    object_bytes: Int64s

    @property
    def tensor_ndim(self) -> Int64s:
        """[tensors] number of dimensions."""
        return np.diff(self.dims_ends)

    def encode(self) -> Parts:
        """The description as a message: a part for each column, so that columns that are equal on many ranks travel once."""
        texts = [part for name in _TEXTS for part in pack_texts(getattr(self, name))]
        return (*texts, *(pack_column(getattr(self, name)) for name in _COLUMNS))


Parts = tuple[bytes, ...]
_TEXTS = ("keys", "object_keys")
_COLUMNS: dict[str, tuple[type[np.generic], int]] = {
    "dtype": (np.uint8, 1),
    "dims_ends": (np.int64, 1),
    "dims": (np.int64, 1),
    "shard_tensor": (np.int64, 1),
    "shard_role": (np.uint8, 1),
    "shard_mesh": (np.int64, 1),
    "shard_offset": (np.int64, 1),
    "shard_size": (np.int64, 1),
    "shard_digest": (np.uint64, 2),
    "tied": (np.int64, 1),
    "object_role": (np.uint8, 1),
    "object_digest": (np.uint64, 2),
    "object_bytes": (np.int64, 1),
}
OBJECT_COLUMNS = tuple(name for name in (*_TEXTS, *_COLUMNS) if name.startswith("object_"))
TENSOR_COLUMNS = tuple(name for name in (*_TEXTS, *_COLUMNS) if not name.startswith("object_"))
_VALUES = ("shard_digest", "object_digest", "object_bytes")
# Positions of the parts of an encoded description that say what there is, not what values it has.
STRUCTURE_PARTS = (
    *range(2 * len(_TEXTS)),
    *(2 * len(_TEXTS) + row for row, name in enumerate(_COLUMNS) if name not in _VALUES),
)


def decode_descriptions(reports: Sequence[Parts]) -> list[Description]:
    """Inverse of `Description.encode`, for many ranks.

    Parts that are one object are decoded once: ranks that say the same of a column share it, and ranks that say the same
    of everything share the whole `Description`.

    Raises:
        PeerFailureError: a report cannot be read; names the rank.
    """
    columns: dict[tuple[int, ...], Any] = {}
    whole: dict[tuple[int, ...], Description] = {}
    found = []
    for rank, report in enumerate(reports):
        identity = tuple(map(id, report))
        if identity not in whole:
            try:
                whole[identity] = _decode(report, columns)
            except PeerFailureError as error:
                error.rank = rank
                raise
        found.append(whole[identity])
    return found


def _decode(report: Parts, columns: dict[tuple[int, ...], Any]) -> Description:
    texts = 2 * len(_TEXTS)
    if len(report) != texts + len(_COLUMNS):
        raise PeerFailureError(f"a rank sent a description of {len(report)} parts, expected {texts + len(_COLUMNS)}")

    def kept(decode: Callable[..., Any], parts: Parts, *arguments: Any) -> Any:
        # The kind of column belongs to the identity: two that are empty may be one part.
        identity = (*map(id, parts), *map(id, arguments))
        if identity not in columns:
            columns[identity] = decode(*parts, *arguments)
        return columns[identity]

    values = {name: kept(unpack_texts, report[2 * row : 2 * row + 2]) for row, name in enumerate(_TEXTS)}
    for row, (name, (dtype, width)) in enumerate(_COLUMNS.items()):
        values[name] = kept(unpack_column, report[texts + row : texts + row + 1], dtype, width)
    return Description(**values)
