"""What one rank tells the planner of its shards: compact columns, and their form on the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def pack_texts(name: str, texts: Sequence[str]) -> dict[str, NDArray[np.generic]]:
    """Texts as two columns."""
    ends, data = encode_texts([text.encode("utf-8") for text in texts])
    return {f"{name}_ends": ends, f"{name}_bytes": data}


def unpack_texts(name: str, columns: Columns) -> list[str]:
    """Inverse of `pack_texts`."""
    return decode_texts(columns[f"{name}_ends"].astype(np.int64), columns[f"{name}_bytes"].astype(np.uint8))


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

    @property
    def tensor_ndim(self) -> Int64s:
        """[tensors] number of dimensions."""
        return np.diff(self.dims_ends)

    def encode(self) -> bytes:
        """The description as bytes."""
        columns: dict[str, NDArray[np.generic]] = {name: getattr(self, name) for name in _COLUMNS}
        for name in _TEXTS:
            columns |= pack_texts(name, getattr(self, name))
        return pack_columns(columns)

    @classmethod
    def decode(cls, data: bytes) -> Description:
        """Inverse of `encode`."""
        columns = unpack_columns(data)
        texts = {name: unpack_texts(name, columns) for name in _TEXTS}
        return cls(**texts, **{name: columns[name] for name in _COLUMNS})  # type: ignore[arg-type]


_TEXTS = ("keys", "object_keys")
_COLUMNS = tuple(name for name in Description.__dataclass_fields__ if name not in _TEXTS)
