"""The two hashes of the format: xxh3-64 per block of a file, SHA-256 for the records that anchor them.

xxh3 runs at memory speed and so can guard every byte; SHA-256 is in every standard library, so that a
stranger's reader can check a commit record with nothing else. Neither defends against an adversary.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Iterator, Sequence
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


def digests_of_parts(parts: Sequence[memoryview], block_bytes: int) -> list[int]:
    """xxh3-64 of each block of the bytes of all parts, one after another; the last block may be short."""
    found = []
    for block in cut_parts(parts, block_bytes):
        if len(block) == 1:
            found.append(xxhash.xxh3_64_intdigest(block[0]))
        else:
            state = xxhash.xxh3_64()
            for part in block:
                state.update(part)
            found.append(state.intdigest())
    return found


def cut_parts(parts: Sequence[memoryview], size: int) -> Iterator[Sequence[memoryview]]:
    """The bytes of all parts, one after another, as lists of parts of `size` bytes each; the last one may have fewer."""
    # There may be thousands of parts: only those that are cut are looked at one by one.
    ends = list(itertools.accumulate(map(len, parts)))
    total = ends[-1] if ends else 0
    if total <= size:
        if total:
            yield parts
        return
    first = 0
    for start in range(0, total, size):
        stop = min(start + size, total)
        last = bisect.bisect_left(ends, stop, first)
        found = [*parts[first : last + 1]]
        if ends[last] > stop:
            found[-1] = found[-1][: stop - ends[last]]
        begin = ends[first] - len(parts[first])
        if start > begin:
            found[0] = found[0][start - begin :]
        yield found
        first = last + (ends[last] == stop)


def anchor_digest(data: Buffer) -> str:
    """`sha256:` and 64 hexadecimal digits."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


class ContentDigest:
    """A 128-bit digest (xxh3-128) of bytes fed piece by piece: by it contents are compared, of replicas and of chunks."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, data: Buffer) -> None:
        """Feed the next bytes."""
        self._state.update(data)

    def halves(self) -> tuple[int, int]:
        """High and low 64 bits."""
        value = self._state.intdigest()
        return value >> 64, value & ((1 << 64) - 1)
