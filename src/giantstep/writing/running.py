"""`RunningDigests`: digests of entries, taken while their bytes go by to a file. Called by `stretch`, in its threads.

Threads write stretches of a file side by side, but a digest takes bytes in their order. What comes next is taken at once, while
the processor's cache holds it; what comes too early waits until a thread has taken what lies before.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from giantstep.shards.region import Int64s

_NONE = xxhash.xxh3_128_digest(b"")


class RunningDigests:
    """xxh3-128 of each entry of one file, front to back.

    Args:
        header_bytes: what lies before the entries.
        sizes: of the entries, in the order in which they follow each other.
    """

    def __init__(self, header_bytes: int, sizes: Int64s) -> None:
        rows = np.flatnonzero(sizes > 0)
        # The header counts as an entry, so that every byte is one's.
        self._rows = [-1, *rows.tolist()]
        self._sizes = [header_bytes, *sizes[rows].tolist()]
        self._digests = [_NONE] * len(sizes)
        self._lock = threading.Lock()
        self._early: dict[int, Sequence[memoryview]] = {}
        self._busy = False
        self._position = self._current = self._taken = 0
        self._state = xxhash.xxh3_128()

    def passed(self, offset: int, parts: Sequence[memoryview]) -> None:
        """The bytes at `offset` of the file. Each is told of once, in any order; they must not change until all are."""
        with self._lock:
            self._early[offset] = parts
            if self._busy:
                return
            self._busy = True
        while True:
            with self._lock:
                found = self._early.pop(self._position, None)
                if found is None:
                    self._busy = False
                    return
            # Invariant: one thread at a time is here, and what it takes is what comes next.
            size = sum(map(len, found))
            for part in found:
                self._take(part)
            self._position += size

    def _take(self, part: memoryview) -> None:
        start = 0
        while start < len(part):
            size = self._sizes[self._current]
            stop = min(len(part), start + size - self._taken)
            if stop - start == size:
                self._end(xxhash.xxh3_128_digest(part[start:stop]))
            else:
                self._state.update(part[start:stop])
                self._taken += stop - start
                if self._taken == size:
                    self._end(self._state.digest())
                    self._state.reset()
            start = stop

    def _end(self, digest: bytes) -> None:
        row = self._rows[self._current]
        if row >= 0:
            self._digests[row] = digest
        self._current, self._taken = self._current + 1, 0

    def finish(self) -> NDArray[np.uint64]:
        """[entries, 2] digests, high words first; once all bytes have passed."""
        if self._current != len(self._rows):
            raise RuntimeError(f"{len(self._rows) - self._current} entries of a file have not passed in full")
        return np.frombuffer(b"".join(self._digests), dtype=">u8").astype(np.uint64).reshape(-1, 2)
