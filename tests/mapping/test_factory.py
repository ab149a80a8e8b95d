"""Tensors that are stored in another shape than they have in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import BadArgumentError
from giantstep.testing.ranks import run_ranks

HIDDEN, WIDTH = 6, 8


def gated(key: str, data: torch.Tensor, rank: int, ranks: int, *, views: bool = True) -> gs.ShardedTensorFactory:
    """A SwiGLU weight: each rank's gate rows above its up rows; stored as one tensor, all gate rows first."""

    def build(key: str, data: torch.Tensor, replica_id: Any, flat: slice | None) -> dict[str, gs.ShardedTensor]:
        assert flat is None
        halves = torch.chunk(data, 2) if views else [half.clone() for half in torch.chunk(data, 2)]
        return {
            name: gs.ShardedTensor.from_rank_offsets(key, half, (0, place * ranks + rank, 2 * ranks), replica_id=replica_id)
            for place, (name, half) in enumerate(zip(("gate", "up"), halves, strict=True))
        }

    return gs.ShardedTensorFactory(key, data, build, lambda parts: torch.cat([parts["gate"], parts["up"]]))


def fused(rank: int, ranks: int, whole: torch.Tensor) -> torch.Tensor:
    gate, up = torch.chunk(whole, 2)
    return torch.cat([torch.chunk(gate, ranks)[rank], torch.chunk(up, ranks)[rank]])


@pytest.mark.parametrize("views", [True, False])
@pytest.mark.parametrize(("saving", "loading"), [(1, 2), (2, 3), (3, 1), (6, 2)])
def test_gate_and_up_rows_stay_apart_under_any_number_of_ranks(
    tmp_path: Path, saving: int, loading: int, *, views: bool
) -> None:
    weight = torch.arange(2.0 * HIDDEN * WIDTH).reshape(2 * HIDDEN, WIDTH)
    moment = -weight

    def state(rank: int, ranks: int, weight: torch.Tensor, moment: torch.Tensor) -> dict[str, Any]:
        # One factory serves the parameter and its optimizer moment.
        factory = gated("w", fused(rank, ranks, weight), rank, ranks, views=views)
        return {"model": [factory, 5], "opt": {0: replace(factory, key="exp_avg.w", data=fused(rank, ranks, moment))}}

    run_ranks(saving, lambda group: gs.save(state(group.rank, saving, weight, moment), tmp_path, process_group=group))
    assert gs.open_checkpoint(tmp_path).keys() == ["exp_avg.w", "w"]
    assert torch.equal(gs.metadata.load_plain_tensors(tmp_path)["w"], weight)

    def load(group: Any) -> None:
        zeros = torch.zeros_like(weight)
        wanted = state(group.rank, loading, zeros, zeros)
        loaded = gs.load(wanted, tmp_path, process_group=group)
        assert torch.equal(loaded["model"][0], fused(group.rank, loading, weight))
        assert torch.equal(loaded["opt"][0], fused(group.rank, loading, moment))
        # The tensors given are filled in place, with or without views.
        assert loaded["model"][0] is wanted["model"][0].data
        assert loaded["opt"][0] is wanted["opt"][0].data
        assert loaded["model"][1] == 5

    run_ranks(loading, load)


def test_a_factory_without_memory_gets_it(tmp_path: Path) -> None:
    weight = torch.arange(24.0).reshape(6, 4)
    gs.save({"w": gated("w", weight, 0, 1)}, tmp_path)
    loaded = gs.load({"w": gated("w", torch.empty(6, 4, device="meta"), 0, 1)}, tmp_path)
    assert torch.equal(loaded["w"], weight)


def test_lists_of_tensors_and_factories_that_build_lists(tmp_path: Path) -> None:
    def item(n: int) -> gs.ShardedTensor:
        return gs.ShardedTensor.from_rank_offsets(f"t{n}", torch.full((2,), float(n)))

    def build(_key: str, data: torch.Tensor, _replica: Any, _flat: Any) -> list[gs.ShardedTensor]:
        return [gs.ShardedTensor.from_rank_offsets(f"part{n}", data + n) for n in range(3)]

    state = {"all": [item(0), item(1), gs.ShardedTensorFactory("f", torch.ones(2), build, sum), item(2)]}  # type: ignore[arg-type]
    gs.save(state, tmp_path)
    loaded = gs.load(state, tmp_path)
    assert [tensor.tolist() for tensor in loaded["all"]] == [[0, 0], [1, 1], [6, 6], [2, 2]]


