"""Tiny training jobs in any layout: global parameters, cut as a layout says, with real optimizers on the pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

import giantstep as gs
from giantstep.optimizer import OptimizerOptions, OptimizerState
from giantstep.testing.ranks import run_ranks

SHAPES = {
    "embed": (12, 6),
    "layers.0.w": (8, 6),
    "layers.1.w": (8, 6),
    "layers.0.b": (8,),
    "experts.w": (4, 6, 5),  # one expert is one parameter: the first axis is prepended
}
EXPERTS = 4


def whole(key: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, key)))
    return torch.randn(SHAPES[key], generator=generator)


def grad(key: str, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, key)))
    return torch.randn(SHAPES[key], generator=generator)


def cut(tensor: torch.Tensor, like: gs.ShardedTensor) -> torch.Tensor:
    """What a shard holds of a global tensor; contiguous memory of its own."""
    part = tensor[like.region().slices()].reshape(like.local_shape)
    if like.flattened_range is not None:
        part = part.reshape(-1)[like.flattened_range]
    return part.clone()


def _shard(key: str, axis: int, index: int, parts: int, replica: int = 0) -> gs.ShardedTensor:
    shape = list(SHAPES[key])
    shape[axis] //= parts
    data = torch.empty(shape, device="meta")
    return gs.ShardedTensor.from_rank_offsets(key, data, (axis, index, parts), replica_id=replica)


def _expert(number: int, axis: int = 0, index: int = 0, parts: int = 1, replica: int = 0) -> gs.ShardedTensor:
    shape = list(SHAPES["experts.w"][1:])
    if axis:
        shape[axis - 1] //= parts
    offsets = [(0, number, EXPERTS)] + ([(axis, index, parts)] if axis else [])
    data = torch.empty(shape, device="meta")
    return gs.ShardedTensor.from_rank_offsets("experts.w", data, *offsets, replica_id=replica, prepend_axis_num=1)


DENSE = [key for key in SHAPES if key != "experts.w"]


def one(_rank: int) -> Iterator[gs.ShardedTensor]:
    yield from (_shard(key, 0, 0, 1) for key in DENSE)
    yield from (_expert(number) for number in range(EXPERTS))


def rows(parts: int) -> Callable[[int], Iterator[gs.ShardedTensor]]:
    def layout(rank: int) -> Iterator[gs.ShardedTensor]:
        yield from (_shard(key, 0, rank, parts) for key in DENSE)
        for number in range(EXPERTS):
            yield _expert(number, 1, rank, parts) if 6 % parts == 0 else _expert(number, replica=rank)

    return layout


def columns(rank: int) -> Iterator[gs.ShardedTensor]:
    yield from (_shard(key, 1, rank, 2) if len(SHAPES[key]) == 2 else _shard(key, 0, 0, 1, rank) for key in DENSE)
    yield from (_expert(number, replica=rank) for number in range(EXPERTS))


def replicas(rank: int) -> Iterator[gs.ShardedTensor]:
    yield from (replace(shard, replica_id=rank) for shard in one(0))


def flat(bounds: list[float]) -> Callable[[int], Iterator[gs.ShardedTensor]]:
    """Ranges of flattened parameters, uneven; some may be empty."""

    def layout(rank: int) -> Iterator[gs.ShardedTensor]:
        for shard in one(0):
            count = shard.region().elements
            part = slice(int(bounds[rank] * count), int(bounds[rank + 1] * count))
            data = torch.empty(part.stop - part.start, device="meta")
            yield replace(shard, data=data, flattened_range=part)

    return layout


def pipeline(stages: list[list[str]]) -> Callable[[int], Iterator[gs.ShardedTensor]]:
    def layout(rank: int) -> Iterator[gs.ShardedTensor]:
        yield from (shard for shard in one(0) if shard.key in stages[rank])

    return layout


def experts(parts: int) -> Callable[[int], Iterator[gs.ShardedTensor]]:
    def layout(rank: int) -> Iterator[gs.ShardedTensor]:
        yield from (_shard(key, 0, 0, 1, rank) for key in DENSE)
        yield from (_expert(number) for number in range(EXPERTS) if number % parts == rank)

    return layout


Layout = tuple[int, Callable[[int], Iterator[gs.ShardedTensor]]]
LAYOUTS: dict[str, Layout] = {
    "one": (1, one),
    "rows of 2": (2, rows(2)),
    "rows of 4": (4, rows(4)),
    "columns": (2, columns),
    "replicas": (2, replicas),
    "flat": (3, flat([0.0, 0.3, 0.3, 1.0])),
    "flat, others": (4, flat([0.0, 0.05, 0.5, 0.9, 1.0])),
    "pipeline": (2, pipeline([["embed", "layers.0.w", "layers.0.b"], ["layers.1.w", "experts.w"]])),
    "pipeline, moved": (2, pipeline([["embed"], ["experts.w", "layers.0.b", "layers.1.w", "layers.0.w"]])),
    "experts of 2": (2, experts(2)),
    "experts of 4": (4, experts(4)),
}


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (Chen et al., 2023); one moment, no step."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                moment = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                first, second = group["betas"]
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_((moment * first + param.grad * (1 - first)).sign(), alpha=-group["lr"])
                moment.mul_(second).add_(param.grad, alpha=1 - second)


Params = list[tuple[str, torch.nn.Parameter]]


def _decay(params: Params) -> list[dict[str, Any]]:
    """Two groups, by name: an empty one where a rank has no such parameter."""
    plain = [param for key, param in params if key.endswith(".b")]
    return [
        {"params": [param for key, param in params if not key.endswith(".b")], "weight_decay": 0.1},
        {"params": plain, "weight_decay": 0.0},
    ]


def _muon(params: Params) -> dict[str, torch.optim.Optimizer]:
    matrices = [param for _, param in params if param.dim() == 2]
    return {
        "muon": torch.optim.Muon(matrices or [torch.nn.Parameter(torch.zeros(1, 1))], lr=0.02),
        "adamw": torch.optim.AdamW([{"params": [param for _, param in params if param.dim() != 2]}], lr=0.01),
    }


OPTIMIZERS: dict[str, Callable[[Params], Any]] = {
    "adamw": lambda params: torch.optim.AdamW(_decay(params), lr=0.01),
    "adamw, amsgrad": lambda params: torch.optim.AdamW(_decay(params), lr=0.01, amsgrad=True),
    "adamw, fused": lambda params: torch.optim.AdamW(_decay(params), lr=0.01, fused=True),
    "adamw, tensor lr": lambda params: torch.optim.AdamW(_decay(params), lr=torch.tensor(0.01)),
    "sgd": lambda params: torch.optim.SGD(_decay(params), lr=0.1),
    "sgd, momentum": lambda params: torch.optim.SGD(_decay(params), lr=0.1, momentum=0.9, nesterov=True),
    "adagrad": lambda params: torch.optim.Adagrad(_decay(params), lr=0.1, initial_accumulator_value=0.5),
    "nadam": lambda params: torch.optim.NAdam(_decay(params), lr=0.01),
    "asgd": lambda params: torch.optim.ASGD(_decay(params), lr=0.01),
    "rprop": lambda params: torch.optim.Rprop([param for _, param in params], lr=0.01),
    "lion": lambda params: Lion(_decay(params), lr=0.01, weight_decay=0.1),
}


class Job:
    """One rank of a training job; `copies`: of a bf16 model whose optimizers update fp32 copies, which are the `params`."""

    def __init__(
        self,
        layout: str,
        rank: int,
        make: Callable[[Params], Any],
        seed: int = 0,
        options: OptimizerOptions | None = None,
        *,
        copies: bool = False,
    ):
        self.shards = []
        self.params: Params = []
        main = {}
        for shard in LAYOUTS[layout][1](rank):
            param = torch.nn.Parameter(cut(whole(shard.key) + seed, shard))
            self.params.append((shard.key, param))
            data = param.detach().bfloat16() if copies else param.detach()
            self.shards.append(replace(shard, data=data, dtype=data.dtype))
            main[param] = data
        self.optimizer = make(self.params)
        self.state = OptimizerState(
            self.optimizer, {"model": self.shards}, options=options, main_params=main if copies else None
        )

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return list(self.optimizer.values()) if isinstance(self.optimizer, dict) else [self.optimizer]

    def train(self, first: int, last: int, lr_scale: float = 0.9) -> None:
        for step in range(first, last):
            for (key, param), shard in zip(self.params, self.shards, strict=True):
                param.grad = cut(grad(key, step), shard)
            for optimizer in self.optimizers:
                optimizer.step()
                for group in optimizer.param_groups:
                    group["lr"] = group["lr"] * lr_scale

    def tree(self) -> dict[str, Any]:
        return {"model": self.shards, "optimizer": self.state}

    def held(self) -> dict[tuple[str, str], list[tuple[gs.ShardedTensor, Any]]]:
        """State by its name and that of its parameter, with the shards."""
        found: dict[tuple[str, str], list[tuple[gs.ShardedTensor, Any]]] = {}
        for (key, param), shard in zip(self.params, self.shards, strict=True):
            for optimizer in self.optimizers:
                for name, value in optimizer.state.get(param, {}).items():
                    found.setdefault((name, key), []).append((shard, value))
            found.setdefault(("param", key), []).append((shard, param.detach()))
        return found

    def groups(self) -> dict[str, dict[str, Any]]:
        """Hyper-parameters by parameter."""
        names = {id(param): key for key, param in self.params}
        return {
            names[id(param)]: {name: value for name, value in group.items() if name != "params"}
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for param in group["params"]
            if id(param) in names
        }


def save(layout: str, make: Callable[[Params], Any], path: Any, steps: int = 3, *, copies: bool = False) -> list[Job]:
    def rank_of(group: Any) -> Job:
        job = Job(layout, group.rank, make, copies=copies)
        job.train(0, steps)
        gs.save(job.tree(), path, process_group=group)
        return job

    return run_ranks(LAYOUTS[layout][0], rank_of)


def load(layout: str, make: Callable[[Params], Any], path: Any, *, copies: bool = False) -> list[Job]:
    """Jobs of other values, with optimizers that have no state yet, after a load."""

    def rank_of(group: Any) -> Job:
        job = Job(layout, group.rank, make, seed=1, copies=copies)
        job.report = gs.load(job.tree(), path, process_group=group).report  # type: ignore[attr-defined]
        return job

    return run_ranks(LAYOUTS[layout][0], rank_of)


def assembled(jobs: list[Job]) -> dict[tuple[str, str], Any]:
    """Global state of all ranks: tensors put together of those shaped like their parameters; of values, the set of them."""
    found: dict[tuple[str, str], Any] = {}
    for job in jobs:
        for (name, key), parts in job.held().items():
            for shard, value in parts:
                if isinstance(value, torch.Tensor) and value.shape == shard.data_shape():
                    target = found.setdefault((name, key), torch.full(SHAPES[key], torch.nan, dtype=value.dtype))
                    box = target[shard.region().slices()].reshape(shard.local_shape).clone()
                    if shard.flattened_range is None:
                        box = value.clone()
                    else:
                        box.view(-1)[shard.flattened_range] = value
                    target[shard.region().slices()] = box.view(shard.region().size)
                else:
                    found.setdefault((name, key), set()).add((str(getattr(value, "dtype", type(value))), float(value)))
    return found


def same_state(left: dict[tuple[str, str], Any], right: dict[tuple[str, str], Any]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
        for name, value in left.items()
    )
