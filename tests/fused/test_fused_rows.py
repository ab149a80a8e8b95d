"""Gate and up, and other fused weights: every rank gets its rows, whatever cut them before and cuts them now."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import giantstep as gs
from giantstep.errors import BadArgumentError, CoverageError, DisagreementError
from giantstep.fused import Axis, Cut, Fused, Gated, Run, Span, fused, fused_rows, swiglu
from giantstep.testing import check_coverage, round_trip
from giantstep.testing.ranks import run_ranks
from unsharded import flat_cuts, fused_of, numbered

FEW = settings(max_examples=30, deadline=None)


def empty_like(factory: gs.ShardedTensorFactory, *, meta: bool) -> gs.ShardedTensorFactory:
    return replace(factory, data=torch.empty_like(factory.data, device="meta") if meta else torch.zeros_like(factory.data))


@FEW
@given(
    saving=st.integers(1, 4),
    loading=st.integers(1, 4),
    copies=st.integers(1, 2),
    inner=st.sampled_from([(), (3,), (2, 2)]),
    last_axis=st.booleans(),
    meta=st.booleans(),
)
def test_gate_and_up_stay_apart_and_so_do_their_moments(
    saving: int, loading: int, copies: int, inner: tuple[int, ...], last_axis: bool, meta: bool
) -> None:
    ffn = math.lcm(saving, loading)
    axis = len(inner) if last_axis else 0
    halves = {key: [numbered(ffn, *inner, start=start).movedim(0, axis) for start in (n, n + 500)] for key, n in KEYS.items()}
    states = [described(halves, rank % saving, saving, axis, replica=rank // saving) for rank in range(saving * copies)]
    targets = [
        {key: empty_like(leaf, meta=meta) for key, leaf in described(halves, rank, loading, axis).items()}
        for rank in range(loading)
    ]
    for rank, loaded in enumerate(round_trip(states, targets)):
        for key, parts in halves.items():
            assert torch.equal(loaded[key], fused_of(parts, rank, loading, axis))
            assert meta or loaded[key] is targets[rank][key].data
    # The stored tensor is what a model without tensor parallelism has.
    whole = {key: torch.zeros_like(torch.cat(parts, dim=axis)) for key, parts in halves.items()}
    round_trip(states, [whole])
    assert all(torch.equal(whole[key], torch.cat(parts, dim=axis)) for key, parts in halves.items())


KEYS = {"mlp.weight": 1, "exp_avg.mlp.weight": 1001, "exp_avg_sq.mlp.weight": 2001}


def described(
    halves: dict[str, list[torch.Tensor]], rank: int, ranks: int, axis: int, replica: int = 0
) -> dict[str, gs.ShardedTensorFactory]:
    """The parameter's factory, and those of its moments made of it."""
    data = {key: fused_of(parts, rank, ranks, axis) for key, parts in halves.items()}
    first = swiglu("mlp.weight", data["mlp.weight"], rank, ranks, axis=axis, replica_id=replica)
    return {key: replace(first, key=key, data=tensor) for key, tensor in data.items()}


@FEW
@given(data=st.data(), saving=st.integers(1, 3), loading=st.integers(1, 3), named=st.booleans())
def test_flat_ranges_of_fused_weights_load_as_any_other_ranges(
    data: st.DataObject, saving: int, loading: int, named: bool
) -> None:
    """As optimizers hold them that shard flattened parameters: saved and filled where they lie."""
    unit = math.lcm(saving, loading)
    widths = [unit * n for n in data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4)) or [1]]
    axis = data.draw(st.integers(0, 1))
    whole = [numbered(width, 5, start=1 + 1000 * n).movedim(0, axis) for n, width in enumerate(widths)]
    names = [f"part{n}" for n in range(len(widths))] if named else None

    def states(ranks: int, *, zero: bool) -> list[dict[str, Any]]:
        found = []
        for rank in range(ranks):
            local = fused_of(whole, rank, ranks, axis)
            factory = fused_rows("w", local, widths, rank, ranks, axis=axis, names=names)
            for flat in data.draw(flat_cuts(local.numel())):
                part = local.reshape(-1)[flat].clone()
                part = torch.zeros_like(part) if zero else part
                found.append({"w": replace(factory, data=part, flattened_range=flat)})
        return found

    targets = states(loading, zero=True)
    expected = [fused_of(whole, rank, loading, axis).reshape(-1) for rank in range(loading)]
    loaded = round_trip(states(saving, zero=False), targets)
    assert torch.equal(torch.cat([state["w"] for state in loaded]), torch.cat(expected))
    assert all(state["w"] is target["w"].data for state, target in zip(loaded, targets, strict=True))


