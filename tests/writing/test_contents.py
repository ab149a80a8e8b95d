"""Digests of entries and their heads: of the bytes that are written, whatever gives them."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

from giantstep.storage.buffers import address_of
from giantstep.writing.contents import HEAD_BYTES, digests_of, heads_of
from giantstep.writing.write import Sources

SIZES = [HEAD_BYTES + 1, 10, HEAD_BYTES, 3 * HEAD_BYTES, 9 << 20, 1]


def entries(in_memory: list[bool]) -> tuple[Sources, list[bytes]]:
    """Entries of random bytes, some in memory, others in pieces."""
    data = [np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8) for number, size in enumerate(SIZES)]
    address = np.array([address_of(one) if there else 0 for one, there in zip(data, in_memory, strict=True)], dtype=np.int64)
    sources = Sources(np.array(SIZES), address, data, lambda row: np.array_split(data[row], 3))
    return sources, [one.tobytes() for one in data]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("in_memory", [[True] * 6, [False] * 6, [True, False] * 3], ids=["memory", "pieces", "both"])
def test_digests_are_of_all_bytes_of_the_entries_asked_for(in_memory: list[bool], threads: int) -> None:
    sources, data = entries(in_memory)
    for rows in (np.arange(6), np.array([4, 0]), np.zeros(0, dtype=np.intp)):
        found = digests_of(sources, rows, threads)
        assert found.shape == (6, 2)
        for row in range(6):
            value = xxhash.xxh3_128_intdigest(data[row]) if row in rows else 0
            assert int(found[row, 0]) << 64 | int(found[row, 1]) == value


def test_heads_are_of_long_entries_in_memory_alone() -> None:
    sources, data = entries([True, True, True, False, True, True])
    expected = [xxhash.xxh3_64_intdigest(data[row][:HEAD_BYTES]) if row in (0, 4) else 0 for row in range(6)]
    assert heads_of(sources)[:, 0].tolist() == expected


def test_a_check_that_raises_ends_it() -> None:
    sources, _ = entries([True] * 6)
    checks = []

    def check() -> None:
        checks.append(1)
        if len(checks) == 2:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        digests_of(sources, np.arange(6), 1, check)
    assert len(checks) == 2
