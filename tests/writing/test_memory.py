"""Bytes of tensors as columns of addresses."""

from __future__ import annotations

import gc
import weakref

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from giantstep.storage.buffers import address_of
from giantstep.writing.memory import Memory


@given(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 30)), max_size=12), st.data())
def test_views_are_the_bytes_of_all_pieces_one_after_another(pieces: list[tuple[int, int]], data: st.DataObject) -> None:
    held = np.arange(128, dtype=np.uint8)
    starts = np.array([start for start, _ in pieces], dtype=np.int64)
    sizes = np.array([size for _, size in pieces], dtype=np.int64)
    expected = b"".join(held[start : start + size].tobytes() for start, size in pieces)
    memory = Memory(address_of(held) + starts, sizes, held)
    assert memory.bytes == len(expected)
    if not expected:
        return
    start = data.draw(st.integers(0, len(expected) - 1))
    stop = data.draw(st.integers(start + 1, len(expected)))
    views = memory.views(start, stop)
    assert b"".join(views) == expected[start:stop]
    assert all(view.nbytes for view in views)
    assert all(view.readonly for view in views)


def test_neighbours_are_one_view() -> None:
    held = np.arange(100, dtype=np.uint8)
    begin = address_of(held)
    memory = Memory(np.array([begin + 10, begin + 20, begin + 20, begin + 30, begin + 60]), np.array([10, 0, 10, 5, 5]), held)
    assert [len(view) for view in memory.views(0, 30)] == [25, 5]
    assert [len(view) for view in memory.views(8, 26)] == [17, 1]


def test_a_stretch_that_waits_keeps_its_memory_alive() -> None:
    owner = np.arange(64, dtype=np.uint8)
    left = weakref.ref(owner)
    memory = Memory(np.array([address_of(owner)]), np.array([64]), owner)
    del owner
    gc.collect()
    assert left() is not None
    assert bytes(memory.views(3, 5)[0]) == b"\x03\x04"
    del memory
    assert left() is None
