"""A store in memory that counts what is read of each of its files, block by block."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from giantstep.storage.base import ReadHandle
from giantstep.storage.memory import MemoryStore

_NAMES = itertools.count()


class CountingStore(MemoryStore):
    """See the module.

    Attributes:
        bytes_read: of data files.
        ranges: (file, first byte, length) of each read of a data file.
        other_reads: how often each other file was read from.
    """

    def __init__(self) -> None:
        super().__init__(f"counting-{next(_NAMES)}")
        self._lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """Begin to count anew."""
        self.bytes_read = 0
        self.ranges: list[tuple[str, int, int]] = []
        self.other_reads: Counter[str] = Counter()

    def open_read(self, name: str, *, direct: bool = False) -> Any:
        return _Counting(super().open_read(name, direct=direct), name, self)

    def count(self, name: str, offset: int, length: int) -> None:
        with self._lock:
            if name.startswith("data/"):
                self.bytes_read += length
                self.ranges.append((name, offset, length))
            else:
                self.other_reads[name.partition(".")[2]] += 1

    def unique_bytes(self) -> int:
        """Bytes of data files of which some read had at least one."""
        total = 0
        for _, found in itertools.groupby(sorted(self.ranges), key=lambda item: item[0]):
            end = 0
            for _, start, length in found:
                total += max(0, start + length - max(start, end))
                end = max(end, start + length)
        return total


class _Counting(ReadHandle):
    def __init__(self, handle: ReadHandle, name: str, store: CountingStore) -> None:
        self._handle = handle
        self._name = name
        self._store = store

    @property
    def size(self) -> int:
        return self._handle.size

    def read_into(self, offset: int, target: memoryview) -> None:
        self._store.count(self._name, offset, len(target))
        self._handle.read_into(offset, target)

    def close(self) -> None:
        self._handle.close()


@contextmanager
def counting_store() -> Iterator[CountingStore]:
    """A new one, forgotten at the end."""
    store = CountingStore()
    try:
        yield store
    finally:
        store.clear()
