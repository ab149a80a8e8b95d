"""Runs of blocks by who wants them."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from giantstep.planning.block_sets import BlockTable, cut_runs, shared_runs

BLOCKS = 24


def runs(wanted: set[int]) -> tuple[np.ndarray, np.ndarray]:
    first = [block for block in sorted(wanted) if block - 1 not in wanted]
    last = [block for block in sorted(wanted) if block + 1 not in wanted]
    return np.array(first, dtype=np.int64), np.array(last, dtype=np.int64) - np.array(first, dtype=np.int64) + 1


@settings(max_examples=500)
@given(st.lists(st.sets(st.integers(0, BLOCKS - 1)), max_size=7))
def test_every_block_is_in_one_run_whose_set_is_exactly_those_that_want_it(wanted: list[set[int]]) -> None:
    found = shared_runs([runs(blocks) for blocks in wanted])
    assert (found.count > 0).all()
    members: dict[int, list[int]] = {}
    for first, count, number in zip(found.first.tolist(), found.count.tolist(), found.set_of.tolist(), strict=True):
        for block in range(first, first + count):
            assert block not in members
            members[block] = found.sets[number].tolist()
    expected = {block: [row for row, blocks in enumerate(wanted) if block in blocks] for block in range(BLOCKS)}
    assert members == {block: rows for block, rows in expected.items() if rows}
    assert len({tuple(rows.tolist()) for rows in found.sets}) == len(found.sets)
    # Neighbours differ, so there are as few runs as can be.
    for row in range(len(found.first) - 1):
        adjacent = found.first[row] + found.count[row] == found.first[row + 1]
        assert not adjacent or found.set_of[row] != found.set_of[row + 1]


@settings(max_examples=300)
@given(st.sets(st.integers(0, BLOCKS - 1)), st.sets(st.integers(0, BLOCKS + 1)))
def test_runs_are_cut_at_every_border_inside_them(wanted: set[int], borders: set[int]) -> None:
    first, count = runs(wanted)
    starts, counts, run = cut_runs(first, count, np.array(sorted(borders), dtype=np.int64))
    expected = [block for block in sorted(wanted) if block - 1 not in wanted or block in borders]
    assert starts.tolist() == expected
    covered = [
        block for start, length in zip(starts.tolist(), counts.tolist(), strict=True) for block in range(start, start + length)
    ]
    assert covered == sorted(wanted)
    assert all(first[row] <= start < first[row] + count[row] for start, row in zip(starts.tolist(), run.tolist(), strict=True))


def test_bytes_of_runs_count_the_last_block_of_a_file_as_long_as_it_is() -> None:
    table = BlockTable(np.array([0, 3, 3, 4]), np.array([250, 0, 100]), 100)
    first, count = np.array([0, 2, 2, 3, 0]), np.array([2, 1, 2, 1, 4])
    assert table.bytes_of(first, count).tolist() == [200, 50, 150, 100, 350]
    assert [table.place(block) for block in range(4)] == [(0, 0), (0, 100), (0, 200), (2, 0)]
