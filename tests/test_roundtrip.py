"""Save under any layout, load under any other: every bit is where it belongs."""

from __future__ import annotations

import itertools
import tempfile
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import giantstep as gs
from giantstep.storage.memory import MemoryStore
from giantstep.testing.ranks import run_ranks
from independent_reader import StoredCheckpoint
from layouts import Case, bits, cases, cut, strided, zeros_like

_NAMES = itertools.count()


def examples(count: int) -> Any:
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


def save_all(tensors: list[Case], ranks: int, path: Any, options: gs.SaveOptions | None = None) -> None:
    def rank(group: Any) -> None:
        state: dict[str, Any] = {}
        for case in tensors:
            for number, shard in enumerate(case.saved):
                if shard.rank == group.rank:
                    data = strided(cut(case.value(), shard.region), shard.stride_kind)
                    state[f"{case.key}/{number}"] = case.sharded(shard, data)
        gs.save(state, path, process_group=group, options=options)

    run_ranks(ranks, rank)


def load_and_compare(tensors: list[Case], ranks: int, path: Any, options: gs.LoadOptions | None = None) -> None:
    def rank(group: Any) -> None:
        state: dict[str, Any] = {}
        expected: dict[str, torch.Tensor] = {}
        for case in tensors:
            for number, shard in enumerate(case.loaded):
                if shard.rank == group.rank:
                    place = f"{case.key}/{number}"
                    expected[place] = cut(case.value(), shard.region)
                    # Two thirds are filled in place, through all kinds of strides; the others are allocated.
                    empty = strided(zeros_like(expected[place]), shard.stride_kind)
                    state[place] = case.sharded(shard, empty if (case.seed + number) % 3 else None)
        loaded = gs.load(state, path, process_group=group, options=options)
        for place, value in expected.items():
            if bits(loaded[place]) != bits(value):
                raise AssertionError(f"{place}: {loaded[place]} is not {value}")
            if state[place].data is not None and loaded[place] is not state[place].data:
                raise AssertionError(f"{place} was not filled in place")

    run_ranks(ranks, rank)


def compare_with_independent(tensors: list[Case], stored: StoredCheckpoint) -> None:
    assert sorted(stored.tensors) == sorted(case.key for case in tensors)
    for case in tensors:
        found = stored.tensors[case.key]
        assert found.shape == case.shape
        assert found.data.tobytes() == bits(case.value())


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[list[Case], int, int]:
    saving, loading = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    keys = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4, unique=True))
    return [draw(cases(key, saving, loading)) for key in keys], saving, loading


@examples(200)
@given(checkpoints(), st.sampled_from([4096, 256 * 1024]))
def test_any_layout_loads_under_any_other_to_the_bit(
    committed: list[StoredCheckpoint], drawn: tuple[list[Case], int, int], block_bytes: int
) -> None:
    tensors, saving, loading = drawn
    store = MemoryStore(f"roundtrip-{next(_NAMES)}")
    try:
        options = gs.SaveOptions(block_bytes=block_bytes, buffer_bytes=block_bytes * 2, split_bytes=16)
        save_all(tensors, saving, store, options)
        compare_with_independent(tensors, committed[-1])
        load_and_compare(tensors, loading, store)
    finally:
        store.clear()


@examples(25)
@given(checkpoints())
def test_any_layout_loads_under_any_other_from_a_directory(drawn: tuple[list[Case], int, int]) -> None:
    tensors, saving, loading = drawn
    with tempfile.TemporaryDirectory() as folder:
        save_all(tensors, saving, folder)
        load_and_compare(tensors, loading, folder, gs.LoadOptions(verify="before"))
        checkpoint = gs.open_checkpoint(folder)
        for case in tensors:
            assert checkpoint[case.key][...].tobytes() == bits(case.value())
        assert checkpoint.verify().ok


@pytest.mark.parametrize("split_bytes", [1, 1 << 40])
@pytest.mark.parametrize(("rows", "columns"), [(4096, 512), (3, 700_001)])
def test_tensors_larger_than_buffers_and_files_are_divided_and_come_back(
    tmp_path: Any, committed: list[StoredCheckpoint], rows: int, columns: int, split_bytes: int
) -> None:
    """Chunks are cut at max_file_bytes, streamed through small buffers, and read column-wise in pieces."""
    value = torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)

    def saving(group: Any) -> None:
        options = gs.SaveOptions(max_file_bytes=1 << 20, block_bytes=4096, buffer_bytes=64 << 10, split_bytes=split_bytes)
        gs.save({"w": value.clone()}, tmp_path, process_group=group, options=options)

    run_ranks(3, saving)
    record = committed[-1].record
    assert len(record["files"]) >= 8
    assert max(file["bytes"] for file in record["files"]) <= 1 << 20
    by_rank = [sum(f["bytes"] for f in record["files"] if f["rank"] == rank) for rank in range(3)]
    if split_bytes == 1:
        assert max(by_rank) <= 1.05 * sum(by_rank) / 3 or rows == 3

    def loading(group: Any) -> None:
        width = columns // 2 + 1
        start = group.rank * (columns - width)
        part = gs.ShardedTensor("w", torch.zeros(rows, width), value.dtype, (rows, width), (rows, columns), (0, start), None)
        loaded = gs.load({"w": part}, tmp_path, process_group=group, options=gs.LoadOptions(buffer_bytes=64 << 10))
        if not torch.equal(loaded["w"], value[:, start : start + width]):
            raise AssertionError("columns differ")

    run_ranks(2, loading)


def test_flattened_shards_of_ragged_length_load_as_boxes_and_back(tmp_path: Any) -> None:
    """A ZeRO-like flat range per rank, empty ones included; loaded as rows, and from rows as other flat ranges."""
    value = torch.arange(4 * 6 * 5, dtype=torch.int32).reshape(4, 6, 5)
    cuts = [0, 7, 7, 61, 120]

    def flat(group: Any, bounds: list[int], fill: bool) -> gs.ShardedTensor:
        low, high = bounds[group.rank], bounds[group.rank + 1]
        data = value.reshape(-1)[low:high].clone()
        return gs.ShardedTensor.from_rank_offsets_flat(
            "w", data if fill else torch.zeros_like(data), (4, 6, 5), flattened_range=slice(low, high)
        )

    run_ranks(4, lambda group: gs.save({"w": flat(group, cuts, True)}, tmp_path / "a", process_group=group))
    loaded = gs.load({"w": torch.zeros_like(value)}, tmp_path / "a")
    assert torch.equal(loaded["w"], value)

    def rows(group: Any) -> None:
        part = gs.ShardedTensor.from_rank_offsets("w", value[group.rank * 2 : group.rank * 2 + 2], (0, group.rank, 2))
        gs.save({"w": part}, tmp_path / "b", process_group=group)

    run_ranks(2, rows)
    bounds = [0, 50, 51, 120]

    def check(group: Any) -> None:
        found = gs.load({"w": flat(group, bounds, False)}, tmp_path / "b", process_group=group)["w"]
        if not torch.equal(found, value.reshape(-1)[bounds[group.rank] : bounds[group.rank + 1]]):
            raise AssertionError(found)

    run_ranks(3, check)
