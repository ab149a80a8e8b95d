"""Learning-rate schedules, gradient scalers and averaged models: common state that goes on as if nothing had happened."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import giantstep as gs
from giantstep.optimizer import OptimizerState


class Decay:
    """A schedule function that is an object, with state."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, epoch: int) -> float:
        return self.rate**epoch


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda epoch: 0.9**epoch, Decay(0.8)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4, 7]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=7),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=8),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 12, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 9)], milestones=[3]
    ),
    "SequentialLR with steps that come later": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.MultiStepLR(o, [1, 3, 3])], milestones=[8]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CyclicLR with a function": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, scale_fn=Decay(0.7)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=20),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=6),
}


class Job:
    def __init__(self, name: str) -> None:
        self.model = torch.nn.Linear(3, 2)
        groups = [{"params": [self.model.weight]}, {"params": [self.model.bias], "lr": 0.5}]
        self.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        self.schedule = SCHEDULES[name](self.optimizer)

    def train(self, steps: int) -> list[list[float]]:
        """Learning rates after each step."""
        rates = []
        for _ in range(steps):
            self.optimizer.step()
            self.schedule.step(*([1.0] if isinstance(self.schedule, lr_scheduler.ReduceLROnPlateau) else []))
            rates.append([group["lr"] for group in self.optimizer.param_groups])
        return rates

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": OptimizerState(self.optimizer, {"model": self.model}),
            "schedule": self.schedule,
        }


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_go_on_as_if_nothing_had_happened(tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job, other = Job(name), Job(name)
        job.train(5)
        gs.save(job.state(), tmp_path)
        expected = job.train(10)
        other.train(2)
        gs.load(other.state(), tmp_path)
        assert other.train(10) == expected


def test_every_schedule_of_torch_is_tried() -> None:
    classes = {
        name
        for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert classes - {"LRScheduler"} <= set(SCHEDULES)


def test_a_gradient_scaler_goes_on(tmp_path: Path) -> None:
    def used() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)

    def step(scaler: torch.amp.GradScaler, value: float) -> float:
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        scaler.scale((weight * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale()

    values = [1.0, 1.0, float("inf"), 1.0, 1.0, 1.0, 1.0]
    scaler, other = used(), used()
    for value in values[:4]:
        step(scaler, value)
    gs.save({"scaler": scaler}, tmp_path)
    gs.load({"scaler": other}, tmp_path)
    assert [step(other, value) for value in values] == [step(scaler, value) for value in values]


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["mean", "ema"])
def test_averaged_models_go_on(tmp_path: Path, average: Any) -> None:
    def made() -> tuple[torch.nn.Linear, AveragedModel]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, AveragedModel(model, multi_avg_fn=average)

    def train(model: torch.nn.Linear, averaged: AveragedModel, numbers: range) -> None:
        for number in numbers:
            with torch.no_grad():
                model.weight.add_(number)
            averaged.update_parameters(model)

    model, averaged = made()
    train(model, averaged, range(4))
    gs.save({"model": model, "averaged": averaged}, tmp_path)
    train(model, averaged, range(4, 8))
    other, other_averaged = made()
    gs.load({"model": other, "averaged": other_averaged}, tmp_path)
    train(other, other_averaged, range(4, 8))
    assert torch.equal(other_averaged.module.weight, averaged.module.weight)
    assert torch.equal(other_averaged.n_averaged, averaged.n_averaged)


def test_step_counters_are_values_or_tensors_of_no_dimension(tmp_path: Path) -> None:
    gs.save({"step": 7, "tokens": torch.tensor(1 << 40), "seen": {"epoch": 1.5}}, tmp_path)
    tokens = torch.tensor(0)
    state = gs.load({"tokens": tokens}, tmp_path)
    assert (state["step"], int(tokens), state["seen"]) == (7, 1 << 40, {"epoch": 1.5})
