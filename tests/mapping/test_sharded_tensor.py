"""`ShardedTensor`: narrowing, replica ids, and any flat range of any shard."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import giantstep as gs
from giantstep.errors import BadArgumentError, CoverageError
from giantstep.mapping.replica import is_main_replica
from giantstep.testing.ranks import run_ranks, run_ranks_collecting


def test_offsets_shapes_and_grid_are_those_of_megatron() -> None:
    data = torch.zeros(1, 3, 7, 9)
    tensor = gs.ShardedTensor.from_rank_offsets("keyA", data, (0, 0, 10), (2, 3, 6))
    assert (tensor.dtype, tensor.local_shape, tensor.global_shape) == (torch.float32, (1, 3, 7, 9), (10, 3, 42, 9))
    assert (tensor.global_offset, tensor.axis_fragmentations) == ((0, 0, 21, 0), (10, 1, 6, 1))
    (narrow,) = tensor.narrow(1, 1, 2)
    assert (narrow.local_shape, narrow.global_shape, narrow.global_offset) == ((1, 2, 7, 9), (10, 2, 42, 9), (0, 0, 21, 0))
    (narrow,) = tensor.narrow(2, 3, 2)
    assert (narrow.local_shape, narrow.global_shape, narrow.global_offset) == ((1, 3, 2, 9), (10, 3, 12, 9), (0, 0, 6, 0))
    assert narrow.data is not None
    assert narrow.data.data_ptr() == data[:, :, 3:].data_ptr()


def test_which_replica_ids_are_main() -> None:
    assert all(map(is_main_replica, (0, (0,), (0, 0), ())))
    assert not any(map(is_main_replica, (1, 2, (1,), (1, 0), (0, 1), (1, 1, 1))))


@pytest.mark.parametrize(("dim", "start", "length"), [(4, 0, 1), (-1, 0, 1), (2, 0, 8), (2, 7, 1), (2, -1, 2), (2, 3, -1)])
def test_a_range_that_does_not_lie_in_the_shard(dim: int, start: int, length: int) -> None:
    with pytest.raises(BadArgumentError, match="narrow"):
        gs.ShardedTensor.from_rank_offsets("k", torch.zeros(1, 3, 7, 9)).narrow(dim, start, length)


def test_shards_that_do_not_tile_cannot_be_narrowed() -> None:
    odd = gs.ShardedTensor("k", torch.zeros(3), torch.float32, (3,), (7,), (4,), None)
    with pytest.raises(BadArgumentError, match="do not tile"):
        odd.narrow(0, 0, 1)
    with pytest.raises(BadArgumentError, match="do not tile"):
        gs.ShardedTensor("k", torch.zeros(0), torch.float32, (0,), (7,), (0,), None).narrow(0, 0, 0)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_halves_of_a_fused_weight_are_tensors_of_their_own(tmp_path: Any, ranks: int) -> None:
    whole = torch.arange(12.0 * 4).reshape(12, 4)

    def halves(group: Any, data: torch.Tensor) -> dict[str, gs.ShardedTensor]:
        fused = gs.ShardedTensor.from_rank_offsets("w", data, (0, group.rank, group.size))
        rows = 12 // group.size
        return {name: replace(fused.narrow(0, n * rows // 2, rows // 2)[0], key=name) for n, name in enumerate(("gate", "up"))}

    def save(group: Any) -> None:
        gs.save(halves(group, whole.chunk(group.size)[group.rank]), tmp_path, process_group=group)

    run_ranks(ranks, save)
    stored = gs.metadata.load_plain_tensors(tmp_path)
    parts = [part.chunk(2) for part in whole.chunk(ranks)]
    assert torch.equal(stored["gate"], torch.cat([gate for gate, _ in parts]))
    assert torch.equal(stored["up"], torch.cat([up for _, up in parts]))


@given(st.data())
def test_a_flat_shard_narrows_as_the_shard_it_is_a_range_of(data: st.DataObject) -> None:
    shape = (1, data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4)))
    total = shape[1] * shape[2]
    low = data.draw(st.integers(0, total))
    high = data.draw(st.integers(low, total))
    start = data.draw(st.integers(0, shape[1]))
    length = data.draw(st.integers(0, shape[1] - start))
    whole = torch.arange(total).reshape(shape)
    flat = gs.ShardedTensor.from_rank_offsets_flat("k", whole.reshape(-1)[low:high], shape, flattened_range=slice(low, high))
    (narrow,) = flat.narrow(1, start, length)
    assert narrow.local_shape == (1, length, shape[2])
    assert narrow.data is not None
    assert narrow.flattened_range is not None
    inner = whole[:, start : start + length].reshape(-1)
    assert torch.equal(inner[narrow.flattened_range], narrow.data)
    # Nothing that both hold is lost.
    held = set(whole.reshape(-1)[low:high].tolist()) & set(inner.tolist())
    assert set(narrow.data.tolist()) == held


def test_a_flat_shard_does_not_narrow_along_an_inner_axis() -> None:
    flat = gs.ShardedTensor.from_rank_offsets_flat("k", torch.zeros(3), (2, 3), flattened_range=slice(1, 4))
    with pytest.raises(BadArgumentError, match="first axis longer than 1"):
        flat.narrow(1, 0, 1)


SHAPE = (4, 6)


def flat_state(rank: int, ranges: dict[int, list[tuple[int, int]]], tp: int) -> dict[str, Any]:
    """Rank `rank` of `tp` columns x data-parallel ranks: flat ranges of its column's shard."""
    column, replica = rank % tp, rank // tp
    local = torch.arange(24.0).reshape(SHAPE).chunk(tp, dim=1)[column].contiguous()
    return {
        str(n): gs.ShardedTensor.from_rank_offsets_flat(
            "w", local.reshape(-1)[low:high], tuple(local.shape), (1, column, tp), flattened_range=slice(low, high)
        )
        for n, (low, high) in enumerate(ranges.get(replica, []))
    }


