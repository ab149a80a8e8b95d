"""The two hashes of the format: xxh3-64 per block of a file, SHA-256 for the records that anchor them.

xxh3 runs at memory speed and so can guard every byte; SHA-256 is in every standard library, so that a
stranger's reader can check a commit record with nothing else. Neither defends against an adversary.
"""

from __future__ import annotations

import hashlib
from typing import TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

Checksums: TypeAlias = NDArray[np.uint64]
Buffer: TypeAlias = bytes | bytearray | memoryview


def block_checksums(data: memoryview, block_bytes: int) -> Checksums:
    """xxh3-64 of each block of `data`; the last block may be short. Releases the GIL per block."""
    starts = range(0, len(data), block_bytes)
    return np.fromiter(
        (xxhash.xxh3_64_intdigest(data[start : start + block_bytes]) for start in starts), dtype=np.uint64, count=len(starts)
    )


def anchor_digest(data: Buffer) -> str:
    """`sha256:` and 64 hexadecimal digits."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


class ContentDigest:
    """A 128-bit digest of bytes fed piece by piece, for comparing replicas; never stored."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, data: Buffer) -> None:
        """Feed the next bytes."""
        self._state.update(data)

    def halves(self) -> tuple[int, int]:
        """High and low 64 bits."""
        value = self._state.intdigest()
        return value >> 64, value & ((1 << 64) - 1)
