"""Optimizers for `small_model`: torch's own, one in the manner of Muon for matrices that are cut, and several chained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from small_model import Model, Weight


class MuonLike(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, which takes the whole matrix: parts are put together and cut again.

    Args:
        weights: whose parameters are updated; those that are no matrices get plain momentum.
        lr, momentum: as usual.
    """

    def __init__(self, weights: list[Weight], lr: float, momentum: float) -> None:
        self._weights = {id(weight.param): weight for weight in weights}
        super().__init__([weight.param for weight in weights], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                buffer = state["momentum_buffer"]
                buffer.mul_(group["momentum"]).add_(param.grad)
                weight = self._weights[id(param)]
                if len(weight.whole) == 2:
                    param.sub_(weight.part_of(_orthogonal(weight.whole_of(buffer))), alpha=group["lr"])
                else:
                    param.sub_(buffer, alpha=group["lr"])


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """About the nearest matrix with orthonormal rows or columns: the Newton-Schulz iteration of Higham's book, cubic."""
    turned = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    found = turned / (turned.norm() + 1e-7)
    for _ in range(6):
        found = 1.5 * found - 0.5 * (found @ found.T) @ found
    return found.T if matrix.shape[0] > matrix.shape[1] else found


def _is_inner_matrix(weight: Weight) -> bool:
    return weight.key.startswith("layers.") and len(weight.whole) == 2


def _adamw(weights: list[Weight]) -> torch.optim.Optimizer:
    norms = [weight.param for weight in weights if len(weight.whole) == 1]
    others = [weight.param for weight in weights if len(weight.whole) > 1]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0, "lr": 0.02}]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9))


def adamw(model: Model) -> Any:
    """Two param groups, of which a rank may have an empty one."""
    return [_adamw(model.weights)]


def sgd(model: Model) -> Any:
    """With Nesterov momentum."""
    return [torch.optim.SGD(list(model.parameters()), lr=0.2, momentum=0.9, nesterov=True)]


def muon(model: Model) -> Any:
    """Momentum made orthogonal."""
    return [MuonLike(model.weights, lr=0.05, momentum=0.9)]


def chained(model: Model) -> Any:
    """Matrices of layers by one optimizer, everything else by AdamW."""
    matrices = [weight for weight in model.weights if _is_inner_matrix(weight)]
    others = [weight for weight in model.weights if not _is_inner_matrix(weight)]
    return [MuonLike(matrices, lr=0.05, momentum=0.9), _adamw(others)]


OPTIMIZERS: dict[str, Callable[[Model], Any]] = {"AdamW": adamw, "SGD momentum": sgd, "Muon-like": muon, "chained": chained}
