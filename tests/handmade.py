"""Indexes and checkpoints made by hand, for what a save would not make so."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import giantstep as gs
from giantstep.codecs import OBJECT_CODEC
from giantstep.commit.publish import publish
from giantstep.format.data_file import object_entry
from giantstep.format.index import Index, encode_texts
from giantstep.format.record import FileEntry
from giantstep.shards.dtypes import BY_TORCH_NAME
from giantstep.storage.base import Store
from giantstep.writing.write import Source, write

U8 = BY_TORCH_NAME["uint8"].code


def index_of(chunks: dict[str, list[tuple[int, int, int]]], objects: dict[str, tuple[int, int, int]], files: int) -> Index:
    """An index of 1-d uint8 tensors, each of chunks (file, first byte, length); one block per file."""
    key_ends, key_bytes = encode_texts([key.encode() for key in chunks])
    object_ends, object_bytes = encode_texts([key.encode() for key in objects])
    flat = [chunk for parts in chunks.values() for chunk in parts]
    ends = np.cumsum([0, *(len(parts) for parts in chunks.values())])
    offsets = [sum(length for _, _, length in parts[:n]) for parts in chunks.values() for n in range(len(parts))]
    columns = np.array(flat, dtype=np.int64).reshape(len(flat), 3)
    placed = np.array(list(objects.values()), dtype=np.int64).reshape(len(objects), 3)
    return Index(
        tensor_key_ends=key_ends,
        tensor_key_bytes=key_bytes,
        tensor_dtype=np.full(len(chunks), U8, dtype=np.uint8),
        tensor_dims_ends=np.arange(len(chunks) + 1),
        tensor_dims=np.array([sum(length for _, _, length in parts) for parts in chunks.values()], dtype=np.int64),
        tensor_chunk_ends=ends,
        chunk_file=columns[:, 0],
        chunk_start=columns[:, 1],
        chunk_bytes=columns[:, 2],
        chunk_coordinate_ends=ends,
        chunk_offset=np.array(offsets, dtype=np.int64),
        chunk_size=columns[:, 2],
        object_key_ends=object_ends,
        object_key_bytes=object_bytes,
        object_file=placed[:, 0],
        object_start=placed[:, 1],
        object_bytes=placed[:, 2],
        file_block_ends=np.arange(files + 1),
        block_checksum=np.arange(files, dtype=np.uint64),
    )


def save_objects(store: Store, values: dict[str, Any]) -> None:
    """A checkpoint of objects alone, all in one data file."""
    store.prepare("data")
    encoded = {key: OBJECT_CODEC.encode(value) for key, value in sorted(values.items())}

    def source(key: str, data: bytes) -> Source:
        return Source(object_entry(key, len(data)), 1, lambda: [np.frombuffer(data, dtype=np.uint8)])

    save_id = "20200101T000000-0123456789abcdef"
    written = write(store, save_id, 0, [source(key, data) for key, data in encoded.items()], gs.SaveOptions(block_bytes=4096))
    (file,) = written.files
    placed = {key: (0, written.start[n], len(data)) for n, (key, data) in enumerate(encoded.items())}
    index = dataclasses.replace(
        index_of({}, placed, 1), block_checksum=file.checksums, file_block_ends=np.array([0, len(file.checksums)])
    )
    entry = FileEntry(file.name, file.bytes, 0)
    publish(store, save_id, index, (entry,), world_size=1, block_bytes=4096, content_metadata=None, before=None)