@pytest.mark.parametrize(
    ("ranges", "told"),
    [
        ({0: [(0, 5)], 1: [(7, 12)]}, "elements 5:7 are held by no rank"),
        ({0: [(0, 5)], 1: [(5, 11)]}, "elements 11:12 are held by no rank"),
        ({0: [(2, 12)]}, "elements 0:2 are held by no rank"),
        ({0: [(0, 7)], 1: [(5, 12)]}, "elements 5:7 by ranks 0 and 2"),
        ({0: [(0, 12)], 1: [(5, 6)]}, "elements 5:6 by ranks 0 and 2"),
        ({0: [(0, 12)], 1: [(0, 12)]}, "elements 0:12 by ranks 0 and 2"),
        ({0: [(0, 4), (3, 12)]}, "elements 3:4 by ranks 0 and 0"),
    ],
)
def test_a_flat_range_that_is_missing_or_doubled_is_named(tmp_path: Any, ranges: Any, told: str) -> None:
    def save(group: Any) -> None:
        gs.save(flat_state(group.rank, ranges, tp=2), tmp_path, process_group=group)

    _, errors = run_ranks_collecting(4, save)
    assert {type(error) for error in errors} == {CoverageError}
    assert len({str(error) for error in errors}) == 1
    assert f"Flat ranges of tensor 'w': of the flattened shard [0:4,0:3] (12 elements), {told}" in str(errors[0])
    assert "of the flattened shard [0:4,3:6]" in str(errors[3])
    assert not list(tmp_path.iterdir())


def test_gaps_between_shards_that_are_not_flattened_say_nothing_of_flat_ranges(tmp_path: Any) -> None:
    with pytest.raises(CoverageError) as caught:
        gs.save({"w": gs.ShardedTensor("w", torch.zeros(2), torch.float32, (2,), (3,), (0,), None)}, tmp_path)
    assert "Flat" not in str(caught.value)


