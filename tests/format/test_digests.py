"""Bytes in several parts are cut and checksummed as if they were one row."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from giantstep.format.digests import block_checksums, cut_parts, digests_of_parts

LENGTHS = st.lists(st.integers(0, 40), max_size=12)


def _parts(lengths: list[int]) -> tuple[bytes, list[memoryview]]:
    data = bytes(number % 251 for number in range(sum(lengths)))
    parts, start = [], 0
    for length in lengths:
        parts.append(memoryview(data)[start : start + length])
        start += length
    return data, parts


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 30))
@example([], 1)
@example([8, 8, 8], 8)
@example([0, 5, 0, 25, 0], 10)
def test_parts_are_cut_at_every_multiple_of_a_size(lengths: list[int], size: int) -> None:
    data, parts = _parts(lengths)
    cuts = [b"".join(found) for found in cut_parts(parts, size)]
    assert cuts == [data[start : start + size] for start in range(0, len(data), size)]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 30))
def test_blocks_of_parts_have_the_checksums_of_one_row(lengths: list[int], size: int) -> None:
    data, parts = _parts(lengths)
    assert digests_of_parts(parts, size) == block_checksums(memoryview(data), size).tolist()
