"""Boxes that partition a tensor are told from boxes that only add up to its size."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from giantstep.shards.partition import axes_of, partitioned, products

Box = tuple[tuple[int, ...], tuple[int, ...]]
INSIDE = st.integers(0, 4).flatmap(lambda low: st.tuples(st.just(low), st.integers(1, 5 - low)))


def told(tensors: list[tuple[tuple[int, ...], list[Box]]]) -> list[bool]:
    """What `partitioned` says of tensors, each a shape and its boxes."""
    boxes = [box for _, found in tensors for box in found]
    columns = [
        [len(found) for _, found in tensors],
        [len(shape) for shape, _ in tensors],
        [part for shape, _ in tensors for part in shape],
        [part for offset, _ in boxes for part in offset],
        [part for _, size in boxes for part in size],
    ]
    return partitioned(*(np.array(column, dtype=np.int64) for column in columns)).tolist()


def counted(shape: tuple[int, ...], boxes: list[Box]) -> bool:
    """The same by counting elements."""
    held = np.zeros(shape, dtype=int)
    for offset, size in boxes:
        held[tuple(slice(low, low + count) for low, count in zip(offset, size, strict=True))] += 1
    return bool((held == 1).all())


def test_ragged_products_and_axes() -> None:
    counts = np.array([2, 0, 3, 0])
    assert products(np.array([2, 3, 4, 5, 6]), counts).tolist() == [6, 1, 120, 1]
    assert axes_of(counts).tolist() == [0, 1, 0, 1, 2]


def test_grids_are_partitions_and_anything_else_is_not() -> None:
    rows = [((low, 0), (2, 3)) for low in (0, 2, 4)]
    tensors: list[tuple[tuple[int, ...], list[Box]]] = [
        ((6, 3), rows),
        ((6, 3), rows[:2]),
        ((), [((), ())]),
        ((), []),
        ((6, 3), [rows[0], rows[1], rows[1]]),
        ((0, 3), []),
        ((2**61, 1), [((0, 0), (2**60, 1)), ((2**60, 0), (2**60, 1))]),
        ((4,), [((0,), (2,)), ((0,), (2,))]),
    ]
    assert told(tensors) == [True, False, True, False, False, True, True, False]


@given(st.lists(st.lists(st.tuples(INSIDE, INSIDE), max_size=4), min_size=1, max_size=4))
def test_any_boxes_are_told_as_counting_tells(tensors: list[list[tuple[tuple[int, int], tuple[int, int]]]]) -> None:
    found = [[((a, b), (m, n)) for (a, m), (b, n) in boxes] for boxes in tensors]
    assert told([((5, 5), boxes) for boxes in found]) == [counted((5, 5), boxes) for boxes in found]


@given(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=3), st.data())
def test_a_grid_is_one_until_a_box_is_moved_doubled_or_lost(cuts: list[list[int]], data: st.DataObject) -> None:
    bounds = [sorted({0, 5, *inner}) for inner in cuts]
    spans = [[(low, high - low) for low, high in itertools.pairwise(bound)] for bound in bounds]
    shape = (5,) * len(cuts)
    grid: list[Box] = [(tuple(low for low, _ in box), tuple(count for _, count in box)) for box in itertools.product(*spans)]
    assert sum(math.prod(size) for _, size in grid) == 5 ** len(cuts)
    spoiled = [*grid]
    place = data.draw(st.integers(0, len(grid) - 1))
    spoiled[place] = data.draw(st.sampled_from(grid))
    assert told([(shape, grid), (shape, grid[1:]), (shape, [*grid, grid[0]])]) == [True, False, False]
    assert told([(shape, spoiled)]) == [spoiled[place] == grid[place]]
