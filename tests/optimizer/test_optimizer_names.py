"""Names of the field: which parameter an optimizer's number is, and state sharded like it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import BadArgumentError
from giantstep.mapping.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
    optim_state_to_sharding_state,
    sharded_params,
)
from giantstep.mapping.tree import flatten
from giantstep.testing.ranks import run_ranks


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def stepped(optimizer: torch.optim.Optimizer, seed: int = 0) -> torch.optim.Optimizer:
    generator = torch.Generator().manual_seed(seed)
    for param in params_of(optimizer):
        if param.requires_grad:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    optimizer.step()
    return optimizer


def rows(key: str, param: torch.Tensor, rank: int = 0, ranks: int = 1) -> gs.ShardedTensor:
    return gs.ShardedTensor.from_rank_offsets(key, param, (0, rank, ranks))


def test_state_of_a_parameter_is_named_by_the_key_of_its_sharded_parameter() -> None:
    a, b = torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(2))
    optimizer = stepped(torch.optim.AdamW([b, a]))
    found = get_param_id_to_sharded_param_map(
        {"x": {"a": rows("w.a", a)}, "y": [rows("w.b", b.detach())]}, params_of(optimizer)
    )
    assert {number: leaf.key for number, leaf in found.items()} == {1: "w.a", 0: "w.b"}
    state = optimizer.state_dict()
    optim_state_to_sharding_state(state, found, exclude_keys=("step",))
    keys = {leaf.key for leaf in flatten(state).values() if isinstance(leaf, gs.ShardedTensor)}
    assert keys == {f"optimizer.state.{name}.w.{param}" for name in ("exp_avg", "exp_avg_sq") for param in "ab"}
    assert state["state"][0]["exp_avg"].data.data_ptr() == optimizer.state[b]["exp_avg"].data_ptr()
    assert state["param_groups"][0]["params"] == ["w.b", "w.a"]


def test_frozen_parameters_do_not_shift_the_numbers_of_others() -> None:
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    trained = torch.nn.Parameter(torch.ones(3))
    optimizer = stepped(torch.optim.AdamW([frozen, trained]))
    found = get_param_id_to_sharded_param_map([rows("frozen", frozen), rows("trained", trained)], params_of(optimizer))
    state = optimizer.state_dict()
    optim_state_to_sharding_state(state, found)
    assert set(state["state"]) == {1}
    assert state["state"][1]["exp_avg"].key == "optimizer.state.exp_avg.trained"
    assert state["state"][1]["step"].key == "optimizer.state.step.trained"
    assert state["state"][1]["step"].data == 1


def test_tied_parameters_are_named_once_by_the_first_key() -> None:
    shared = torch.nn.Parameter(torch.ones(4, 3))
    found = get_param_id_to_sharded_param_map({"embed": rows("embed", shared), "head": rows("head", shared.data)}, [shared])
    assert {number: leaf.key for number, leaf in found.items()} == {0: "embed"}


def test_parameters_that_the_model_does_not_know_have_no_entry_and_their_state_is_refused() -> None:
    known, unknown = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = stepped(torch.optim.AdamW([known, unknown]))
    found = get_param_id_to_sharded_param_map([rows("known", known)], params_of(optimizer))
    assert set(found) == {0}
    with pytest.raises(BadArgumentError, match="parameter 1 has no sharded parameter"):
        optim_state_to_sharding_state(optimizer.state_dict(), found)


def test_empty_parameters_of_one_buffer_are_told_apart_by_where_they_lie() -> None:
    buffer = torch.zeros(6)
    first, second = (torch.nn.Parameter(buffer[start:start]) for start in (0, 3))
    leaves = [
        gs.ShardedTensor.from_rank_offsets_flat(name, param.detach(), (4,), flattened_range=slice(0, 0))
        for name, param in (("first", first), ("second", second))
    ]
    found = get_param_id_to_sharded_param_map(leaves, [second, first])
    assert {number: leaf.key for number, leaf in found.items()} == {0: "second", 1: "first"}


def test_a_module_names_its_parameters_by_their_paths() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    found = get_param_id_to_sharded_param_map({"model": module}, module.parameters())
    assert list(found.keys_of.values()) == ["model.0.weight", "model.0.bias", "model.1.weight", "model.1.bias"]
    assert found[0] is module[0].weight
    assert len(sharded_params(module)) == 7


def test_the_fp32_copy_of_a_bf16_parameter_is_sharded_like_it() -> None:
    model = torch.ones(4, 3, dtype=torch.bfloat16)
    leaf = gs.ShardedTensor.from_rank_offsets("w", model, (0, 1, 2), replica_id=(0, 1))
    made = make_sharded_optimizer_tensor(leaf, torch.ones(4, 3), "optimizer.state.fp32_param")
    assert isinstance(made, gs.ShardedTensor)
    expected = ("optimizer.state.fp32_param.w", torch.float32, (8, 3), (4, 0), (0, 1))
    assert (made.key, made.dtype, made.global_shape, made.global_offset, made.replica_id) == expected


def test_a_flat_parameter_has_flat_state() -> None:
    leaf = gs.ShardedTensor.from_rank_offsets_flat("w", torch.ones(5), (4, 3), flattened_range=slice(2, 7))
    made = make_sharded_optimizer_tensor(leaf, torch.zeros(5), "m")
    assert isinstance(made, gs.ShardedTensor)
    assert made.flattened_range == slice(2, 7)
    with pytest.raises(BadArgumentError, match=r"shape \(4, 3\), expected \(5,\)"):
        make_sharded_optimizer_tensor(leaf, torch.zeros(4, 3), "m")


def test_a_factory_builds_the_state_as_it_builds_the_parameter(tmp_path: Path) -> None:
    def build(key: str, data: torch.Tensor, replica_id: Any, _flat: Any) -> dict[str, gs.ShardedTensor]:
        return {name: rows(f"{key}.{name}", half) for name, half in zip(("gate", "up"), data.chunk(2), strict=True)}

    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = stepped(torch.optim.AdamW([weight]))
    factory = gs.ShardedTensorFactory("mlp", weight, build, lambda parts: torch.cat([parts["gate"], parts["up"]]))
    state = optimizer.state_dict()
    optim_state_to_sharding_state(state, get_param_id_to_sharded_param_map([factory], [weight]))
    gs.save({"optimizer": state}, tmp_path / "c")
    assert "optimizer.state.exp_avg.mlp.gate" in gs.open_checkpoint(tmp_path / "c")
    saved = optimizer.state[weight]["exp_avg"].clone()
    optimizer.state[weight]["exp_avg"].zero_()
    loaded = gs.load({"optimizer": state}, tmp_path / "c")
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], saved)
    assert loaded["optimizer"]["state"][0]["step"] == 1


def test_sharding_states_of_row_ranks_load_as_column_ranks(tmp_path: Path) -> None:
    whole = torch.arange(48.0).reshape(8, 6)

    def state_of(part: torch.Tensor, axis: int, rank: int, *, filled: bool) -> dict[str, Any]:
        param = torch.nn.Parameter(part.clone())
        optimizer = torch.optim.SGD([param], momentum=0.9)
        optimizer.state[param]["momentum_buffer"] = part * 2 if filled else torch.zeros_like(part)
        leaf = gs.ShardedTensor.from_rank_offsets("w", param, (axis, rank, 2))
        state = optimizer.state_dict()
        optim_state_to_sharding_state(state, get_param_id_to_sharded_param_map([leaf], [param]))
        return {"optimizer": {"state": state["state"]}}

    run_ranks(
        2,
        lambda group: gs.save(
            state_of(whole.chunk(2)[group.rank], 0, group.rank, filled=True), tmp_path / "c", process_group=group
        ),
    )

    def load(group: Any) -> bool:
        part = whole.chunk(2, dim=1)[group.rank].contiguous()
        loaded = gs.load(state_of(part, 1, group.rank, filled=False), tmp_path / "c", process_group=group)
        return torch.equal(loaded["optimizer"]["state"][0]["momentum_buffer"], part * 2)

    assert run_ranks(2, load) == [True, True]


def test_make_sharded_keeps_what_the_parameter_says_of_itself() -> None:
    leaf = gs.ShardedTensor("w", torch.ones(2, 3), torch.float32, (2, 3), (7, 5, 3), (4, 1, 0), None, 0, 1)
    leaf = replace(leaf, allow_shape_mismatch=True, local_shape=(2, 3))
    made = make_sharded_optimizer_tensor(leaf, torch.ones(2, 3), "m")
    assert isinstance(made, gs.ShardedTensor)
    assert (made.prepend_axis_num, made.allow_shape_mismatch, made.axis_fragmentations) == (1, True, None)
