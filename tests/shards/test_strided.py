"""Boxes of a view that lie in a range of memory, compared with looking at every element."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from giantstep.shards.strided import boxes_in_range, is_nested


@st.composite
def views(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Memory numbered by position, and a view of it: cut, stepped and transposed at will."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    memory = np.arange(int(np.prod(shape)))
    view = memory.reshape(shape)
    for axis, size in enumerate(shape):
        start = draw(st.integers(0, size))
        cut = [slice(None)] * len(shape)
        cut[axis] = slice(start, draw(st.integers(start, size)), draw(st.integers(1, 2)))
        view = view[tuple(cut)]
    return memory, view.transpose(draw(st.permutations(range(len(shape)))))


@given(views(), st.data())
def test_boxes_hold_exactly_the_elements_in_the_range(case: tuple[np.ndarray, np.ndarray], data: st.DataObject) -> None:
    memory, view = case
    start = data.draw(st.integers(0, len(memory)))
    stop = data.draw(st.integers(start, len(memory)))
    strides = [stride // memory.itemsize for stride in view.strides]
    offset = (view.__array_interface__["data"][0] - memory.__array_interface__["data"][0]) // memory.itemsize
    assert is_nested(view.shape, strides)
    seen = np.zeros(view.shape, dtype=int)
    boxes = boxes_in_range(view.shape, strides, offset, start, stop)
    for box in boxes:
        part = view[box.region.slices()]
        assert part.shape == box.region.size
        assert part.size
        assert part.flat[0] == box.position
        seen[box.region.slices()] += 1
    assert np.array_equal(seen, (view >= start) & (view < stop))
    assert len(boxes) <= max(1, 2 * view.ndim - 1)


def test_expanded_and_overlapping_views_are_not_nested() -> None:
    assert not is_nested((3, 4), (0, 1))
    assert not is_nested((3, 4), (3, 1))
    assert not is_nested((2, 2), (1, 1))
    assert is_nested((3, 4), (4, 1))
    assert is_nested((1, 4), (0, 1))
