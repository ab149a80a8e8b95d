"""The index: where every chunk of every tensor lies, and the checksum of every block, as columns.

A safetensors file of one-dimensional integer arrays. Its leading part, the head, holds the header and the
checksums of the blocks of the rest, so that a reader who trusts the head (whose digest is in the commit
record) can check any part of the rest alone: finding one key among a million reads a few blocks. Not here:
files and stores (`reading.index_reader`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import CorruptionError
from giantstep.format.container import DATA_ALIGNMENT, Entry, PlacedEntry, lay_out, parse_header
from giantstep.format.digests import Checksums, anchor_digest, block_checksums
from giantstep.format.versions import PLAIN, WITH_DIGESTS, check_version
from giantstep.shards.dtypes import ITEM_BYTES
from giantstep.shards.partition import axes_of, partitioned, products
from giantstep.shards.region import MAX_DIMS, MAX_ELEMENTS, Int64s

REST_CHECKSUMS = "rest_checksums"
HEAD_FILLER = "head_filler"

# Every column, its container dtype, and what its length must be: a count, or the end stored in another column.
COLUMNS: dict[str, str] = {
    "tensor_key_ends": "I64",
    "tensor_key_bytes": "U8",
    "tensor_dtype": "U8",
    "tensor_dims_ends": "I64",
    "tensor_dims": "I64",
    "tensor_chunk_ends": "I64",
    "chunk_file": "I64",
    "chunk_start": "I64",
    "chunk_bytes": "I64",
    "chunk_coordinate_ends": "I64",
    "chunk_offset": "I64",
    "chunk_size": "I64",
    "object_key_ends": "I64",
    "object_key_bytes": "U8",
    "object_file": "I64",
    "object_start": "I64",
    "object_bytes": "I64",
    "file_block_ends": "I64",
    "block_checksum": "U64",
}
# Columns that an index may have (since version 1.1), their container dtype, and how many words there are per chunk or object.
OPTIONAL_COLUMNS: dict[str, str] = {"chunk_head": "U64", "chunk_digest": "U64", "object_digest": "U64"}
WORDS_PER_ROW = {"chunk_head": 1, "chunk_digest": 2, "object_digest": 2}
NUMPY_DTYPES = {"I64": "<i8", "U64": "<u8", "U8": "|u1"}


@dataclass(frozen=True, slots=True)
class Index:
    """All columns in memory. `*_ends` columns begin with 0 and have one entry more than there are rows.

    Attributes:
        tensor_key_ends, tensor_key_bytes: UTF-8 keys, one after another, sorted by their bytes.
        tensor_dtype: code of the dtype (`shards.dtypes`).
        tensor_dims_ends, tensor_dims: global shapes.
        tensor_chunk_ends: chunks of a tensor are consecutive rows.
        chunk_file: row of the file in the commit record.
        chunk_start, chunk_bytes: where in the file the chunk lies.
        chunk_coordinate_ends: per tensor, where the coordinates of its chunks begin in the next two.
        chunk_offset, chunk_size: region of each chunk, dims values per chunk.
        object_*: objects by key, sorted by their bytes.
        file_block_ends, block_checksum: checksums of the blocks of each file.
        chunk_head: [chunks, 1] digests of the first bytes of long chunks; 0 where none was taken.
        chunk_digest, object_digest: [rows, 2] digests of all bytes of each chunk and object, high words first; zeros where
            none was taken. All three are None if the save was not asked for them.
    """

    tensor_key_ends: Int64s
    tensor_key_bytes: NDArray[np.uint8]
    tensor_dtype: NDArray[np.uint8]
    tensor_dims_ends: Int64s
    tensor_dims: Int64s
    tensor_chunk_ends: Int64s
    chunk_file: Int64s
    chunk_start: Int64s
    chunk_bytes: Int64s
    chunk_coordinate_ends: Int64s
    chunk_offset: Int64s
    chunk_size: Int64s
    object_key_ends: Int64s
    object_key_bytes: NDArray[np.uint8]
    object_file: Int64s
    object_start: Int64s
    object_bytes: Int64s
    file_block_ends: Int64s
    block_checksum: Checksums
    chunk_head: Checksums | None = None
    chunk_digest: Checksums | None = None
    object_digest: Checksums | None = None

    @property
    def version(self) -> str:
        """The format version that has all of it."""
        return PLAIN if all(getattr(self, name) is None for name in OPTIONAL_COLUMNS) else WITH_DIGESTS


def encode_texts(texts: list[bytes]) -> tuple[Int64s, NDArray[np.uint8]]:
    """Ends and bytes of the concatenation."""
    ends = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in texts], out=ends[1:])
    return ends, np.frombuffer(b"".join(texts), dtype=np.uint8)


def decode_texts(ends: Int64s, data: NDArray[np.uint8]) -> list[str]:
    """Inverse of `encode_texts` after UTF-8; raises UnicodeDecodeError on bytes that are not."""
    blob, positions = data.tobytes(), ends.tolist()
    return [blob[start:stop].decode("utf-8") for start, stop in itertools.pairwise(positions)]


@dataclass(frozen=True, slots=True)
class EncodedIndex:
    """The index file's bytes, and what the commit record says of it."""

    data: bytes
    head_bytes: int
    head_digest: str