def test_a_flat_range_without_memory_is_allocated(tmp_path: Path) -> None:
    whole = numbered(4, 3)
    factory = swiglu("w", whole, 0, 1)
    gs.save({"w": factory}, tmp_path)
    hollow = replace(factory, data=torch.empty(5, device="meta"), flattened_range=slice(4, 9))
    assert torch.equal(gs.load({"w": hollow}, tmp_path)["w"], whole.reshape(-1)[4:9])


@FEW
@given(data=st.data(), saving=st.integers(1, 3), loading=st.integers(1, 3))
def test_widths_stored_under_names_are_tensors_of_their_own(data: st.DataObject, saving: int, loading: int) -> None:
    unit = math.lcm(saving, loading)
    widths = [unit * n for n in data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=4))]
    names = ["z", "x", "B", "C"][: len(widths)]
    whole = [numbered(width, 2, start=1 + 100 * n) for n, width in enumerate(widths)]

    def states(ranks: int, fill: float) -> list[dict[str, Any]]:
        parts = [fused_of(whole, rank, ranks) * fill for rank in range(ranks)]
        return [{"w": fused_rows("in", part, widths, rank, ranks, names=names)} for rank, part in enumerate(parts)]

    for rank, loaded in enumerate(round_trip(states(saving, 1), states(loading, 0))):
        assert torch.equal(loaded["w"], fused_of(whole, rank, loading))
    apart = [
        {name: gs.ShardedTensor.from_rank_offsets(f"in.{name}", part * 0) for name, part in zip(names, whole, strict=True)}
    ]
    (loaded,) = round_trip(states(saving, 1), apart)
    assert all(torch.equal(loaded[name], part) for name, part in zip(names, whole, strict=True))


def test_fused_rows_in_any_layer_of_stacked_layers(tmp_path: Path) -> None:
    layers = [numbered(8, 3, start=100 * n) for n in range(3)]

    def save(group: Any) -> None:
        # Pipeline stages of 1 and 2 layers, each 2 ranks of tensor parallelism.
        stage, tp = divmod(group.rank, 2)
        gs.save(
            {
                n: swiglu("layers.w", fused_of([*layers[n].chunk(2)], tp, 2), tp, 2, prepend=((n, 3),))
                for n in ([0], [1, 2])[stage]
            },
            tmp_path,
            process_group=group,
        )

    run_ranks(4, save)
    assert torch.equal(torch.from_numpy(gs.open_checkpoint(tmp_path)["layers.w"][...]), torch.stack(layers))
    alone = gs.ShardedTensor.from_rank_offsets("layers.w", torch.zeros(8, 3), (0, 1, 3), prepend_axis_num=1)
    assert torch.equal(gs.load({"w": alone}, tmp_path)["w"], layers[1])


def test_axes_that_are_fused_cut_and_spanned_at_once() -> None:
    whole = numbered(6, 7)

    def state(tp: int, start: int, length: int) -> dict[str, Any]:
        local = fused_of([*whole.chunk(2)], tp, 3)[:, start : start + length].clone()
        return {"w": fused("w", local, {0: Gated(tp, 3), 1: Span(start, 7)})}

    states = [state(tp, start, length) for tp in range(3) for start, length in ((0, 1), (1, 4), (5, 0), (5, 2))]
    (loaded,) = round_trip(states, [{"w": torch.zeros(6, 7)}])
    assert torch.equal(loaded["w"], whole)
    columns = [{"w": fused("w", torch.zeros(6, 1), {1: Cut(n, 7)})} for n in range(7)]
    assert torch.equal(torch.cat([found["w"] for found in round_trip(states, columns)], dim=1), whole)


