"""Digests that are taken while bytes go by: those of the entries, whatever the order in which threads come by."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from giantstep.writing.running import RunningDigests


def expected(data: bytes, header: int, sizes: list[int]) -> list[bytes]:
    ends = np.cumsum([header, *sizes]).tolist()
    return [xxhash.xxh3_128_digest(data[begin:end]) for begin, end in itertools.pairwise(ends)]


def digests(running: RunningDigests) -> list[bytes]:
    return [row.astype(">u8").tobytes() for row in running.finish()]


def stretches(data: bytes, cuts: list[int]) -> list[tuple[int, list[memoryview]]]:
    """The data cut at some places, and each part once more in its middle."""
    ends = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    found = []
    for begin, end in itertools.pairwise(ends):
        middle = (begin + end) // 2
        parts = [memoryview(data)[first:last] for first, last in ((begin, middle), (middle, end)) if first < last]
        found.append((begin, parts))
    return found


@given(st.integers(1, 20), st.lists(st.integers(0, 30), max_size=8), st.lists(st.integers(0, 300), max_size=12), st.randoms())
def test_digests_are_those_of_the_entries_in_whatever_order_their_bytes_pass(
    header: int, sizes: list[int], cuts: list[int], order: random.Random
) -> None:
    data = random.Random(5).randbytes(header + sum(sizes))
    running = RunningDigests(header, np.array(sizes, dtype=np.int64))
    passing = stretches(data, cuts)
    order.shuffle(passing)
    for offset, parts in passing:
        running.passed(offset, parts)
    assert digests(running) == expected(data, header, sizes)


def test_threads_may_come_by_side_by_side() -> None:
    sizes = [300_000, 0, 5, 1_000_000, 70_000, 3_000_000]
    data = random.Random(1).randbytes(100 + sum(sizes))
    for attempt in range(20):
        running = RunningDigests(100, np.array(sizes, dtype=np.int64))
        passing = stretches(data, [place * 37_123 for place in range(110)])
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(running.passed, *zip(*passing, strict=True)))
        assert digests(running) == expected(data, 100, sizes), attempt


def test_what_has_not_passed_in_full_is_an_error() -> None:
    running = RunningDigests(4, np.array([8, 8]))
    running.passed(0, [memoryview(bytes(12))])
    with pytest.raises(RuntimeError, match="1 entries"):
        running.finish()