@st.composite
def zero_layouts(draw: st.DrawFn) -> tuple[int, int, int, list[list[int]]]:
    """Tensor parallel x pipeline x data parallel sizes, and per tensor-parallel shard where ranks' ranges are cut."""
    tp, pp, dp = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2])), draw(st.integers(1, 3))
    cuts = [sorted(draw(st.lists(st.integers(0, 24 // tp), min_size=dp - 1, max_size=dp - 1))) for _ in range(tp)]
    return tp, pp, dp, cuts


def layer_state(rank: int, layout: tuple[int, int, int, list[list[int]]], fill: bool, flat: bool) -> dict[str, Any]:
    """Two layers over pipeline stages, columns over tensor-parallel ranks, ranges of them over data-parallel ranks."""
    tp, pp, _, cuts = layout
    column, stage, replica = rank % tp, rank // tp % pp, rank // (tp * pp)
    state: dict[str, Any] = {}
    for layer in range(stage, 2, pp):
        whole = (100.0 * layer + torch.arange(24.0)).reshape(SHAPE)
        local = (whole if fill else torch.full(SHAPE, -1.0)).chunk(tp, dim=1)[column].contiguous()
        key = f"layer{layer}"
        if flat:
            edges = [0, *cuts[column], local.numel()]
            low, high = edges[replica], edges[replica + 1]
            state[key] = gs.ShardedTensor.from_rank_offsets_flat(
                key, local.reshape(-1)[low:high], tuple(local.shape), (1, column, tp), flattened_range=slice(low, high)
            )
        else:
            state[key] = gs.ShardedTensor.from_rank_offsets(key, local, (1, column, tp), replica_id=replica)
    return state


@settings(max_examples=60, deadline=None)
@given(zero_layouts(), zero_layouts(), st.booleans(), st.booleans())
def test_flat_ranges_load_under_any_other_layout_flat_or_not(
    saved: Any, loaded: Any, saved_flat: bool, loaded_flat: bool
) -> None:
    path = f"memory://flat-{id(saved)}-{id(loaded)}"

    def save(group: Any) -> None:
        gs.save(layer_state(group.rank, saved, fill=True, flat=saved_flat), path, process_group=group)

    def load(group: Any) -> None:
        wanted = layer_state(group.rank, loaded, fill=False, flat=loaded_flat)
        found = gs.load(wanted, path, process_group=group)
        expected = layer_state(group.rank, loaded, fill=True, flat=loaded_flat)
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor.data), key

    run_ranks(saved[0] * saved[1] * saved[2], save)
    run_ranks(loaded[0] * loaded[1] * loaded[2], load)


@pytest.mark.parametrize(
    "change",
    [
        {"global_offset": (4, 0)},
        {"global_offset": (2.0, 0)},
        {"global_shape": (3, 3)},
        {"replica_id": -1},
        {"axis_fragmentations": (3, 1)},
        {"flattened_range": slice(0, 7)},
        {"prepend_axis_num": 1},
        {"dtype": torch.int8},
        {"key": 3},
        {"data": torch.zeros(3, 3)},
        {"data": torch.zeros(2, 3, dtype=torch.int8)},
    ],
    ids=str,
)
def test_attributes_that_change_after_it_was_made_are_seen(tmp_path: Any, change: dict[str, Any]) -> None:
    def tensor() -> gs.ShardedTensor:
        return gs.ShardedTensor.from_rank_offsets("t", torch.zeros(2, 3), (0, 0, 1))

    changed = copy.copy(tensor())
    for name, value in change.items():
        setattr(changed, name, value)
    with pytest.raises(BadArgumentError):
        gs.save({"a": tensor(), "b": changed}, tmp_path)


def test_data_that_change_their_shape_after_it_was_made_are_seen(tmp_path: Any) -> None:
    data = torch.zeros(2, 3)
    tensor = gs.ShardedTensor.from_rank_offsets("t", data)
    data.resize_(3, 2)
    with pytest.raises(BadArgumentError, match="data have shape"):
        gs.save({"t": tensor}, tmp_path)


def test_a_key_that_is_no_text_is_seen_when_it_is_made() -> None:
    with pytest.raises(BadArgumentError, match="must be a str"):
        gs.ShardedTensor(None, torch.zeros(1), torch.float32, (1,), (1,), (0,), None)  # type: ignore[arg-type]
