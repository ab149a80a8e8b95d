"""A checkpoint in pieces that can be changed one by one, and then sealed: all sizes, digests and checksums fit again.

Sealing is what makes the fuzzing reach past the checksums, to the checks behind them. Written from docs/format.md
alone. Called by `seeds` and `mutations`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import xxhash

from .json_tree import Node, Object, dump, plain

SAVE_ID = "20260101T000000-0123456789abcdef"
RECORD = "checkpoint.json"
INDEX = f"{SAVE_ID}.index.safetensors"
ALIGNMENT = 4096
_MASK = (1 << 64) - 1

Columns = dict[str, list[int]]
"""Columns of the index by name; values are stored modulo their size."""

BYTE_COLUMNS = ("tensor_key_bytes", "tensor_dtype", "object_key_bytes")


@dataclass
class Chunk:
    """A row of the chunk columns."""

    file: int
    start: int
    bytes: int
    offset: list[int]
    size: list[int]


@dataclass
class Tensor:
    """A row of the tensor columns, with its chunks."""

    key: bytes
    dtype: int
    shape: list[int]
    chunks: list[Chunk]


@dataclass
class StoredObject:
    """A row of the object columns."""

    key: bytes
    file: int
    start: int
    bytes: int


def _keep(_value: object) -> None:
    """Change nothing."""


@dataclass
class Edits:
    """What to change while sealing, after the step before and before the step after: everything behind is made to fit.

    Attributes:
        columns: the index's columns, before they are encoded.
        header: entries of the index's header, before its digest is taken.
        record: one-element list with the record's tree, before its digest is taken.
        record_text: the record's text, before its digest is taken.
    """

    columns: Callable[[Columns], None] = _keep
    header: Callable[[list[Node]], None] = _keep
    record: Callable[[list[Node]], None] = _keep
    record_text: Callable[[bytes], bytes] = field(default=lambda text: text)


@dataclass
class Draft:
    """What a checkpoint holds."""

    files: list[bytearray]
    tensors: list[Tensor]
    objects: list[StoredObject]
    block_bytes: int = 512
    content_metadata: Node = None

    def add_bytes(self, file: int, data: bytes) -> int:
        """Append to a data file; returns where the bytes begin."""
        self.files[file] += data
        return len(self.files[file]) - len(data)

    def columns(self) -> Columns:
        """The columns that say this."""
        found: Columns = {
            "tensor_key_ends": _ends(len(row.key) for row in self.tensors),
            "tensor_dims_ends": _ends(len(row.shape) for row in self.tensors),
            "tensor_dims": [size for row in self.tensors for size in row.shape],
            "tensor_chunk_ends": _ends(len(row.chunks) for row in self.tensors),
            "chunk_coordinate_ends": _ends(sum(len(chunk.offset) for chunk in row.chunks) for row in self.tensors),
            "object_key_ends": _ends(len(row.key) for row in self.objects),
            "file_block_ends": _ends(-(-len(data) // self.block_bytes) for data in self.files),
            "block_checksum": [sum_ for data in self.files for sum_ in _checksums(data, self.block_bytes)],
            "tensor_key_bytes": list(b"".join(row.key for row in self.tensors)),
            "tensor_dtype": [row.dtype for row in self.tensors],
            "object_key_bytes": list(b"".join(row.key for row in self.objects)),
        }
        chunks = [chunk for row in self.tensors for chunk in row.chunks]
        for part in ("file", "start", "bytes"):
            found[f"chunk_{part}"] = [getattr(chunk, part) for chunk in chunks]
            found[f"object_{part}"] = [getattr(row, part) for row in self.objects]
        for part in ("offset", "size"):
            found[f"chunk_{part}"] = [value for chunk in chunks for value in getattr(chunk, part)]
        return found


def _ends(counts: Iterable[int]) -> list[int]:
    return list(itertools.accumulate(counts, initial=0))


def _checksums(data: bytes | bytearray, block_bytes: int) -> list[int]:
    return [xxhash.xxh3_64_intdigest(data[at : at + block_bytes]) for at in range(0, len(data), block_bytes)]


def container_header(entries: list[tuple[str, str, list[int], int]], metadata: dict[str, str]) -> list[Node]:
    """One-element list with the header's tree, for entries (name, dtype, shape, bytes) that lie without gaps."""
    fields, position = Object([["__metadata__", plain(metadata)]]), 0
    for name, dtype, shape, size in entries:
        place = plain({"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]})
        fields.append([name, place])
        position += size
    return [fields]


def encode_header(tree: Node) -> bytes:
    """Length and text, padded so that the data begin at a multiple of 4096."""
    text = dump(tree)
    size = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    return size.to_bytes(8, "little") + text.ljust(size)


def _encode_index(columns: Columns, block_bytes: int, edits: Edits) -> tuple[bytes, int]:
    """The index file, and the length of its head."""
    order = sorted(columns, key=lambda name: name in BYTE_COLUMNS)
    encoded = [
        bytes(value & 255 for value in columns[name])
        if name in BYTE_COLUMNS
        else b"".join((value & _MASK).to_bytes(8, "little") for value in columns[name])
        for name in order
    ]
    rest = b"".join(encoded)
    sums = b"".join(value.to_bytes(8, "little") for value in _checksums(rest, max(1, block_bytes)))
    filler = bytes(-len(sums) % ALIGNMENT)
    kinds = {name: "U8" if name in BYTE_COLUMNS else "U64" if name == "block_checksum" else "I64" for name in columns}
    tree = container_header(
        [
            ("rest_checksums", "U64", [len(sums) // 8], len(sums)),
            ("head_filler", "U8", [len(filler)], len(filler)),
            *((name, kinds[name], [len(columns[name])], len(data)) for name, data in zip(order, encoded, strict=True)),
        ],
        {"format": "giantstep", "format_version": "1.0", "save_id": SAVE_ID, "block_bytes": str(block_bytes)},
    )
    edits.header(tree)
    head = encode_header(tree[0]) + sums + filler
    return head + rest, len(head)


def file_name(number: int) -> str:
    """Name of the data file in row `number` of the record."""
    return f"data/{SAVE_ID}-r{number:05d}-0.safetensors"


def sign(text: bytes) -> bytes:
    """The record's text with the digest line behind it."""
    signed = text.removesuffix(b"\n}") + b",\n"
    return signed + b'  "digest": "sha256:' + hashlib.sha256(signed).hexdigest().encode() + b'"\n}\n'


def seal(draft: Draft, edits: Edits | None = None) -> dict[str, bytes]:
    """The files of the checkpoint, whose sizes, checksums and digests fit whatever `edits` changed before each was taken."""
    edits = edits or Edits()
    columns = draft.columns()
    edits.columns(columns)
    index, head_bytes = _encode_index(columns, draft.block_bytes, edits)
    chunks = [chunk for row in draft.tensors for chunk in row.chunks]
    # What tied tensors share counts once.
    places = {(chunk.file, chunk.start, chunk.bytes) for chunk in chunks}
    payload = sum(size for *_, size in places) + sum(row.bytes for row in draft.objects)
    counts = {"tensors": len(draft.tensors), "chunks": len(chunks), "objects": len(draft.objects), "bytes": payload}
    digest = "sha256:" + hashlib.sha256(index[:head_bytes]).hexdigest()
    tree = plain(
        {
            "format": "giantstep",
            "format_version": "1.0",
            "save_id": SAVE_ID,
            "library": "giantstep 0",
            "created": "2026-01-01T00:00:00+00:00",
            "world_size": len(draft.files),
            "block_bytes": draft.block_bytes,
            "totals": counts,
            "index": {"name": INDEX, "bytes": len(index), "head_bytes": head_bytes, "head_digest": digest},
            "content_metadata": None,
            "files": [{"name": file_name(row), "bytes": len(data), "rank": row} for row, data in enumerate(draft.files)],
        }
    )
    tree.put("content_metadata", draft.content_metadata)
    record = [tree]
    edits.record(record)
    text = edits.record_text(dump(record[0], "  "))
    return {
        RECORD: sign(text),
        INDEX: index,
        **{file_name(row): bytes(data) for row, data in enumerate(draft.files)},
    }
