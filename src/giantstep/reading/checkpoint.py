"""`Checkpoint`: looking into a committed checkpoint, without ranks, devices or torch."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import BadArgumentError, CorruptionError, GiantstepError, KeyMismatchError, StoreError
from giantstep.format.codec import Codec, Unknown
from giantstep.format.record import CommitRecord, Json
from giantstep.options import Threads
from giantstep.planning.load_plan import plan_load
from giantstep.planning.load_tables import ChunkTable, tabulate_spans, tabulate_wanted
from giantstep.reading.array_sink import ArraySink, ArraySinks
from giantstep.reading.fetch import WORDS, Fetched, Source, fetch
from giantstep.reading.index_reader import IndexReader, TensorEntry
from giantstep.reading.lazy_array import LazyArray
from giantstep.reading.verify import Progress, VerifyReport, verify_files
from giantstep.shards.dtypes import BY_CODE
from giantstep.shards.object_keys import COMMON_KEY
from giantstep.shards.region import Region
from giantstep.storage.base import Store

_BUFFER_BYTES = 8 << 20
_THREADS = Threads(2, 2)
# Among more keys than this no similar ones are looked for.
_HINTED_KEYS = 20_000


@dataclass(frozen=True, slots=True)
class ChunkInfo:
    """Where one chunk of a tensor lies: region, file name, rank that wrote it, first byte and length."""

    region: Region
    file: str
    rank: int
    start: int
    bytes: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A stored tensor.

    Attributes:
        key, dtype, shape, bytes: the global tensor; `dtype` is torch's name.
        chunk_count: number of chunks.
        chunks: where they lie; empty where only an overview was asked for (`Checkpoint.infos`).
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    chunk_count: int
    chunks: tuple[ChunkInfo, ...]


@dataclass(frozen=True, slots=True)
class Preface:
    """What every rank of a load needs, read by one of them or by a load before.

    Attributes:
        index: the index file, or what an earlier `Checkpoint` made of it.
        common: the common state, encoded; empty if there is none.
    """

    index: bytes | IndexReader
    common: bytes


class Checkpoint:
    """A committed checkpoint. Reading methods raise `CorruptionError` where bytes are not those written.

    Args:
        store: where it lies.
        record: its commit record.
        codec: decodes objects.
        unknown: what becomes of values whose types are unknown here; see `Codec.decode`.
        preface: index and common state, if another rank has read them.
    """

    def __init__(
        self,
        store: Store,
        record: CommitRecord,
        codec: Codec,
        *,
        unknown: Unknown = "raise",
        preface: Preface | None = None,
    ) -> None:
        self._store = store
        self._record = record
        self._codec = codec
        self._unknown: Unknown = unknown
        known = None if preface is None else preface.index
        self._index = known if isinstance(known, IndexReader) else IndexReader(store, record, known)
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._bytes_read = 0
        self._common: Any = None
        # Encoded objects that were read before they are asked for.
        self._ahead: dict[str, bytes] = {} if preface is None or not preface.common else {COMMON_KEY: preface.common}

    @property
    def location(self) -> str:
        """Path or URL."""
        return self._store.location

    @property
    def record(self) -> CommitRecord:
        """The commit record."""
        return self._record

    @property
    def content_metadata(self) -> Json:
        """The value given to `save`."""
        return self._record.content_metadata

    @property
    def metrics(self) -> Mapping[str, float]:
        """The `metrics` given to `save`."""
        return self._record.metrics

    def keys(self) -> list[str]:
        """Keys of all tensors, sorted."""
        with self._reading():
            return self._index.tensor_keys()

    def __len__(self) -> int:
        return self._index.tensor_count

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, key: object) -> bool:
        with self._reading():
            return isinstance(key, str) and self._index.find_tensor(key) is not None

    def _entry(self, key: str) -> TensorEntry:
        if not isinstance(key, str):
            raise BadArgumentError(f"tensor key {key!r} must be a str")
        with self._reading():
            row = self._index.find_tensor(key)
        if row is None:
            keys = self.keys()
            near = difflib.get_close_matches(key, keys, n=3) if len(keys) <= _HINTED_KEYS else []
            hint = f" Nearest: {', '.join(map(repr, near))}." if near else ""
            raise KeyMismatchError(f"no tensor {key!r} in {self.location}, which holds {len(self)} tensors.{hint}")
        with self._reading():
            return self._index.tensor(row)

    def info(self, key: str) -> TensorInfo:
        """What is stored under a key, and where. Reads no tensor data."""
        entry = self._entry(key)
        files = self._record.files
        chunks = tuple(
            ChunkInfo(chunk.region, files[chunk.file].name, files[chunk.file].rank, chunk.start, chunk.bytes)
            for chunk in entry.chunks
        )
        return TensorInfo(entry.key, entry.dtype.torch_name, entry.shape, entry.bytes, len(chunks), chunks)

    def infos(self) -> Iterator[TensorInfo]:
        """`info` of every tensor, without its chunks' places: fast for many tensors."""
        with self._reading():
            index = self._index.load_all()
        ends, dims = index.tensor_dims_ends.tolist(), index.tensor_dims.tolist()
        counts = np.diff(index.tensor_chunk_ends).tolist()
        for row, (key, code) in enumerate(zip(self.keys(), index.tensor_dtype.tolist(), strict=True)):
            dtype, shape = BY_CODE[code], tuple(dims[ends[row] : ends[row + 1]])
            size = Region.whole(shape).elements * dtype.item_bytes
            yield TensorInfo(key, dtype.torch_name, shape, size, counts[row], ())

    def __getitem__(self, key: str) -> LazyArray:
        return LazyArray(self._entry(key), self._read_region)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """What the system says against reading, as an error of ours."""
        try:
            yield
        except GiantstepError:
            raise
        except OSError as error:
            raise StoreError(f"{self.location} cannot be read: {error}") from error

    def _read_region(self, entry: TensorEntry, region: Region) -> NDArray[Any]:
        target = np.empty(region.size, dtype=WORDS[entry.dtype.item_bytes])
        if not target.size:
            return target
        dims = max(1, len(entry.shape))
        chunks = entry.chunks
        table = ChunkTable(
            ends=np.array([0, len(chunks)]),
            item_bytes=np.array([entry.dtype.item_bytes]),
            file=np.array([chunk.file for chunk in chunks], dtype=np.int64),
            start=np.array([chunk.start for chunk in chunks], dtype=np.int64),
            offset=np.array([chunk.region.offset or (0,) for chunk in chunks], dtype=np.int64).reshape(len(chunks), dims),
            size=np.array([chunk.region.size or (1,) for chunk in chunks], dtype=np.int64).reshape(len(chunks), dims),
        )
        wanted = tabulate_wanted([0], [region], [False], dims)
        plan = plan_load(table, wanted, block_bytes=self._record.block_bytes, buffer_bytes=_BUFFER_BYTES)
        source = Source(self._store, self._record, self._index.block_checksums, table, lambda _chunk: entry.key)
        with self._reading():
            self._count(fetch(source, plan, ArraySinks([ArraySink(target, region.offset)]), _THREADS))
        return target

    def _count(self, fetched: Fetched) -> None:
        with self._counting:
            self._bytes_read += fetched.bytes_read

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors and objects that were read from the store so far, whole blocks."""
        return self._bytes_read

    def read_words(self, key: str, region: Region) -> tuple[str, NDArray[Any]]:
        """Name in torch of a tensor's dtype, and a region of it as plain words; for the library's own use."""
        entry = self._entry(key)
        return entry.dtype.torch_name, self._read_region(entry, region)

    def object_keys(self) -> list[str]:
        """Keys of all stored objects, the common state's among them if there is any."""
        with self._reading():
            return self._index.object_keys()

    def objects(self) -> dict[str, Any]:
        """All stored objects by key, without the common state."""
        with self._reading():
            self._index.check_objects()
        keys = [key for key in self.object_keys() if key != COMMON_KEY]
        with self.reading_ahead(keys):
            return {key: self.object(key) for key in keys}

    def object(self, key: str) -> Any:
        """One stored object, decoded; runs no stored code.

        Values of enums and registered types that are unknown here come as `Unregistered`, with what is stored of them,
        from a checkpoint that `open_checkpoint` opened.

        Raises:
            KeyMismatchError: there is none of this key.
        """
        return self._codec.decode(self._object_bytes(key), f"{key!r} in {self.location}", unknown=self._unknown)

    def encoded_object(self, key: str) -> bytes:
        """One stored object as it is stored; for the library's own use."""
        return self._object_bytes(key)

    def _object_bytes(self, key: str) -> bytes:
        found = self._ahead.get(key)
        return self._read_objects([key])[key] if found is None else found

    def _read_objects(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Encoded objects, those that lie near each other read together."""
        with self._reading():
            found = self._index.find_objects(keys)
        places = [self._placed(key, place) for key, place in zip(keys, found, strict=True)]
        table, wanted = tabulate_spans(*([place[column] for place in places] for column in range(3)))
        targets = [np.empty(size, dtype=np.uint8) for _, _, size in places]
        plan = plan_load(table, wanted, block_bytes=self._record.block_bytes, buffer_bytes=_BUFFER_BYTES)

        def key_of(chunk: int) -> str:
            return keys[int(np.searchsorted(table.ends, chunk, side="right")) - 1]

        source = Source(self._store, self._record, self._index.block_checksums, table, key_of, "object")
        with self._reading():
            self._count(fetch(source, plan, ArraySinks([ArraySink(target, (0,)) for target in targets]), _THREADS))
        return {key: target.tobytes() for key, target in zip(keys, targets, strict=True)}

    def _placed(self, key: str, found: tuple[int, int, int] | None) -> tuple[int, int, int]:
        """File, first byte and length of an object, which must be there."""
        if found is None:
            raise KeyMismatchError(
                f"no object {key!r} in {self.location}; it holds {', '.join(map(repr, self.object_keys()[:20])) or 'none'}"
            )
        return found

    @contextmanager
    def reading_ahead(self, keys: Iterable[str]) -> Iterator[None]:
        """Inside, these objects are not read again: those that lie near each other were read together."""
        new = list(dict.fromkeys(key for key in keys if key not in self._ahead))
        self._ahead |= self._read_objects(new)
        try:
            yield
        finally:
            for key in new:
                self._ahead.pop(key, None)

    def preface(self) -> Preface:
        """Index and common state, verified; the index in memory, to be used again in this process."""
        stored = self._index.find_object(COMMON_KEY) is not None
        if stored and self._common is None and COMMON_KEY not in self._ahead:
            self._ahead[COMMON_KEY] = self._object_bytes(COMMON_KEY)
        return Preface(self._index, self._ahead.get(COMMON_KEY, b""))

    @property
    def common(self) -> Any:
        """The common state: nested plain values; an empty dict if none was saved."""
        with self._lock:
            if self._common is None:
                with self._reading():
                    stored = self._index.find_object(COMMON_KEY) is not None
                found = self.object(COMMON_KEY) if stored else {}
                if not isinstance(found, dict):
                    raise CorruptionError(f"common state of {self.location} is of {type(found)}, expected a dict")
                self._common = found
            return self._common

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Read every byte of the checkpoint and compare it with its checksum.

        Damage is reported, not raised. Only what cannot be opened at all (commit record, head of the index) raises,
        and did so when the checkpoint was opened.

        Args:
            progress: called with the number of bytes checked since the last call.
        """
        return verify_files(self._store, self._record, self._index, progress)

    def index_tables(self) -> IndexReader:
        """The index; for the library's own use."""
        return self._index
