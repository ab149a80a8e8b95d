"""Checking every byte of a checkpoint, and saying which files and tensors are broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from giantstep.errors import GiantstepError
from giantstep.format.digests import block_checksums
from giantstep.format.index import Index, decode_texts
from giantstep.format.record import CommitRecord
from giantstep.reading.data_files import DataFiles
from giantstep.reading.index_reader import IndexReader
from giantstep.storage.base import NotAFileError, Store

Progress = Callable[[int], None]

_READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Damage:
    """Something broken.

    Attributes:
        file: name in the checkpoint directory.
        start, stop: damaged bytes, or None where the file as a whole is missing, unreadable or of another size.
        rank: rank that wrote the file; None for the index.
        tensors: keys of tensors and objects that lie there.
        problem: in words.
    """

    file: str
    start: int | None
    stop: int | None
    rank: int | None
    tensors: tuple[str, ...]
    problem: str


@dataclass(slots=True)
class VerifyReport:
    """What `verify` found. `ok` means that every byte is what was written."""

    files: int = 0
    bytes: int = 0
    damages: list[Damage] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return not self.damages


def look_at_files(store: Store, record: CommitRecord, index: Index | None) -> list[Damage]:
    """Data files that are missing or of another size, without reading them; without an index, no keys are named.

    Raises:
        OSError: a file cannot be looked at.
    """
    names = None if index is None else _Names(index)
    damages = []
    for number, entry in enumerate(record.files):
        try:
            size = store.size(entry.name)
            problem = "" if size == entry.bytes else f"has {size} bytes, expected {entry.bytes}"
        except (FileNotFoundError, NotADirectoryError):
            problem = "is missing"
        except NotAFileError as error:
            problem = f"is {error.strerror}"
        if problem:
            keys = () if names is None else names.within(number, 0, entry.bytes)
            damages.append(Damage(entry.name, None, None, entry.rank, keys, problem))
    return damages


def verify_files(store: Store, record: CommitRecord, reader: IndexReader, progress: Progress | None) -> VerifyReport:
    """Check index and data files; see `Checkpoint.verify`."""
    report = VerifyReport()
    try:
        index = reader.load_all()
        names = _Names(index)
    except GiantstepError as error:
        report.damages.append(Damage(record.index.name, None, None, None, (), str(error)))
        return report
    except UnicodeDecodeError as error:
        report.damages.append(Damage(record.index.name, None, None, None, (), f"a key is not UTF-8: {error}"))
        return report
    report.files, report.bytes = 1, record.index.bytes
    if progress:
        progress(record.index.bytes)
    with DataFiles(store, record) as files:
        for number, entry in enumerate(record.files):
            try:
                _verify_file(record, index, names, files, number, report, progress)
            except (GiantstepError, OSError) as error:
                report.damages.append(
                    Damage(entry.name, None, None, entry.rank, names.within(number, 0, entry.bytes), str(error))
                )
            report.files += 1
    return report


def _verify_file(
    record: CommitRecord,
    index: Index,
    names: _Names,
    files: DataFiles,
    number: int,
    report: VerifyReport,
    progress: Progress | None,
) -> None:
    entry, size = record.files[number], record.block_bytes
    handle = files.get(number)
    expected = index.block_checksum[index.file_block_ends[number] : index.file_block_ends[number + 1]]
    step = max(1, _READ_BYTES // size) * size
    buffer = np.empty(min(step, max(entry.bytes, 1)), dtype=np.uint8)
    for low in range(0, entry.bytes, step):
        data = buffer[: min(step, entry.bytes - low)].data
        handle.read_into(low, data)
        found = block_checksums(data, size)
        first = low // size
        for block in np.flatnonzero(found != expected[first : first + len(found)]).tolist():
            start = (first + block) * size
            stop = min(start + size, entry.bytes)
            problem = f"bytes {start} to {stop} are not what was written (checksum differs)"
            report.damages.append(Damage(entry.name, start, stop, entry.rank, names.within(number, start, stop), problem))
        report.bytes += len(data)
        if progress:
            progress(len(data))


class _Names:
    """Keys of the tensors and objects that lie in a byte range of a file."""

    def __init__(self, index: Index) -> None:
        tensors = np.repeat(np.arange(len(index.tensor_dtype)), np.diff(index.tensor_chunk_ends))
        self._keys = decode_texts(index.tensor_key_ends, index.tensor_key_bytes)
        objects = decode_texts(index.object_key_ends, index.object_key_bytes)
        self._key = np.concatenate((tensors, np.arange(len(objects)) + len(self._keys)))
        self._keys += objects
        self._file = np.concatenate((index.chunk_file, index.object_file))
        self._start = np.concatenate((index.chunk_start, index.object_start))
        self._stop = self._start + np.concatenate((index.chunk_bytes, index.object_bytes))

    def within(self, file: int, start: int, stop: int) -> tuple[str, ...]:
        """Keys, sorted and once each."""
        hit = (self._file == file) & (self._start < stop) & (self._stop > start)
        return tuple(sorted({self._keys[key] for key in self._key[hit].tolist()}))