def encode_index(index: Index, save_id: str, block_bytes: int) -> EncodedIndex:
    """The bytes of the index file."""
    dtypes = COLUMNS | {name: dtype for name, dtype in OPTIONAL_COLUMNS.items() if getattr(index, name) is not None}
    columns = {name: np.ascontiguousarray(getattr(index, name)).reshape(-1) for name in dtypes}
    # Widest items first, so that every column is aligned.
    names = sorted(dtypes, key=lambda name: (dtypes[name] == "U8", list(dtypes).index(name)))
    rest = b"".join(columns[name].astype(NUMPY_DTYPES[dtypes[name]]).tobytes() for name in names)
    checksums = block_checksums(memoryview(rest), block_bytes).astype("<u8").tobytes()
    filler = bytes(-len(checksums) % DATA_ALIGNMENT)
    entries = [
        Entry(REST_CHECKSUMS, "U64", (len(checksums) // 8,), len(checksums)),
        Entry(HEAD_FILLER, "U8", (len(filler),), len(filler)),
        *(Entry(name, dtypes[name], columns[name].shape, columns[name].nbytes) for name in names),
    ]
    metadata = {
        "format": "giantstep",
        "format_version": index.version,
        "save_id": save_id,
        "block_bytes": str(block_bytes),
    }
    header, _ = lay_out(entries, metadata)
    head = header + checksums + filler
    return EncodedIndex(head + rest, len(head), anchor_digest(head))


@dataclass(frozen=True, slots=True)
class IndexHead:
    """The checked head of an index file.

    Attributes:
        columns: where each column lies in the file, optional ones only if they are there.
        rest_checksums: checksums of the blocks of the file behind the head.
    """

    columns: dict[str, PlacedEntry]
    rest_checksums: Checksums


def decode_head(head: bytes, digest: str, save_id: str, file_bytes: int, block_bytes: int, what: str) -> IndexHead:
    """Check and read the head of an index; `what` names the file in errors.

    Raises:
        CorruptionError: the digest does not fit, the index is another save's, or a column is malformed.
        VersionError: intact, but of a newer major version.
    """
    if anchor_digest(head) != digest:
        raise CorruptionError(
            f"index {what} is damaged: the digest of its first {len(head)} bytes does not fit the commit record's. "
            "Restore the file from a copy, or load another step."
        )
    entries, metadata, _ = parse_header(head, file_bytes, what)
    check_version(metadata.get("format_version"), f"index {what}")
    if metadata.get("save_id") != save_id:
        raise CorruptionError(f"index {what} belongs to save {metadata.get('save_id')!r}, the commit record to {save_id!r}")
    dtypes = COLUMNS | {name: dtype for name, dtype in OPTIONAL_COLUMNS.items() if name in entries}
    columns = {name: _check_column(entries.get(name), name, dtype, what) for name, dtype in dtypes.items()}
    table = _check_column(entries.get(REST_CHECKSUMS), REST_CHECKSUMS, "U64", what)
    blocks = -(-(file_bytes - len(head)) // block_bytes)
    if table.stop > len(head) or table.shape[0] != blocks or min(c.start for c in columns.values()) < len(head):
        raise CorruptionError(f"index {what}: its {table.shape[0]} block checksums are not those of {blocks} blocks")
    checksums = np.frombuffer(head[table.start : table.stop], dtype="<u8").astype(np.uint64)
    return IndexHead(columns, checksums)


def _check_column(entry: PlacedEntry | None, name: str, dtype: str, what: str) -> PlacedEntry:
    if entry is None or entry.dtype != dtype or len(entry.shape) != 1:
        raise CorruptionError(f"index {what}: column {name!r} is {entry}, expected a one-dimensional {dtype} array")
    if entry.shape[0] * np.dtype(NUMPY_DTYPES[dtype]).itemsize != entry.stop - entry.start:
        raise CorruptionError(f"index {what}: column {name!r} has {entry.shape[0]} rows in {entry.stop - entry.start} bytes")
    return entry


def check_index(index: Index, files: int, file_bytes: Int64s, block_bytes: int, what: str) -> None:
    """Raise `CorruptionError` unless the columns fit each other and the files.

    Checksums show that bytes are those written; this shows that following them cannot lead astray, whoever
    wrote them: every row range, shape, region and byte range is inside what it refers to.
    """

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise CorruptionError(f"index {what}: {problem}")

    def require_ends(name: str, rows: int | None, last: int) -> None:
        ends = getattr(index, name)
        fits = len(ends) > 0 and ends[0] == 0 and ends[-1] == last and bool((np.diff(ends) >= 0).all())
        require(fits and (rows is None or len(ends) == rows + 1), f"column {name!r} does not partition {last} values")

    tensors, chunks, objects = len(index.tensor_dtype), len(index.chunk_file), len(index.object_file)
    require_ends("tensor_key_ends", tensors, len(index.tensor_key_bytes))
    require_ends("tensor_dims_ends", tensors, len(index.tensor_dims))
    require_ends("tensor_chunk_ends", tensors, chunks)
    require_ends("chunk_coordinate_ends", tensors, len(index.chunk_offset))
    require_ends("object_key_ends", objects, len(index.object_key_bytes))
    require_ends("file_block_ends", files, len(index.block_checksum))
    require(len(index.chunk_size) == len(index.chunk_offset), "chunk offsets and sizes differ in number")
    blocks = -(-file_bytes // block_bytes)
    require(bool((np.diff(index.file_block_ends) == blocks).all()), "block checksums do not fit the files' sizes")
    for rows, prefix in ((chunks, "chunk"), (objects, "object")):
        for name in OPTIONAL_COLUMNS:
            column = getattr(index, name) if name.startswith(prefix) else None
            fits = column is None or column.shape == (rows, WORDS_PER_ROW[name])
            require(fits, f"column {name!r} does not have one row for each {prefix}")
        file, start, size = (getattr(index, f"{prefix}_{part}") for part in ("file", "start", "bytes"))
        require(len(start) == rows and len(size) == rows, f"{prefix} columns differ in length")
        require(bool(((file >= 0) & (file < files)).all()), f"a {prefix} lies in a file that is not listed")
        if rows:
            inside = (start >= 0) & (size >= 0) & (start <= file_bytes[file] - size)
            require(bool(inside.all()), f"a {prefix} lies outside its file")
    _check_regions(index, require)


def _check_regions(index: Index, require: Callable[[bool, str], None]) -> None:
    item_bytes = np.array(ITEM_BYTES, dtype=np.int64)[index.tensor_dtype]
    require(bool((item_bytes > 0).all()), "a tensor has an unknown dtype")
    require(bool((index.tensor_dims >= 0).all()), "a tensor has a negative dimension")
    dims = np.diff(index.tensor_dims_ends)
    require(bool((dims <= MAX_DIMS).all()), f"a tensor has more than {MAX_DIMS} dimensions")
    # Products in float64 first: they tell what is too large for int64. They may be infinite. Of empty tensors the other
    # dimensions count, without the size of an element: neither NumPy nor torch has them of any size.
    filled = products(np.minimum(index.tensor_dims, 1), dims)
    with np.errstate(over="ignore"):
        bound = products(np.maximum(index.tensor_dims, 1).astype(np.float64), dims) * np.where(filled, item_bytes, 1)
    require(bool((bound <= MAX_ELEMENTS).all()), "a tensor has more elements than any can")
    per_tensor = np.diff(index.tensor_chunk_ends)
    fits = (np.diff(index.chunk_coordinate_ends) == per_tensor * dims).all()
    require(bool(fits), "chunk coordinates do not fit the tensors' dimensions")
    # Dimension size that each coordinate must stay within: the tensor's dims repeated for each chunk.
    within = axes_of(np.repeat(dims, per_tensor))
    limit = index.tensor_dims[np.repeat(index.tensor_dims_ends[:-1], per_tensor * dims) + within]
    inside = (index.chunk_offset >= 0) & (index.chunk_size > 0) & (index.chunk_offset <= limit - index.chunk_size)
    require(bool(inside.all()), "a chunk lies outside its tensor")
    expected = products(index.chunk_size, np.repeat(dims, per_tensor)) * np.repeat(item_bytes, per_tensor)
    require(bool((expected == index.chunk_bytes).all()), "a chunk's length does not fit its region")
    stored = np.zeros(len(dims), dtype=np.int64)
    np.add.at(stored, np.repeat(np.arange(len(dims)), per_tensor), index.chunk_bytes)
    whole = products(index.tensor_dims, dims) * item_bytes
    require(bool((stored == whole).all()), "the chunks of a tensor do not add up to its size")
    exact = partitioned(per_tensor, dims, index.tensor_dims, index.chunk_offset, index.chunk_size)
    require(bool(exact.all()), "the chunks of a tensor overlap")
    _check_places(index, require)
    _check_ties(index, require)


def stored_chunks(index: Index) -> Int64s:
    """One row for each place in the files: chunks that tied tensors share count once."""
    order, shared = _by_place(index)
    rows: Int64s = order[np.concatenate((np.ones(min(1, len(order)), dtype=bool), ~shared))]
    return rows


def _by_place(index: Index) -> tuple[Int64s, NDArray[np.bool_]]:
    """Chunks in the order of their places, and for all but the first whether the place is that of the one before."""
    columns = (index.chunk_file, index.chunk_start, index.chunk_bytes)
    order = np.lexsort(columns[::-1])
    shared = np.ones(max(0, len(order) - 1), dtype=bool)
    for column in columns:
        placed = column[order]
        shared &= placed[1:] == placed[:-1]
    return order, shared


def _check_places(index: Index, require: Callable[[bool, str], None]) -> None:
    """No byte of a file belongs to two entries, other than whole chunks that (tied) tensors share."""
    order, shared = _by_place(index)
    tensor = np.repeat(np.arange(len(index.tensor_dtype)), np.diff(index.tensor_chunk_ends))[order]
    # The order is stable, so that chunks of one tensor at one place would be neighbours.
    require(not (shared & (tensor[1:] == tensor[:-1])).any(), "two chunks of one tensor share bytes of a file")
    chunks = stored_chunks(index)
    file = np.concatenate((index.chunk_file[chunks], index.object_file))
    start = np.concatenate((index.chunk_start[chunks], index.object_start))
    size = np.concatenate((index.chunk_bytes[chunks], index.object_bytes))
    order = np.lexsort((start, file))
    file, start, size = file[order], start[order], size[order]
    overlaps = (file[1:] == file[:-1]) & (start[1:] < start[:-1] + size[:-1])
    require(not overlaps.any(), "two entries share bytes of a file")


def _check_ties(index: Index, require: Callable[[bool, str], None]) -> None:
    """Tensors whose first chunks lie at one place are tied: the same in all but their keys. Loaders give them one memory."""
    filled = np.flatnonzero(np.diff(index.tensor_chunk_ends))
    first = index.tensor_chunk_ends[filled]
    file, start = index.chunk_file[first], index.chunk_start[first]
    order = np.lexsort((filled, start, file))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(file[order]) != 0) | (np.diff(start[order]) != 0)
    home = filled[order[np.flatnonzero(new)]][np.cumsum(new) - 1]
    copy, home = filled[order[~new]], home[~new]
    same = bool((index.tensor_dtype[copy] == index.tensor_dtype[home]).all())
    for ends, columns in (
        (index.tensor_dims_ends, (index.tensor_dims,)),
        (index.tensor_chunk_ends, (index.chunk_file, index.chunk_start)),
        (index.chunk_coordinate_ends, (index.chunk_offset, index.chunk_size)),
    ):
        counts = np.diff(ends)[copy]
        same = same and bool((counts == np.diff(ends)[home]).all())
        if same:
            within = axes_of(counts)
            ours, theirs = np.repeat(ends[copy], counts) + within, np.repeat(ends[home], counts) + within
            same = all(bool((column[ours] == column[theirs]).all()) for column in columns)
    require(same, "two tensors share their first chunk and are not the same")
