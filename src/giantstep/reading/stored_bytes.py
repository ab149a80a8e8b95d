"""Bytes of data files as they lie there, verified, through one window of bounded size.

For copying stored bytes without decoding them; called by `removal`. Reading into tensors is `fetch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import CorruptionError
from giantstep.format.digests import block_checksums
from giantstep.format.record import CommitRecord
from giantstep.reading.data_files import DataFiles
from giantstep.reading.fetch import ChecksumsOf
from giantstep.shards.region import Int64s
from giantstep.storage.base import Store
from giantstep.storage.buffers import device_buffer

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Spans:
    """The spans that will be asked for, sorted by file and first byte; `file` is a row of the commit record."""

    file: Int64s
    start: Int64s
    bytes: Int64s


class StoredBytes:
    """Verified access to spans of data files. For one thread; a context manager that closes what it opened.

    Only blocks that hold bytes of the spans are read, so damage elsewhere does not matter. A block is read once as
    long as spans are asked for in order.

    Args:
        store, record: the checkpoint.
        checksums: of a file's blocks.
        spans: everything that will be asked for.
        name_of: what lies in a span, for errors.
        window_bytes: most bytes to hold, beside windows to whose arrays the caller refers; but at least a block.
    """

    def __init__(
        self,
        store: Store,
        record: CommitRecord,
        checksums: ChecksumsOf,
        spans: Spans,
        name_of: Callable[[int], str],
        window_bytes: int,
    ) -> None:
        self._location = store.location
        self._record = record
        self._checksums = checksums
        self._spans = spans
        self._name_of = name_of
        self._window_blocks = max(1, window_bytes // record.block_bytes)
        self._buffer = device_buffer(0)
        self._files = DataFiles(store, record)
        self._file, self._low, self._high = -1, 0, 0
        self._needed: NDArray[np.bool_] = np.zeros(0, dtype=bool)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.__exit__(*error)

    def pieces(self, span: int) -> Iterator[NDArray[np.uint8]]:
        """The bytes of a span, in order; each array keeps its bytes as long as it is referred to.

        Raises:
            CorruptionError: they are not those that were written.
            IncompleteError: the file is missing.
            OSError: reading failed.
        """
        file, position = int(self._spans.file[span]), int(self._spans.start[span])
        stop = position + int(self._spans.bytes[span])
        while position < stop:
            if file != self._file or not self._low <= position < self._high:
                self._fill(file, position)
            end = min(stop, self._high)
            yield self._buffer[position - self._low : end - self._low]
            position = end

    def _fill(self, file: int, position: int) -> None:
        """Read the window that begins with the block of `position`, up to a block that nobody needs."""
        size, entry = self._record.block_bytes, self._record.files[file]
        if file != self._file:
            self._file, self._needed = file, self._needed_blocks(file)
        first = position // size
        window = self._needed[first : first + self._window_blocks]
        count = len(window) if window.all() else int(np.argmin(window))
        low, high = first * size, min((first + count) * size, entry.bytes)
        self._low = self._high = low
        # Arrays of the window before may still be in use.
        self._buffer = device_buffer(high - low)
        data = self._buffer
        self._files.get(file).read_into(low, data.data)
        wrong = np.flatnonzero(block_checksums(data.data, size) != self._checksums(file, first, first + count))
        if len(wrong):
            start = low + int(wrong[0]) * size
            raise self._damage(file, start, min(start + size, high))
        self._high = high

    def _within(self, file: int) -> tuple[int, int]:
        first, last = np.searchsorted(self._spans.file, [file, file + 1]).tolist()
        return first, last

    def _needed_blocks(self, file: int) -> NDArray[np.bool_]:
        first, last = self._within(file)
        start, length = self._spans.start[first:last], self._spans.bytes[first:last]
        start, length = start[length > 0], length[length > 0]
        size = self._record.block_bytes
        edges = np.zeros(-(-self._record.files[file].bytes // size) + 1, dtype=np.int64)
        np.add.at(edges, start // size, 1)
        np.add.at(edges, (start + length - 1) // size + 1, -1)
        needed: NDArray[np.bool_] = np.cumsum(edges)[:-1] > 0
        return needed

    def _damage(self, file: int, start: int, stop: int) -> CorruptionError:
        first, last = self._within(file)
        begins, ends = self._spans.start[first:last], (self._spans.start + self._spans.bytes)[first:last]
        names = [self._name_of(first + hit) for hit in np.flatnonzero((begins < stop) & (ends > start)).tolist()]
        entry = self._record.files[file]
        return CorruptionError(
            f"{_listed(names)}: bytes {start} to {stop} of {self._location}/{entry.name}, written by rank {entry.rank}, "
            "are not what was written (checksum differs). Restore the file from a copy, or load another step."
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
