"""The index of a checkpoint, read block by block as it is needed, each block verified."""

from __future__ import annotations

import itertools
import math
import operator
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from giantstep.errors import CorruptionError, IncompleteError
from giantstep.format.index import COLUMNS, NUMPY_DTYPES, OPTIONAL_COLUMNS, WORDS_PER_ROW, Index, check_index, decode_head
from giantstep.format.record import CommitRecord
from giantstep.shards.dtypes import BY_CODE, DType
from giantstep.shards.partition import partitioned
from giantstep.shards.region import MAX_DIMS, MAX_ELEMENTS, Region
from giantstep.storage.base import NotAFileError, Store, reading

# A search for one key costs about as much as this many rows of a table of all.
_SEARCH_STEPS = 100
_DTYPES = COLUMNS | OPTIONAL_COLUMNS


@dataclass(frozen=True, slots=True)
class Chunk:
    """A region as stored: which file (row in the commit record), first byte, length."""

    region: Region
    file: int
    start: int
    bytes: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What the index says of one global tensor."""

    key: str
    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def bytes(self) -> int:
        """Size of the global tensor."""
        return Region.whole(self.shape).elements * self.dtype.item_bytes


class IndexReader:
    """Random access to the index of one committed checkpoint. Thread-safe.

    Memory is reserved for the whole index, but only blocks that were touched are read and take room.

    Args:
        store, record: the checkpoint.
        image: the index file, if another rank has read it; it is verified all the same, and not changed.

    Raises (all methods):
        IncompleteError: the index file is missing.
        CorruptionError: its bytes are not those that were written.
        OSError: reading failed.
    """

    def __init__(self, store: Store, record: CommitRecord, image: bytes | None = None) -> None:
        self._store = store
        self._record = record
        self._what = f"{store.location}/{record.index.name}"
        self._lock = threading.Lock()
        entry = record.index
        # Invariant: not a byte is reserved for an index that is not there in full.
        self._check_size(store if image is None else len(image))
        self._data = np.empty(entry.bytes, dtype=np.uint8) if image is None else np.frombuffer(image, dtype=np.uint8)
        self._filled = image is not None
        self._read(0, entry.head_bytes)
        self._head = decode_head(
            self._data[: entry.head_bytes].tobytes(),
            entry.head_digest,
            record.save_id,
            entry.bytes,
            record.block_bytes,
            self._what,
        )
        self._verified = np.zeros(len(self._head.rest_checksums), dtype=bool)

    def _check_size(self, where: Store | int) -> None:
        try:
            found = where if isinstance(where, int) else where.size(self._record.index.name)
        except FileNotFoundError as error:
            raise self._missing() from error
        except NotAFileError as error:
            raise CorruptionError(
                f"index {self._what} is {error.strerror}. Restore it from a copy, or load another step."
            ) from error
        if found != self._record.index.bytes:
            raise CorruptionError(f"index {self._what} has {found} bytes, expected {self._record.index.bytes}")

    def _missing(self) -> IncompleteError:
        return IncompleteError(f"index {self._what} is missing. Restore it from a copy, or load another step.")

    def _read(self, start: int, stop: int) -> None:
        if self._filled:
            return
        try:
            with reading(self._store, self._record.index.name) as handle:
                handle.read_into(start, self._data[start:stop].data)
        except FileNotFoundError as error:
            raise self._missing() from error

    def _bytes(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Verified bytes [start, stop) of the file."""
        if start < stop:
            self._verify(start, stop)
        return self._data[start:stop]

    def _verify(self, start: int, stop: int) -> None:
        size, head = self._record.block_bytes, self._record.index.head_bytes
        first, last = (start - head) // size, (stop - 1 - head) // size
        with self._lock:
            wanted = np.flatnonzero(~self._verified[first : last + 1]) + first
            for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1):
                if not len(run):
                    continue
                low = head + int(run[0]) * size
                high = min(head + (int(run[-1]) + 1) * size, len(self._data))
                self._read(low, high)
                for block in run.tolist():
                    begin = head + block * size
                    found = xxhash.xxh3_64_intdigest(self._data[begin : min(begin + size, high)].data)
                    if found != int(self._head.rest_checksums[block]):
                        raise CorruptionError(
                            f"index {self._what} is damaged in bytes {begin} to {min(begin + size, high)}. "
                            "Restore the file from a copy, or load another step."
                        )
                self._verified[run] = True

    def _column(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.generic]:
        """Values [start, stop) of a column."""
        placed = self._head.columns[name]
        dtype = np.dtype(NUMPY_DTYPES[_DTYPES[name]])
        stop = placed.shape[0] if stop is None else stop
        if not 0 <= start <= stop <= placed.shape[0]:
            raise CorruptionError(f"index {self._what}: rows {start} to {stop} of column {name!r} with {placed.shape[0]} rows")
        data = self._bytes(placed.start + start * dtype.itemsize, placed.start + stop * dtype.itemsize)
        return np.frombuffer(data.tobytes() if (placed.start % dtype.itemsize) else data, dtype=dtype)

    def _ints(self, name: str, start: int = 0, stop: int | None = None) -> list[int]:
        found: list[int] = self._column(name, start, stop).tolist()
        return found

    @property
    def tensor_count(self) -> int:
        """Number of tensors."""
        return self._head.columns["tensor_dtype"].shape[0]

    @property
    def object_count(self) -> int:
        """Number of objects."""
        return self._head.columns["object_file"].shape[0]

    def _key_bytes(self, kind: str, row: int) -> bytes:
        start, stop = self._ints(f"{kind}_key_ends", row, row + 2)
        return self._column(f"{kind}_key_bytes", start, stop).tobytes()

    def _find(self, kind: str, count: int, key: str) -> int | None:
        wanted = key.encode("utf-8", "surrogatepass")
        low, high = 0, count
        while low < high:
            middle = (low + high) // 2
            if self._key_bytes(kind, middle) < wanted:
                low = middle + 1
            else:
                high = middle
        return low if low < count and self._key_bytes(kind, low) == wanted else None

    def find_tensor(self, key: str) -> int | None:
        """Row of a tensor by binary search; None if there is none."""
        return self._find("tensor", self.tensor_count, key)

    def _texts(self, kind: str) -> list[str]:
        ends = self._column(f"{kind}_key_ends").astype(np.int64)
        # Invariant: together the keys are no longer than the column, whatever the ends say.
        if not (ends[1:] >= ends[:-1]).all() or (ends[:1] < 0).any():
            raise CorruptionError(f"index {self._what}: column '{kind}_key_ends' decreases")
        blob, cuts = self._column(f"{kind}_key_bytes").tobytes(), ends.tolist()
        if blob.isascii():
            # Every character is a byte: keys are cut out of one text, and are in the order of their bytes.
            text = blob.decode("ascii")
            texts = [text[start:stop] for start, stop in itertools.pairwise(cuts)]
            self._check_ascending(texts, kind)
            return texts
        keys = [blob[start:stop] for start, stop in itertools.pairwise(cuts)]
        self._check_ascending(keys, kind)
        try:
            return [key.decode("utf-8") for key in keys]
        except UnicodeDecodeError as error:
            raise CorruptionError(f"index {self._what}: a key is not UTF-8: {error}") from error

    def _check_ascending(self, keys: list[str] | list[bytes], kind: str) -> None:
        if not all(map(operator.lt, keys, keys[1:])):
            raise CorruptionError(f"index {self._what}: {kind} keys are not sorted or not distinct")

    def tensor_keys(self) -> list[str]:
        """All tensor keys, in the order of their rows."""
        return self._texts("tensor")

    def object_keys(self) -> list[str]:
        """All object keys, in the order of their rows."""
        return self._texts("object")

    def tensor(self, row: int) -> TensorEntry:
        """One tensor with its chunks."""
        key = self._key_bytes("tensor", row).decode("utf-8", "replace")
        dtype = BY_CODE.get(self._ints("tensor_dtype", row, row + 1)[0])
        if dtype is None:
            raise CorruptionError(f"index {self._what}: tensor {key!r} has an unknown dtype")
        dims = self._ints("tensor_dims", *self._ints("tensor_dims_ends", row, row + 2))
        # Of empty tensors the other dimensions count, without the size of an element.
        bound = math.prod(part or 1 for part in dims[:MAX_DIMS]) * (dtype.item_bytes if all(dims) else 1)
        if len(dims) > MAX_DIMS or min(dims, default=0) < 0 or bound > MAX_ELEMENTS:
            raise CorruptionError(f"index {self._what}: tensor {key!r} cannot have shape {dims[:MAX_DIMS]}")
        shape = tuple(dims)
        chunks = self._chunks(row, key, shape, dtype)
        if sum(chunk.bytes for chunk in chunks) != math.prod(shape) * dtype.item_bytes:
            raise CorruptionError(f"index {self._what}: the chunks of tensor {key!r} do not add up to its size")
        self._check_chunks(chunks, shape, key)
        return TensorEntry(key, dtype, shape, chunks)

    def _check_chunks(self, chunks: tuple[Chunk, ...], shape: tuple[int, ...], key: str) -> None:
        """The chunks hold each element once, and no byte of a file is used twice: a tensor is as large as what is stored."""
        places = sorted((chunk.file, chunk.start, chunk.start + chunk.bytes) for chunk in chunks)
        for (file, _, stop), (next_file, start, _) in itertools.pairwise(places):
            if file == next_file and start < stop:
                raise CorruptionError(f"index {self._what}: two chunks of tensor {key!r} share bytes of a file")
        offsets = np.array([part for chunk in chunks for part in chunk.region.offset], dtype=np.int64)
        sizes = np.array([part for chunk in chunks for part in chunk.region.size], dtype=np.int64)
        counts, dims = np.array([len(chunks)]), np.array([len(shape)])
        if not partitioned(counts, dims, np.array(shape, dtype=np.int64), offsets, sizes).all():
            raise CorruptionError(f"index {self._what}: the chunks of tensor {key!r} overlap")

    def _chunks(self, row: int, key: str, shape: tuple[int, ...], dtype: DType) -> tuple[Chunk, ...]:
        first, last = self._ints("tensor_chunk_ends", row, row + 2)
        base = self._ints("chunk_coordinate_ends", row, row + 1)[0]
        dims = len(shape)
        coordinates = (base, base + (last - first) * dims)
        offset, size = self._ints("chunk_offset", *coordinates), self._ints("chunk_size", *coordinates)
        columns = [self._ints(name, first, last) for name in ("chunk_file", "chunk_start", "chunk_bytes")]
        chunks = []
        for position, (file, start, length) in enumerate(zip(*columns, strict=True)):
            low, high = position * dims, (position + 1) * dims
            self._check_extent(file, start, length, key)
            if min(offset[low:high] + size[low:high], default=0) < 0:
                raise CorruptionError(f"index {self._what}: a chunk of tensor {key!r} has a negative offset or size")
            region = Region(tuple(offset[low:high]), tuple(size[low:high]))
            if not region.fits(shape) or region.elements * dtype.item_bytes != length:
                raise CorruptionError(f"index {self._what}: chunk {region} of tensor {key!r} does not fit its tensor")
            chunks.append(Chunk(region, file, start, length))
        return tuple(chunks)

    def _check_extent(self, file: int, start: int, length: int, key: str) -> None:
        files = self._record.files
        if not 0 <= file < len(files) or start < 0 or length < 0 or start + length > files[file].bytes:
            raise CorruptionError(f"index {self._what}: a chunk of {key!r} lies outside the data files")

    def find_object(self, key: str) -> tuple[int, int, int] | None:
        """(file, first byte, length) of an object; None if there is none."""
        row = self._find("object", self.object_count, key)
        if row is None:
            return None
        file, start, size = (self._ints(f"object_{name}", row, row + 1)[0] for name in ("file", "start", "bytes"))
        self._check_extent(file, start, size, key)
        return file, start, size

    def find_objects(self, keys: Sequence[str]) -> list[tuple[int, int, int] | None]:
        """`find_object` of each key; of many, by a table of all instead of a search for each."""
        if len(keys) * _SEARCH_STEPS < self.object_count:
            return [self.find_object(key) for key in keys]
        row = {key: number for number, key in enumerate(self.object_keys())}
        columns = [self._ints(f"object_{name}") for name in ("file", "start", "bytes")]
        found: list[tuple[int, int, int] | None] = []
        for key in keys:
            place = None
            if key in row:
                file, start, size = (column[row[key]] for column in columns)
                self._check_extent(file, start, size, key)
                place = file, start, size
            found.append(place)
        return found

    def check_objects(self) -> None:
        """Raise `CorruptionError` where objects share bytes: all of them together would be larger than what is stored."""
        file, start, size = (self._ints(f"object_{name}") for name in ("file", "start", "bytes"))
        places = sorted(zip(file, start, size, strict=False))
        for (left, low, count), (right, high, _) in itertools.pairwise(places):
            if left == right and high < low + count:
                raise CorruptionError(f"index {self._what}: two objects share bytes of a file")

    def block_checksums(self, file: int, first: int, last: int) -> NDArray[np.uint64]:
        """Checksums of blocks [first, last) of a file."""
        base, end = self._ints("file_block_ends", file, file + 2)
        if not base <= base + first <= base + last <= end:
            raise CorruptionError(f"index {self._what}: file {file} has {end - base} blocks, not {last}")
        return self._column("block_checksum", base + first, base + last).astype(np.uint64)

    def image(self) -> bytes:
        """The index file, verified; for readers on other ranks."""
        self._bytes(self._record.index.head_bytes, len(self._data))
        return self._data.tobytes()

    def _digests(self, name: str) -> NDArray[np.generic]:
        words = self._column(name)
        count = WORDS_PER_ROW[name]
        if len(words) % count:
            raise CorruptionError(f"index {self._what}: column {name!r} has {len(words)} words, not {count} per row")
        return words.reshape(-1, count)

    def load_all(self) -> Index:
        """Every column, checked against each other and the commit record."""
        columns = {name: self._column(name) for name in COLUMNS}
        columns |= {name: self._digests(name) for name in OPTIONAL_COLUMNS if name in self._head.columns}
        index = Index(**columns)  # type: ignore[arg-type]
        sizes = np.array([file.bytes for file in self._record.files], dtype=np.int64)
        check_index(index, len(sizes), sizes, self._record.block_bytes, self._what)
        return index
