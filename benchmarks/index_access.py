"""An index in a store that counts what is read of it; opening it and finding one key."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from planning_calls import Parts, SavePlan

from giantstep.format.index import EncodedIndex, Index, encode_index
from giantstep.format.names import data_file_name, index_file_name
from giantstep.format.record import CommitRecord, FileEntry, IndexEntry, Totals, encode_record
from giantstep.options import SaveOptions
from giantstep.planning.index_plan import WriteReport
from giantstep.reading.index_reader import IndexReader
from giantstep.storage.base import ReadHandle
from giantstep.storage.local import LocalStore
from giantstep.storage.record_file import read_record

BLOCK_BYTES = SaveOptions().block_bytes
SAVE_ID = "20260101T000000-0123456789abcdef"
_HEADER_BYTES = 4096


class CountingStore(LocalStore):
    """A local store that counts the bytes read from it, by file."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.read_bytes: dict[str, int] = {}

    def open_read(self, name: str, *, direct: bool = False) -> ReadHandle:
        """As the store's; the handle counts."""
        return _CountingHandle(super().open_read(name, direct=direct), name, self.read_bytes)


class _CountingHandle(ReadHandle):
    def __init__(self, handle: ReadHandle, name: str, counts: dict[str, int]) -> None:
        self._handle = handle
        self._name = name
        self._counts = counts

    @property
    def size(self) -> int:
        """As the handle's."""
        return self._handle.size

    def read_into(self, offset: int, target: memoryview) -> None:
        """As the handle's; counts."""
        self._counts[self._name] = self._counts.get(self._name, 0) + len(target)
        self._handle.read_into(offset, target)

    def close(self) -> None:
        """As the handle's."""
        self._handle.close()


@dataclass(frozen=True, slots=True)
class Opened:
    """Opening a checkpoint and finding one key.

    Attributes:
        record_secs: to read and check the commit record.
        find_secs: to open the index, find the key, and read all that the index says of its tensor.
        index_bytes, read_bytes: size of the index, and what was read of it.
        load_secs: to read and check the index in full, as loading a state does.
    """

    record_secs: float
    find_secs: float
    index_bytes: int
    read_bytes: int
    load_secs: float


def write_reports(plan: SavePlan) -> list[Parts]:
    """What ranks would report that wrote their part of a plan, one file each."""
    objects = plan.objects.by_writer()
    reports = []
    for rank, rows in enumerate(plan.chunks_by_writer()):
        sizes, held = plan.bytes[rows], objects.get(rank, [])
        starts = _HEADER_BYTES + np.cumsum(sizes) - sizes
        size = _HEADER_BYTES + int(sizes.sum()) + 100 * len(held)
        report = WriteReport(
            file_names=[data_file_name(SAVE_ID, rank, 0)],
            file_bytes=np.array([size]),
            file_blocks=np.array([-(-size // BLOCK_BYTES)]),
            block_checksum=np.zeros(-(-size // BLOCK_BYTES), dtype=np.uint64),
            chunk_file=np.zeros(len(sizes), dtype=np.int64),
            chunk_start=starts,
            object_keys=held,
            object_file=np.zeros(len(held), dtype=np.int64),
            object_start=size - 100 * np.arange(len(held), 0, -1),
            object_bytes=np.full(len(held), 100),
        )
        reports.append(report.encode())
    return reports


def store_index(root: str, index: Index, files: Sequence[FileEntry]) -> EncodedIndex:
    """Put index and commit record into a folder; there are no data files."""
    encoded = encode_index(index, SAVE_ID, BLOCK_BYTES)
    store, name = LocalStore(root), index_file_name(SAVE_ID)
    store.prepare("")
    handle = store.create(name, len(encoded.data), direct=False)
    handle.write_at(0, encoded.data)
    handle.close()
    record = CommitRecord(
        save_id=SAVE_ID,
        library="benchmark",
        created="2026-01-01T00:00:00+00:00",
        world_size=len(files),
        block_bytes=BLOCK_BYTES,
        index=IndexEntry(name, len(encoded.data), encoded.head_bytes, encoded.head_digest),
        files=tuple(files),
        totals=Totals(len(index.tensor_dtype), len(index.chunk_file), len(index.object_file), int(index.chunk_bytes.sum())),
        content_metadata=None,
    )
    store.publish("checkpoint.json", encode_record(record), f"checkpoint.json.{SAVE_ID}.tmp")
    return encoded


def open_and_find(root: str, key: str) -> Opened:
    """Open what `store_index` wrote and find a key; then read all of the index."""
    store = CountingStore(root)
    begin = time.perf_counter()
    record = read_record(store)
    known = time.perf_counter()
    reader = IndexReader(store, record)
    row = reader.find_tensor(key)
    if row is None:
        raise KeyError(key)
    reader.tensor(row)
    found = time.perf_counter()
    read_bytes = store.read_bytes[record.index.name]
    whole = IndexReader(store, record)
    again = time.perf_counter()
    whole.load_all()
    loaded = time.perf_counter()
    return Opened(known - begin, found - known, record.index.bytes, read_bytes, loaded - again)
