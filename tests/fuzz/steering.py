"""Decisions read from a fuzzer's bytes, so that bytes near each other make mutants near each other.

Called by `mutations` and `json_tree`. Not here: what is decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

NUMBERS = (
    *(0, 1, -1, 2, 7, 63, 64, 65, 255, 256, 4095, 4096, 4097, 65536),
    *(2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**53 + 1, 2**61, 2**62 - 1, 2**62, 2**62 + 1),
    *(2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**31), -(2**62), -(2**63), 10**18, 10**40),
)


class Steering:
    """Reads decisions from `data`, front to back. Where the bytes are used up, every decision is the first one."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    @property
    def more(self) -> bool:
        """Whether bytes are left."""
        return self._place < len(self._data)

    def take(self, count: int) -> bytes:
        """The next bytes, fewer at the end."""
        found = self._data[self._place : self._place + count]
        self._place += len(found)
        return found

    def rest(self) -> bytes:
        """All bytes left."""
        return self.take(len(self._data))

    def below(self, count: int) -> int:
        """A number from 0 to `count` - 1."""
        if count <= 1:
            return 0
        return int.from_bytes(self.take(1 if count <= 256 else 2), "little") % count

    def pick(self, choices: Sequence[T]) -> T:
        """One of the choices."""
        return choices[self.below(len(choices))]

    def number(self, near: int = 0) -> int:
        """An integer of the kind that breaks readers: an edge, one near `near`, or any."""
        kind = self.below(4)
        if kind == 0:
            return self.pick(NUMBERS)
        if kind == 1:
            return near + self.below(256) - 128
        if kind == 2:
            return (1 << self.below(70)) + self.below(5) - 2
        return int.from_bytes(self.take(8), "little", signed=True)

    def blob(self, most: int = 64) -> bytes:
        """Up to `most` bytes of any content."""
        return self.take(self.below(most + 1))
