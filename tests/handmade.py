"""Indexes and checkpoints made by hand, for what a save would not make so."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import giantstep as gs
from giantstep.codecs import OBJECT_CODEC
from giantstep.commit.publish import publish
from giantstep.format.container import Entry
from giantstep.format.data_file import chunk_entry, file_metadata, object_entry, plan_data_files
from giantstep.format.index import Index, encode_texts
from giantstep.format.record import FileEntry
from giantstep.options import Threads
from giantstep.shards.dtypes import BY_TORCH_NAME
from giantstep.shards.region import Region
from giantstep.storage.base import Store
from giantstep.writing.write import Sources, WrittenFile, write

SAVE_ID = "20200101T000000-0123456789abcdef"
BLOCK_BYTES = 4096
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
    encoded = {key: OBJECT_CODEC.encode(value) for key, value in sorted(values.items())}
    file, places = _written(store, [(object_entry(key, len(data)), data) for key, data in encoded.items()])
    placed = {key: (0, place, len(data)) for place, (key, data) in zip(places, encoded.items(), strict=True)}
    _published(store, index_of({}, placed, 1), file)


def save_tied(store: Store, values: dict[str, bytes]) -> None:
    """A checkpoint of 1-d uint8 tensors in one data file, in which equal ones share their bytes."""
    owners = {data: key for key, data in sorted(values.items(), reverse=True)}
    entries = [(chunk_entry(key, BY_TORCH_NAME["uint8"], Region.whole((len(data),))), data) for data, key in owners.items()]
    file, places = _written(store, entries)
    place_of = dict(zip(owners, places, strict=True))
    _published(store, index_of({key: [(0, place_of[data], len(data))] for key, data in sorted(values.items())}, {}, 1), file)


def save_misaligned(store: Store, key: str, data: bytes, dtype: str, length: int) -> None:
    """A checkpoint of one 1-d tensor, whose elements begin two bytes later than any writer would have them begin."""
    entry = chunk_entry(key, BY_TORCH_NAME["uint8"], Region.whole((len(data) + 2,)))
    file, (place,) = _written(store, [(entry, b"??" + data)])
    index = index_of({key: [(0, place + 2, len(data))]}, {}, 1)
    dims = np.array([length], dtype=np.int64)
    code = np.array([BY_TORCH_NAME[dtype].code], dtype=np.uint8)
    _published(store, dataclasses.replace(index, tensor_dtype=code, tensor_dims=dims, chunk_size=dims), file)


def _written(store: Store, entries: list[tuple[Entry, bytes]]) -> tuple[WrittenFile, list[int]]:
    """The one data file that holds the entries, and the first byte of each."""
    store.prepare("data")

    sizes = np.array([entry.bytes for entry, _ in entries], dtype=np.int64)
    sources = Sources(sizes, np.zeros_like(sizes), None, lambda row: [np.frombuffer(entries[row][1], dtype=np.uint8)])
    options = gs.SaveOptions(block_bytes=BLOCK_BYTES)
    metadata = file_metadata(SAVE_ID, 0)
    plans = plan_data_files([entry for entry, _ in entries], [1] * len(entries), options.max_file_bytes, metadata)
    written = write(store, SAVE_ID, 0, plans, sources, options, Threads(1, 1))
    (file,) = written.files
    return file, written.start.tolist()


def _published(store: Store, index: Index, file: WrittenFile) -> None:
    index = dataclasses.replace(index, block_checksum=file.checksums, file_block_ends=np.array([0, len(file.checksums)]))
    files = (FileEntry(file.name, file.bytes, 0),)
    publish(store, SAVE_ID, index, files, world_size=1, block_bytes=BLOCK_BYTES, content_metadata=None, before=None)
