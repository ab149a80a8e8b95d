"""Region algebra against brute force over elements."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from giantstep.errors import BadArgumentError
from giantstep.shards import region as module
from giantstep.shards.region import (
    Region,
    check_shape,
    overlapping_pair,
    padded_to_ragged,
    ragged_to_padded,
    split_region,
    subtract,
)
from layouts import partitions, regions

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def mask(shape: tuple[int, ...], *boxes: Region) -> np.ndarray:
    counts = np.zeros(shape, dtype=int)
    for box in boxes:
        counts[box.slices()] += 1
    return counts


@given(SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), regions(shape), regions(shape))))
def test_intersection_and_subtraction_are_those_of_sets(drawn: tuple[tuple[int, ...], Region, Region]) -> None:
    shape, a, b = drawn
    both = a.intersect(b)
    assert (mask(shape, both) == mask(shape, a) * mask(shape, b)).all()
    parts = subtract(a, b)
    assert all(part.elements for part in parts)
    assert (mask(shape, *parts) == mask(shape, a) * (1 - mask(shape, b))).all()


@given(SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), regions(shape))), st.integers(1, 40))
def test_split_parts_partition_in_row_major_order_within_the_limit(drawn: tuple[tuple[int, ...], Region], limit: int) -> None:
    shape, region = drawn
    parts = list(split_region(region, limit))
    assert (mask(shape, *parts) == mask(shape, region)).all()
    assert all(0 < part.elements <= limit for part in parts)
    flat = np.arange(math.prod(shape)).reshape(shape)
    joined = [value for part in parts for value in flat[part.slices()].reshape(-1).tolist()]
    assert joined == flat[region.slices()].reshape(-1).tolist()


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 2), regions((5, 4, 3))), max_size=12))
def test_an_overlap_is_found_exactly_when_there_is_one(rows: list[tuple[int, Region]]) -> None:
    tensors = np.array([tensor for tensor, _ in rows], dtype=np.int64)
    offset = np.array([region.offset for _, region in rows], dtype=np.int64).reshape(len(rows), 3)
    size = np.array([region.size for _, region in rows], dtype=np.int64).reshape(len(rows), 3)
    expected = {
        (i, j) for i, (s, a) in enumerate(rows) for j, (t, b) in enumerate(rows) if i < j and s == t and a.intersect(b).elements
    }
    found = overlapping_pair(tensors, offset, size)
    assert (found is None) == (not expected)
    if found is not None:
        assert tuple(sorted(found)) in expected


@given(partitions((6, 5, 4), max_parts=12))
def test_a_partition_has_no_overlap(parts: list[Region]) -> None:
    offset = np.array([part.offset for part in parts], dtype=np.int64)
    size = np.array([part.size for part in parts], dtype=np.int64)
    assert overlapping_pair(np.zeros(len(parts), dtype=np.int64), offset, size) is None


def test_overlaps_are_sought_in_bounded_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAIRS_PER_BATCH", 3)
    offset = np.array([[n, 0] for n in range(20)] + [[19, 1]], dtype=np.int64)
    size = np.full((21, 2), 2, dtype=np.int64)
    size[:, 0] = 1
    found = overlapping_pair(np.zeros(21, dtype=np.int64), offset, size)
    assert found is not None
    assert sorted(found) == [19, 20]


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=6))
def test_padding_and_its_inverse(rows: list[list[int]]) -> None:
    dims = np.array([len(row) for row in rows], dtype=np.int64)
    values = np.array([value for row in rows for value in row], dtype=np.int64)
    table = ragged_to_padded(values, np.cumsum(dims) - dims, dims, 7, 4)
    assert table.tolist() == [[7] * (4 - len(row)) + row for row in rows]
    assert padded_to_ragged(table, dims).tolist() == values.tolist()


@pytest.mark.parametrize("shape", [(-1,), (1 << 40, 1 << 40), (1,) * 65])
def test_shapes_that_cannot_be(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadArgumentError, match="tensor 'w' cannot have shape"):
        check_shape(shape, "tensor 'w'")


@pytest.mark.parametrize(("offset", "size"), [((0,), (1, 2)), ((-1,), (1,)), ((0,), (-1,))])
def test_regions_that_cannot_be(offset: tuple[int, ...], size: tuple[int, ...]) -> None:
    with pytest.raises(BadArgumentError):
        Region(offset, size)


def test_text_of_a_region() -> None:
    assert str(Region((0, 4), (2, 3))) == "[0:2,4:7]"
    assert str(Region((), ())) == "[]"
