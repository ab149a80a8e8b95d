"""`Arenas`: large pieces of memory that are used again and again.

Fresh pages cost about as much as copying into them. Called by `reading.exchange` for messages and by `staging` for copies.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from giantstep.storage.buffers import device_buffer

Arena = NDArray[np.uint8]


class Arenas:
    """Memory that is taken and given back. Thread-safe.

    Args:
        allocate: makes new memory of at least so many bytes.

    Attributes:
        held_bytes: of all that there is now, taken or not.
        peak_bytes: most of it at a time.
    """

    def __init__(self, allocate: Callable[[int], Arena] = device_buffer) -> None:
        self._allocate = allocate
        self._lock = threading.Lock()
        self._free: list[Arena] = []
        self.held_bytes = 0
        self.peak_bytes = 0

    def take(self, size: int) -> Arena:
        """At least so many bytes, whose values are anything. The taker's until `give`."""
        with self._lock:
            fitting = [arena for arena in self._free if arena.size >= size]
            if fitting:
                found = min(fitting, key=lambda arena: arena.size)
                self._free = [arena for arena in self._free if arena is not found]
                return found
            # One that is too small goes, so that there are never more than are in use at a time.
            if self._free:
                self.held_bytes -= self._free.pop().size
            self.held_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        try:
            return self._allocate(size)
        except BaseException:
            with self._lock:
                self.held_bytes -= size
            raise

    def has_free(self, size: int) -> bool:
        """Whether one that is not taken has at least so many bytes."""
        with self._lock:
            return any(arena.size >= size for arena in self._free)

    @property
    def taken_bytes(self) -> int:
        """Of those that are taken."""
        with self._lock:
            return self.held_bytes - sum(arena.size for arena in self._free)

    def give(self, arena: Arena) -> None:
        """Take one back."""
        with self._lock:
            self._free.append(arena)

    def clear(self) -> None:
        """Free what is not taken."""
        with self._lock:
            self.held_bytes -= sum(arena.size for arena in self._free)
            self._free = []
