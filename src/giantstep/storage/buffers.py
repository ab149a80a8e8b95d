"""Memory from which devices read and into which they write without further copies."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

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


def address_of(data: NDArray[Any]) -> int:
    """Where the first element lies in memory."""
    return int(data.__array_interface__["data"][0])


class _Addresses:
    """Memory, as NumPy is told of it."""

    def __init__(self, start: int, size_bytes: int) -> None:
        self.__array_interface__ = {"version": 3, "data": (start, False), "typestr": "|u1", "shape": (size_bytes,)}


def memory_between(start: int, stop: int) -> memoryview:
    """This process's memory between two addresses, as it is; nothing keeps it alive, and not all of it need exist.

    Thousands of parts can be cut out of it faster than out of the arrays whose memory they are. Callers touch only parts
    of arrays that they hold.
    """
    if start >= stop:
        return memoryview(b"")
    return np.asarray(_Addresses(start, stop - start)).data
