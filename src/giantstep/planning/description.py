"""What one rank tells the planner of its shards: compact columns, and their form on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from giantstep.errors import PeerFailureError
from giantstep.format.index import decode_texts, encode_texts
from giantstep.shards.region import Int64s

MAIN, COPY, IMPLICIT = 0, 1, 2
"""Roles of a shard: declared main replica, declared further replica, or one of equals of which any may be main."""

Columns = Mapping[str, NDArray[np.generic]]


def pack_columns(columns: Columns) -> bytes:
    """Arrays as bytes."""
    return safetensors_numpy.save({name: np.ascontiguousarray(column) for name, column in columns.items()})


def unpack_columns(data: bytes) -> dict[str, NDArray[np.generic]]:
    """Inverse of `pack_columns`."""
    try:
        return safetensors_numpy.load(data)
    except SafetensorError as error:
        raise PeerFailureError(f"a rank sent columns that cannot be read: {error}") from error


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
        common_digest: [2] digest of the encoded common state.
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
    common_digest: NDArray[np.uint64]

    @property
    def tensor_ndim(self) -> Int64s:
        """[tensors] number of dimensions."""
        return np.diff(self.dims_ends)

    def encode(self) -> bytes:
        """The description as bytes."""
        key_ends, key_bytes = encode_texts([key.encode("utf-8") for key in self.keys])
        columns: dict[str, NDArray[np.generic]] = {"key_ends": key_ends, "key_bytes": key_bytes}
        columns |= {name: getattr(self, name) for name in _COLUMNS}
        return pack_columns(columns)

    @classmethod
    def decode(cls, data: bytes) -> Description:
        """Inverse of `encode`."""
        columns = unpack_columns(data)
        keys = decode_texts(columns["key_ends"].astype(np.int64), columns["key_bytes"].astype(np.uint8))
        return cls(keys, **{name: columns[name] for name in _COLUMNS})  # type: ignore[arg-type]


_COLUMNS = tuple(name for name in Description.__dataclass_fields__ if name != "keys")
