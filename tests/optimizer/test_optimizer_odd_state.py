"""State of a user's own optimizer that is unlike that of torch's: what comes back is what was saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import BadArgumentError
from giantstep.optimizer import OptimizerOptions, OptimizerState
from giantstep.optimizer.report import OptimizerReport

Fill = Callable[[torch.Tensor], dict[str, Any]]


class Own(torch.optim.Optimizer):
    """Has the state that it is told."""

    def __init__(self, params: Any, fill: Fill | None) -> None:
        super().__init__(params, {"lr": 0.1})
        for group in self.param_groups if fill is not None else ():
            for param in group["params"]:
                self.state[param] = fill(param.detach())


def saved_and_loaded(
    path: Path, before: Fill, here: Fill | None, options: OptimizerOptions | None = None
) -> tuple[dict[str, Any], dict[str, Any], OptimizerReport]:
    """State of a weight of shape (4, 3) that was saved, what it is after loading, and the report."""
    found = []
    for fill in (before, here):
        model = torch.nn.Linear(3, 4, bias=False)
        optimizer = Own(model.parameters(), fill)
        state: dict[str, Any] = {"model": model}
        state["optimizer"] = OptimizerState(optimizer, state, options=options)
        found.append(dict(optimizer.state.get(model.weight, {})))
        if fill is before and len(found) == 1:
            gs.save(state, path)
    gs.load(state, path)
    return found[0], dict(optimizer.state[model.weight]), state["optimizer"].report


@pytest.mark.parametrize("here", [False, True])
def test_state_with_as_many_elements_as_the_parameter_keeps_its_own_shape(here: bool, tmp_path: Path) -> None:
    def flat(param: torch.Tensor) -> dict[str, Any]:
        return {"direction": torch.rand(12), "folded": torch.rand(2, 3, 2), "exp_avg_sq_row": torch.rand(4)}

    before, after, _ = saved_and_loaded(tmp_path / "c", flat, flat if here else None)
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in before.items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("value", [None, "warm", 0.5, 1 << 80, [1, 2]])
@pytest.mark.parametrize("shape", [(), (1,), (4, 3)])
def test_a_value_replaces_a_tensor_that_cannot_hold_it(value: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    def tensor(_: torch.Tensor) -> dict[str, Any]:
        return {"what": torch.full(shape, 3, dtype=torch.int64)}

    _, after, _ = saved_and_loaded(tmp_path / "c", lambda _: {"what": value}, tensor)
    assert type(after["what"]) is type(value)
    assert after == {"what": value}


def test_a_step_stays_a_tensor_unless_it_is_beyond_what_that_can_count(tmp_path: Path) -> None:
    def tensor(_: torch.Tensor) -> dict[str, Any]:
        return {"step": torch.tensor(1.0)}

    _, few, _ = saved_and_loaded(tmp_path / "few", lambda _: {"step": 7}, tensor)
    assert torch.equal(few["step"], torch.tensor(7.0))
    _, many, _ = saved_and_loaded(tmp_path / "many", lambda _: {"step": (1 << 24) + 1}, tensor)
    assert type(many["step"]) is int
    assert many == {"step": (1 << 24) + 1}


def test_state_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArgumentError, match=r"state 0 of parameter 'model\.weight'.*expected a text"):
        saved_and_loaded(tmp_path / "c", lambda param: {0: torch.zeros_like(param)}, None)  # type: ignore[dict-item]
