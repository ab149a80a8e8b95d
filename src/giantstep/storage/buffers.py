"""Memory from which devices read and into which they write without further copies."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
from numpy.typing import NDArray


def device_buffer(size_bytes: int) -> NDArray[np.uint8]:
    """A new buffer of bytes, freed with the array.

    It begins on a page, as reads and writes past the page cache need, and lies in huge pages where the system has
    them: the device then takes it in few large requests instead of one per scattered 4 KiB page.
    """
    memory = mmap.mmap(-1, max(1, size_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)[:size_bytes]


def address_of(data: NDArray[np.uint8]) -> int:
    """Where the bytes lie in memory."""
    return int(data.__array_interface__["data"][0])
