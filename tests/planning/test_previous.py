"""Which regions two tables have in common, what is unchanged, and which files are worth using again."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from giantstep.planning.objects import ObjectPlan
from giantstep.planning.previous import (
    CHANGED,
    REUSED,
    SETTLED,
    Contents,
    RegionTable,
    Unchanged,
    always_changing,
    choose_files,
    common_regions,
    equal_digests,
    find_unchanged,
    states_of,
    stored_regions,
)
from giantstep.planning.save_plan import SavePlan
from handmade import index_of


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def words(*values: int, width: int = 2) -> np.ndarray:
    """A digest for each number; zeros for 0."""
    return np.array([[value] * width for value in values], dtype=np.uint64).reshape(-1, width)


def table(keys: list[str], rows: list[tuple[int, list[int], list[int]]], dtype: int = 12, ndim: int = 1) -> RegionTable:
    tensors, offsets, sizes = zip(*rows, strict=True)
    codes = np.full(len(keys), dtype, dtype=np.uint8)
    return RegionTable(keys, codes, np.full(len(keys), ndim), ints(*tensors), np.array(offsets), np.array(sizes))


def contents(
    keys: list[str], sizes: list[int], digests: np.ndarray, objects: dict[str, tuple[int, int]], ranks: int = 1
) -> Contents:
    """Tensors of one chunk of uint8 each; objects as (bytes, digest)."""
    count, none = len(keys), ints()
    plan = SavePlan(
        keys=keys,
        dtype=np.full(count, 2, dtype=np.uint8),
        ndim=np.ones(count, dtype=np.int64),
        shape=ints(*sizes)[:, None],
        tied=np.arange(count),
        tensor=np.arange(count),
        offset=np.zeros((count, 1), dtype=np.int64),
        size=ints(*sizes)[:, None],
        bytes=ints(*sizes),
        writer=np.zeros(count, dtype=np.int64),
        source_row=np.arange(count),
        whole=np.ones(count, dtype=bool),
        twin=np.zeros((count, 0), dtype=np.int64),
        twin_row=np.zeros((count, 0), dtype=np.int64),
        ranks=ranks,
        objects=ObjectPlan([], none, none, none, none.astype(bool)),
    )
    heads = np.zeros((count, 1), dtype=np.uint64)
    object_bytes = ints(*(size for size, _ in objects.values()))
    return Contents(plan, heads, digests, list(objects), object_bytes, words(*(digest for _, digest in objects.values())))


def test_regions_in_common_are_of_one_key_dtype_rank_offset_and_size() -> None:
    first = table(["a", "b", "c"], [(0, [0], [4]), (0, [4], [4]), (1, [0], [4]), (2, [0], [9])])
    second = table(["b", "a"], [(0, [0], [4]), (1, [4], [4]), (1, [0], [3])])
    ours, theirs = common_regions(first, second)
    assert sorted(zip(ours.tolist(), theirs.tolist(), strict=True)) == [(1, 1), (2, 0)]
    assert len(common_regions(first, dataclasses.replace(second, dtype=second.dtype + 1))[0]) == 0
    assert len(common_regions(first, dataclasses.replace(second, ndim=second.ndim + 1))[0]) == 0
    assert len(common_regions(first, table(["x"], [(0, [0], [4])]))[0]) == 0


def test_tables_of_different_widths_are_compared() -> None:
    first = table(["a"], [(0, [5], [4])])
    second = table(["a", "m"], [(0, [0, 5], [1, 4]), (1, [1, 1], [2, 2])])
    ours, theirs = common_regions(first, second)
    assert (ours.tolist(), theirs.tolist()) == ([0], [0])


def test_only_digests_that_were_taken_are_equal() -> None:
    assert equal_digests(words(1, 0, 3), words(1, 0, 4)).tolist() == [True, False, False]


def test_unchanged_is_what_has_the_digest_that_it_had() -> None:
    index = index_of({"a": [(0, 0, 8)], "b": [(0, 8, 8)], "c": [(1, 0, 8)]}, {"o": (1, 8, 5), "p": (1, 13, 5)}, 2)
    index = dataclasses.replace(index, chunk_digest=words(1, 2, 0), object_digest=words(7, 8))
    wanted = contents(["a", "b", "c"], [8, 8, 8], words(1, 3, 0), {"p": (5, 8), "o": (6, 7), "q": (5, 7)})
    pairs = common_regions(stored_regions(index, ["a", "b", "c"]), stored_regions(index, ["a", "b", "c"]))
    found = find_unchanged(wanted, pairs, index, ["o", "p"])
    assert found.chunk.tolist() == [0, -1, -1]
    assert found.object.tolist() == [1, -1, -1]
    plain = dataclasses.replace(index, chunk_digest=None, object_digest=None)
    assert find_unchanged(wanted, pairs, plain, ["o", "p"]).chunk.tolist() == [-1, -1, -1]


def test_a_place_is_used_for_one_chunk_alone() -> None:
    index = index_of({"a": [(0, 0, 8)], "b": [(0, 0, 8)]}, {}, 1)
    index = dataclasses.replace(index, chunk_digest=words(1, 1))
    pairs = ints(0, 1), ints(0, 1)
    found = find_unchanged(contents(["a", "b"], [8, 8], words(1, 1), {}), pairs, index, [])
    assert sorted(found.chunk.tolist()) == [-1, 0]


def test_changing_always_means_another_head_than_in_a_file_of_the_last_step() -> None:
    index = index_of({key: [(number % 2, 0, 8)] for number, key in enumerate("abcdef")}, {}, 2)
    index = dataclasses.replace(index, chunk_head=words(1, 1, 1, 1, 0, 0, width=1))
    pairs = np.arange(6), np.arange(6)
    heads = words(1, 1, 2, 2, 2, 0, width=1)
    recent = np.array([True, False])
    assert always_changing(heads, pairs, index, recent).tolist() == [False, False, True, False, False, False]
    assert not always_changing(heads, pairs, dataclasses.replace(index, chunk_head=None), recent).any()


HEADER = 4096


@pytest.mark.parametrize(
    ("unchanged", "least_live", "worth"),
    [
        ([0, 1, 2], 0.5, [True, True]),
        ([0, -1, 2], 0.5, [True, True]),
        ([0, -1, 2], 0.6, [False, True]),
        ([-1, 1, -1], 0.3, [True, False]),
        ([-1, -1, -1], 0.01, [False, False]),
    ],
)
def test_files_of_which_enough_is_wanted_are_used_again(unchanged: list[int], least_live: float, worth: list[bool]) -> None:
    index = index_of({"a": [(0, HEADER, 1000)], "b": [(0, HEADER + 1000, 1000)], "c": [(1, HEADER, 2000)]}, {}, 2)
    sizes = ints(HEADER + 2000, HEADER + 2000)
    wanted = contents(["a", "b", "c"], [1000, 1000, 2000], words(1, 2, 3), {})
    found = choose_files(
        Unchanged(ints(*unchanged), ints()), index, sizes, wanted, least_live=least_live, max_file_bytes=1 << 30
    )
    assert found.worth.tolist() == worth
    assert (found.live <= found.total).all()


def test_small_files_are_gathered_unless_all_files_are_small() -> None:
    index = index_of({"a": [(0, HEADER, 100)], "b": [(1, HEADER, 9900)]}, {}, 2)
    sizes = ints(HEADER + 100, HEADER + 9900)
    unchanged = Unchanged(ints(0, 1), ints())

    def worth(ranks: int, max_file_bytes: int) -> list[bool]:
        wanted = contents(["a", "b"], [100, 9900], words(1, 2), {}, ranks)
        found = choose_files(unchanged, index, sizes, wanted, least_live=0.5, max_file_bytes=max_file_bytes)
        return [bool(one) for one in found.worth]

    assert worth(1, 1 << 30) == [False, True]
    assert worth(4, 1 << 30) == [True, True]
    assert worth(1, 400) == [True, True]


def test_states_say_what_is_written_and_what_is_not() -> None:
    linked = np.array([True, False])
    assert states_of(ints(-1, 0, 1), ints(0, 1), linked).tolist() == [CHANGED, REUSED, SETTLED]
