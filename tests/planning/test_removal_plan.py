"""What is copied and which files stay when tensors are removed; tied tensors share extents."""

from __future__ import annotations

import numpy as np

from giantstep.planning.removal_plan import NewPlaces, entry_of, index_after, plan_removal
from handmade import index_of


def stays(*values: int) -> np.ndarray:
    return np.array(values, dtype=bool)


def test_files_stay_go_or_are_copied_from() -> None:
    index = index_of({"a": [(0, 0, 8), (1, 0, 8)], "b": [(1, 8, 4), (2, 0, 4)]}, {"o": (3, 0, 5)}, 4)
    plan = plan_removal(index, stays(1, 0), stays(1), 4)
    assert plan.file_stays.tolist() == [True, False, False, True]
    copied = plan.copied
    assert [(plan.extents.file[n], plan.extents.start[n], plan.extents.bytes[n]) for n in copied] == [(1, 0, 8)]
    entry, alignment = entry_of(index, ["a", "b"], ["o"], int(plan.extents.row[copied[0]]))
    assert (entry.name, entry.bytes, alignment) == ("a[8:16]", 8, 1)


def test_a_file_that_nothing_names_goes() -> None:
    plan = plan_removal(index_of({"a": [(0, 0, 8)], "b": []}, {}, 2), stays(1, 0), stays(), 2)
    assert plan.file_stays.tolist() == [True, False]
    assert plan.copied.tolist() == []


def test_bytes_that_a_kept_tensor_shares_with_a_removed_one_stay_and_are_copied_once() -> None:
    index = index_of({"a": [(0, 0, 8)], "b": [(0, 0, 8)], "c": [(0, 0, 8)], "d": [(0, 8, 8)]}, {}, 1)
    plan = plan_removal(index, stays(0, 1, 1, 0), stays(), 1)
    assert len(plan.copied) == 1
    entry, _ = entry_of(index, ["a", "b", "c", "d"], [], int(plan.extents.row[plan.copied[0]]))
    assert entry.name == "b[0:8]"
    places = NewPlaces(np.zeros(2, dtype=np.int64), np.array([4096, -1]), np.array([1]), np.array([7], dtype=np.uint64))
    after = index_after(index, plan, places)
    assert after.chunk_start.tolist() == [4096, 4096]
    assert after.tensor_key_bytes.tobytes() == b"bc"
    assert after.block_checksum.tolist() == [7]


def test_a_file_whose_bytes_are_all_shared_with_kept_tensors_is_not_touched() -> None:
    index = index_of({"a": [(0, 0, 8)], "b": [(0, 0, 8)]}, {}, 1)
    plan = plan_removal(index, stays(0, 1), stays(), 1)
    assert plan.file_stays.tolist() == [True]
    assert len(plan.copied) == 0


def test_index_after_a_removal_keeps_order_and_coordinates() -> None:
    chunks = {"a": [(0, 0, 3)], "b": [(0, 3, 2), (0, 5, 4)], "c": [], "d": [(0, 9, 1)]}
    index = index_of(chunks, {"o": (0, 10, 2), "p": (0, 12, 3)}, 1)
    plan = plan_removal(index, stays(0, 1, 1, 1), stays(0, 1), 1)
    places = NewPlaces(plan.extents.file, plan.extents.start + 100, np.array([1]), np.array([9], dtype=np.uint64))
    after = index_after(index, plan, places)
    assert after.tensor_key_bytes.tobytes() == b"bcd"
    assert after.tensor_chunk_ends.tolist() == [0, 2, 2, 3]
    assert after.tensor_dims.tolist() == [6, 0, 1]
    assert after.chunk_start.tolist() == [103, 105, 109]
    assert after.chunk_offset.tolist() == [0, 2, 0]
    assert after.chunk_size.tolist() == [2, 4, 1]
    assert (after.object_key_bytes.tobytes(), after.object_start.tolist(), after.object_bytes.tolist()) == (b"p", [112], [3])