def test_factories_inside_what_factories_build(tmp_path: Path) -> None:
    data = torch.arange(8.0).reshape(4, 2)

    def outer(key: str, data: torch.Tensor, _replica: Any, _flat: Any) -> dict[str, Any]:
        top, bottom = torch.chunk(data, 2)
        return {"a": gated(f"{key}.inner", top, 0, 1), "b": gs.ShardedTensor.from_rank_offsets(f"{key}.b", bottom), "n": 3}

    def factory(data: torch.Tensor) -> gs.ShardedTensorFactory:
        return gs.ShardedTensorFactory("o", data, outer, lambda parts: torch.cat([parts["a"], parts["b"]]) * parts["n"] / 3)

    gs.save({"o": factory(data)}, tmp_path)
    assert gs.open_checkpoint(tmp_path).keys() == ["o.b", "o.inner"]
    target = torch.zeros(4, 2)
    assert gs.load({"o": factory(target)}, tmp_path)["o"] is target
    assert torch.equal(target, data)


def test_a_merge_that_permutes_views_of_the_data_is_copied_back_whole(tmp_path: Path) -> None:
    data = torch.arange(4.0)

    def build(key: str, data: torch.Tensor, _replica: Any, _flat: Any) -> gs.ShardedTensor:
        return gs.ShardedTensor.from_rank_offsets(key, data)

    gs.save({"x": gs.ShardedTensorFactory("x", data, build, lambda loaded: loaded)}, tmp_path)
    target = torch.zeros(4)
    gs.load({"x": gs.ShardedTensorFactory("x", target, build, lambda loaded: loaded.view(2, 2).t().reshape(-1))}, tmp_path)
    assert target.tolist() == [0, 2, 1, 3]


def test_the_flattened_range_reaches_the_build_function(tmp_path: Path) -> None:
    def build(key: str, data: torch.Tensor, replica: Any, flat: slice | None) -> gs.ShardedTensor:
        assert flat is not None
        return gs.ShardedTensor.from_rank_offsets_flat(key, data, (2, 4), flattened_range=flat, replica_id=replica)

    def rank(group: Any, data: torch.Tensor) -> torch.Tensor:
        flat = slice(0, 3) if group.rank == 0 else slice(3, 8)
        factory = gs.ShardedTensorFactory("x", data[flat], build, lambda part: part, flattened_range=flat)
        if data.any():
            gs.save({"x": factory}, tmp_path, process_group=group)
        return gs.load({"x": factory}, tmp_path, process_group=group)["x"]  # type: ignore[no-any-return]

    run_ranks(2, lambda group: rank(group, torch.arange(1.0, 9.0)))
    assert [part.tolist() for part in run_ranks(2, lambda group: rank(group, torch.zeros(8)))] == [[1, 2, 3], [4, 5, 6, 7, 8]]


@pytest.mark.parametrize(
    "arguments",
    [("", torch.ones(1), len, len), ("k", torch.ones(1), None, len), ("k", torch.ones(1), len, 5), ("k", None, len, len, "x")],
)
def test_factories_that_cannot_be(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(BadArgumentError):
        gs.ShardedTensorFactory(*arguments)


def test_a_factory_may_build_objects_with_a_state_of_their_own(tmp_path: Path) -> None:
    def build(key: str, data: torch.Tensor, _replica: Any, _flat: Any) -> dict[str, Any]:
        linear = torch.nn.Linear(2, 2)
        with torch.no_grad():
            linear.weight.copy_(data)
        return {"m": linear, "object": gs.ShardedObject(f"{key}.o", 5, (1,), (0,)), "local": gs.LocalNonpersistentObject(6)}

    def merge(built: dict[str, Any]) -> Any:
        assert (built["object"], built["local"]) == (5, 6)
        return built["m"].weight.detach()

    data = torch.arange(4.0).reshape(2, 2)
    gs.save({"f": gs.ShardedTensorFactory("f", data, build, merge)}, tmp_path)
    target = torch.zeros(2, 2)
    assert gs.load({"f": gs.ShardedTensorFactory("f", target, build, merge)}, tmp_path)["f"] is target
    assert torch.equal(target, data)


def test_parts_that_are_not_stored_and_have_no_memory_are_not_merged(tmp_path: Path) -> None:
    weight = torch.arange(24.0).reshape(6, 4)
    gs.save({"other": torch.ones(1)}, tmp_path)
    hollow = gated("w", torch.empty(6, 4, device="meta"), 0, 1)
    loaded = gs.load({"w": hollow, "mine": gated("v", weight, 0, 1)}, tmp_path, strict=gs.StrictHandling.IGNORE_ALL)
    assert loaded["w"] is hollow.data
    assert loaded["mine"] is weight