class Interleaved:
    """Rows of gate and up in turns: a layout of a user's own."""

    def axis(self, length: int, what: str) -> Axis:
        assert what == "factory 'w', axis 0"
        half = length // 2
        return Axis(tuple(Run(n // 2 + half * (n % 2), 1) for n in range(length)), (length,))


def test_layouts_of_users_load_what_others_have_saved() -> None:
    gate, up = numbered(3, 2), numbered(3, 2, start=100)
    target = torch.zeros(6, 2)
    round_trip([{"w": swiglu("w", torch.cat([gate, up]), 0, 1)}], [{"w": fused("w", target, {0: Interleaved()})}])
    assert torch.equal(target, torch.stack([gate, up], dim=1).reshape(6, 2))


def test_a_fused_weight_is_snapshot_when_it_is_saved_in_the_background(tmp_path: Path) -> None:
    weight = numbered(4, 3)
    factory = fused_rows("w", weight, (2, 2), 0, 1, names=("a", "b"))
    pending = gs.async_save({"w": factory}, tmp_path)
    pending.wait_staged()
    weight.zero_()
    pending.result()
    # Of what is missing, the local values stay.
    partly = fused_rows("w", torch.full((6, 3), -1.0), (2, 2, 2), 0, 1, names=("a", "b", "c"))
    loaded = gs.load({"w": partly}, tmp_path, strict=gs.StrictHandling.IGNORE_ALL)["w"]
    assert loaded is partly.data
    assert torch.equal(loaded, torch.cat([numbered(4, 3), torch.full((2, 3), -1.0)]))


def test_saving_and_loading_in_place_copy_nothing() -> None:
    local = torch.nn.Parameter(numbered(4, 3))
    factory = swiglu("w", local, 1, 2)
    shards = factory.build()
    first, last = local.data_ptr(), local.data_ptr() + local.numel() * local.element_size()
    assert all(first <= shard.data.data_ptr() < last for shard in shards.values())
    loaded = {number: shard.data for number, shard in shards.items()}
    version = local._version
    assert factory.merge(loaded) is local
    assert local._version == version


def test_data_that_are_not_contiguous_are_cut_where_they_lie() -> None:
    whole = numbered(3, 8).t()
    factory = swiglu("w", whole, 0, 1)
    target = torch.zeros(3, 8).t()
    round_trip([{"w": factory}], [{"w": swiglu("w", target, 0, 1)}])
    assert torch.equal(target, whole)


def test_merging_what_lies_elsewhere_copies_it_to_its_place() -> None:
    factory = swiglu("w", torch.zeros(4, 3), 0, 2)
    parts = {number: torch.full(shard.local_shape, 1.0 + number) for number, shard in factory.build().items()}
    assert factory.merge(parts) is factory.data
    assert factory.data[:, 0].tolist() == [1, 1, 2, 2]
    assert factory.merge_fn(parts)[:, 0].tolist() == [1, 1, 2, 2]


def test_a_rank_too_few_is_a_gap_and_a_rank_twice_a_doubled_main_replica() -> None:
    parts = [fused_of([*numbered(12, 2).chunk(2)], rank, 3) for rank in range(3)]
    states = [{"w": swiglu("w", part, rank, 3)} for rank, part in enumerate(parts)]
    with pytest.raises(CoverageError, match=r"'w' of shape \(12, 2\): no rank saves region \[2:4,0:2\]"):
        check_coverage([states[0], states[2]])
    with pytest.raises(CoverageError, match="2 main replicas, on rank 0, 3"):
        check_coverage([*states, states[0]])
    flat = [replace(states[0]["w"], data=parts[0].reshape(-1)[cut], flattened_range=cut) for cut in (slice(0, 3), slice(4, 8))]
    with pytest.raises(CoverageError, match=r"no rank saves region \[1:2,1:2\]"):
        check_coverage([*({"w": part} for part in flat), *states[1:]])


def test_ranks_that_count_different_numbers_of_ranks_disagree() -> None:
    states = [{"w": swiglu("w", torch.zeros(4, 2), 0, 2)}, {"w": swiglu("w", torch.zeros(4, 2), 1, 3)}]
    with pytest.raises(DisagreementError, match=r"'w' is F32 \(8, 2\) on rank 0 but F32 \(12, 2\) on rank 1"):
        check_coverage(states)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: swiglu("w", torch.zeros(3), 0, 1), "'w', axis 0: 3 local elements cannot be gate and up"),
        (lambda: swiglu("w", torch.zeros(4), 2, 2), "index 2 must be from 0 to 1"),
        (lambda: swiglu("w", torch.zeros(4), 0, 1, axis=1), r"axis \[1\] must be among the 1 axes \(4,\)"),
        (lambda: fused("w", torch.zeros(4), {"0": Span(0, 4)}), r"axis \['0'\] must be among"),
        (lambda: swiglu("w", torch.zeros(()), 0, 1), "must be among the 0 axes"),
        (lambda: swiglu("w", None, 0, 1), "data must be a torch.Tensor, not NoneType"),
        (lambda: swiglu("w", torch.zeros(4), 0, 1, prepend=((3, 3),)), "index 3 of a prepended axis"),
        (lambda: swiglu("w", torch.zeros(4), 0, 1, replica_id=-1), "replica_id -1"),
        (lambda: fused_rows("w", torch.zeros(4), (5, 4), 0, 2), r"widths \(5, 4\) must each be divisible by the 2 parts"),
        (lambda: fused_rows("w", torch.zeros(4), (), 0, 2), r"widths \(\) must each"),
        (lambda: fused_rows("w", torch.zeros(4), (2, 2), 0, 2), "2 elements each, but there are 4 locally"),
        (lambda: fused_rows("w", torch.zeros(4), (2, 2), 0, 1, names=("a", "a")), "must be 2 different names"),
        (lambda: fused_rows("w", torch.zeros(4), (2, 2), 0, 1, names=("a", "")), "none empty"),
        (lambda: fused("w", torch.zeros(4), {0: Span(2, 5)}), "4 local elements from 2 on do not lie in a global axis of 5"),
        (
            lambda: fused("w", torch.zeros(2, 2), {n: Fused((1, 1), names=("a", "b")) for n in (0, 1)}),
            "several axes are fused",
        ),
        (
            lambda: fused("w", torch.zeros(2, 2), {n: Fused((2,), names=("a",)) for n in (0, 1)}),
            "several axes are fused",
        ),
        (lambda: replace(swiglu("w", torch.zeros(4), 0, 1), data=torch.zeros(3)), r"shape \(3,\), expected \(4,\)"),
        (lambda: replace(swiglu("w", torch.zeros(4), 0, 1), flattened_range=slice(2, 5)), "inside the 4 local elements"),
        (lambda: replace(swiglu("w", torch.zeros(4), 0, 1), flattened_range=slice(0, 4, 2)), "inside the 4 local elements"),
        (lambda: replace(swiglu("w", torch.zeros(4), 0, 1), flattened_range=slice(1, 4)), r"shape \(4,\), expected \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_key_and_reason(make: Any, message: str) -> None:
    with pytest.raises(BadArgumentError, match=message):
        make()


@pytest.mark.parametrize("axis", [0, 1])
def test_a_single_weight_with_a_name_is_stored_under_it_whatever_its_axis(axis: int) -> None:
    factory = fused("w", torch.zeros(4, 4), {axis: Fused((4,), names=("only",))}, prepend=((0, 2),))
    assert [shard.key for shard in factory.build().values()] == ["w.only"]
