"""Flat ranges as boxes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from giantstep.errors import BadArgumentError
from giantstep.shards.flat import flat_range_to_regions


@given(
    st.lists(st.integers(0, 5), max_size=5).flatmap(
        lambda shape: st.tuples(st.just(tuple(shape)), st.integers(0, math.prod(shape)), st.integers(0, math.prod(shape)))
    )
)
def test_boxes_hold_the_range_in_order_and_are_at_most_2n_minus_1(drawn: tuple[tuple[int, ...], int, int]) -> None:
    shape, a, b = drawn
    start, stop = min(a, b), max(a, b)
    flat = np.arange(math.prod(shape)).reshape(shape)
    boxes = flat_range_to_regions(shape, start, stop)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    joined: list[int] = []
    for position, box in boxes:
        assert position == start + len(joined)
        joined += flat[box.slices()].reshape(-1).tolist()
    assert joined == list(range(start, stop))


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 7)])
def test_ranges_outside_the_tensor(start: int, stop: int) -> None:
    with pytest.raises(BadArgumentError, match="does not lie in a tensor of shape"):
        flat_range_to_regions((2, 3), start, stop)
