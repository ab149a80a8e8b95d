"""Real processes: optimizers of FSDP2 models, whose parameters and state are DTensors, between numbers of ranks and plain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import Replicate

import giantstep as gs
from giantstep.optimizer import (
    OptimizerOptions,
    OptimizerState,
    get_param_id_to_sharded_param_map,
    optim_state_to_sharding_state,
)
from processes import results, run_processes


class Factored(torch.optim.Optimizer):
    """Statistics over rows and columns of the global gradient: DTensors of other shapes where parameters are DTensors."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in [param for group in self.param_groups for param in group["params"] if param.dim() == 2]:
            state = self.state[param]
            row, col = (param.grad.pow(2).mean(axis, keepdim=True) for axis in (-1, -2))
            if hasattr(col, "redistribute"):
                col = col.redistribute(placements=[Replicate()])
            state["row_var"] = state["row_var"] * 0.9 + row if "row_var" in state else row
            state["col_var"] = state["col_var"] * 0.9 + col if "col_var" in state else col
            param.sub_(param.grad / (state["row_var"].sqrt() + state["col_var"].sqrt() + 1), alpha=0.1)


KINDS = ("adamw", "fused", "sgd", "factored")


def model_of(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    # 5 rows over 4 ranks: uneven, one rank has none.
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3, bias=False))


def optimizer_of(kind: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    matrices = [param for param in model.parameters() if param.dim() == 2]
    others = [param for param in model.parameters() if param.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    if kind == "factored":
        return Factored(groups)
    return torch.optim.AdamW(groups, lr=0.1, fused=kind == "fused")


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6, generator=generator)).pow(2).sum().backward()
        optimizer.step()


def job(kind: str, seed: int, *, sharded: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer, OptimizerState]:
    model = model_of(seed)
    if sharded:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model[0])
        fully_shard(model)
    optimizer = optimizer_of(kind, model)
    return model, optimizer, OptimizerState(optimizer, {"model": model}, options=OptimizerOptions())


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[Any]]:
    """Whole state of all parameters, as plain lists."""

    def whole(value: Any) -> Any:
        full = value.full_tensor() if hasattr(value, "full_tensor") else value
        return full.tolist() if isinstance(full, torch.Tensor) else full

    return {
        f"{name} of {key}": whole(value)
        for key, param in model.named_parameters()
        for name, value in {"param": param.detach(), **optimizer.state.get(param, {})}.items()
    }


def save_sharded(_rank: int, folder: str) -> dict[str, Any]:
    found = {}
    for kind in KINDS:
        model, optimizer, state = job(kind, 0, sharded=True)
        train(model, optimizer, 2)
        optimizer.param_groups[0]["lr"] = 0.05
        gs.save({"model": model, "optimizer": state}, f"{folder}/{kind}")
        if kind == "adamw":
            save_low_level(model, optimizer, f"{folder}/low")
        train(model, optimizer, 2)
        found[kind] = state_of(model, optimizer)
    return found


def save_low_level(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: str) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = optimizer.state_dict()
    optim_state_to_sharding_state(state, get_param_id_to_sharded_param_map({"model": model}, params))
    gs.save({"optimizer": {"state": state["state"]}}, path)


def load_and_train(_rank: int, folder: str, kinds: tuple[str, ...], steps: int) -> dict[str, Any]:
    found = {}
    for kind in kinds:
        model, optimizer, state = job(kind, 1, sharded=True)
        report = gs.load({"model": model, "optimizer": state}, f"{folder}/{kind}").report
        assert report.missing == report.unexpected == ()
        assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]
        train(model, optimizer, steps)
        found[kind] = state_of(model, optimizer)
    return found


def load_plain(folder: Path, kind: str) -> dict[str, Any]:
    model, optimizer, state = job(kind, 1, sharded=False)
    gs.load({"model": model, "optimizer": state}, folder / kind)
    return state_of(model, optimizer)


def test_fsdp_optimizers_go_on_and_load_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    uninterrupted = results(run_processes(2, save_sharded, str(tmp_path)))[0]
    assert results(run_processes(2, load_and_train, str(tmp_path), KINDS, 2))[0] == uninterrupted
    low, high = (gs.open_checkpoint(tmp_path / name) for name in ("low", "adamw"))
    key = "optimizer.state.exp_avg.model.0.weight"
    assert (low[key][...] == high[key][...]).all()
    assert low.object("optimizer.state.step.model.0.weight/shard__") == 2
    plain = {kind: load_plain(tmp_path, kind) for kind in KINDS}
    assert "col_var of 0.weight" in plain["factored"]
    assert all(found == plain for found in results(run_processes(4, load_and_train, str(tmp_path), KINDS, 0)))


def test_plain_optimizers_load_sharded(tmp_path: Path) -> None:
    expected = {}
    for kind in KINDS:
        model, optimizer, state = job(kind, 0, sharded=False)
        train(model, optimizer, 2)
        optimizer.param_groups[0]["lr"] = 0.05
        gs.save({"model": model, "optimizer": state}, tmp_path / kind)
        expected[kind] = state_of(model, optimizer)
    assert all(found == expected for found in results(run_processes(3, load_and_train, str(tmp_path), KINDS, 0)))
