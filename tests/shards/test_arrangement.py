"""Arrangements: boxes of a local tensor and of flat ranges of it, against every element by itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from giantstep.errors import BadArgumentError
from giantstep.shards.arrangement import Arrangement, Axis, Run


@st.composite
def axes(draw: st.DrawFn, *, tensors: int = 1) -> Axis:
    """Runs in any order, neighbours among them, some empty; of one or several global tensors."""
    lengths = tuple(draw(st.integers(1, 6)) for _ in range(tensors))
    runs = []
    for _ in range(draw(st.integers(0, 4))):
        tensor = draw(st.integers(0, tensors - 1))
        start = draw(st.integers(0, lengths[tensor] - 1))
        runs.append(Run(start, draw(st.integers(0, lengths[tensor] - start)), tensor))
    return Axis(tuple(runs), lengths, tuple(f"t{n}" for n in range(tensors)) if tensors > 1 else ("",))


@st.composite
def arrangements(draw: st.DrawFn) -> tuple[Arrangement, list[list[tuple[int, int]]]]:
    """An arrangement, and per stored axis the (tensor, index) of each local index."""
    dims = draw(st.integers(1, 3))
    several = draw(st.integers(0, dims))
    found = [draw(axes(tensors=draw(st.integers(2, 3)) if n == several else 1)) for n in range(dims)]
    order = draw(st.permutations(range(dims)))
    memory = [0] * dims
    for axis, place in zip(found, order, strict=True):
        memory[place] = axis.local_length
    places = [[(run.tensor, run.start + n) for run in axis.runs for n in range(run.count)] for axis in found]
    return Arrangement((math.prod(memory),), tuple(memory), tuple(order), tuple(found)), places


@settings(max_examples=400, deadline=None)
@given(arrangements(), st.data())
def test_each_element_of_a_flat_range_lies_in_one_box_at_its_place(
    case: tuple[Arrangement, list[list[tuple[int, int]]]], data: st.DataObject
) -> None:
    arrangement, places = case
    total = math.prod(arrangement.memory_shape)
    bounds = sorted(data.draw(st.tuples(st.integers(0, total), st.integers(0, total))))
    flat = data.draw(st.sampled_from([None, slice(*bounds)]))
    numbers = np.arange(total).reshape(arrangement.memory_shape)
    met: dict[int, tuple[int, tuple[int, ...]]] = {}
    for box in arrangement.memory_boxes(flat):
        memory = np.arange(box.position, box.position + math.prod(box.size)).reshape(box.size).transpose(arrangement.order)
        for placed, slices in box.held:
            part = memory[slices]
            assert part.shape == placed.local.size
            for index in np.ndindex(part.shape):
                assert int(part[index]) not in met
                there = tuple(a + b for a, b in zip(placed.offset, index, strict=True))
                met[int(part[index])] = (placed.tensor, there)
    stored = numbers.transpose(arrangement.order)
    wanted = range(total) if flat is None else range(flat.start, flat.stop)
    assert sorted(met) == list(wanted)
    for index in np.ndindex(stored.shape):
        if int(stored[index]) in met:
            chosen = [axis[n] for axis, n in zip(places, index, strict=True)]
            assert met[int(stored[index])] == (sum(tensor for tensor, _ in chosen), tuple(place for _, place in chosen))


def test_neighbouring_runs_are_one() -> None:
    axis = Axis((Run(0, 2), Run(2, 0), Run(2, 3), Run(5, 1, 1), Run(6, 1, 1, 1), Run(7, 1, 1, 1)), (9, 9), ("a", "b"))
    assert axis.runs == (Run(0, 5), Run(5, 1, 1), Run(6, 2, 1, 1))
    assert axis.local_length == 8


def test_axes_and_shapes_that_do_not_fit_are_refused() -> None:
    whole = Axis.whole(4)
    with pytest.raises(BadArgumentError, match=r"shape \(8,\) is to be stored as one of shape \(4,\)"):
        Arrangement((8,), (4,), (0,), (whole,))
    with pytest.raises(BadArgumentError, match=r"its axes describe \(4,\)"):
        Arrangement((8,), (8,), (0,), (whole,))
