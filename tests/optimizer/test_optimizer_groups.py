"""Param groups: whole again by content and names, whatever their order and number."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import giantstep as gs
from giantstep.errors import MismatchError, UnsupportedTypeError
from giantstep.optimizer import OptimizerOptions, OptimizerState
from giantstep.optimizer.groups import options_of, plan_groups
from giantstep.testing.ranks import run_ranks


def params(names: str) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.full((3,), float(ord(name)))) for name in names}


def saved(path: Path, groups: list[dict[str, Any]], model: dict[str, torch.nn.Parameter]) -> None:
    optimizer = torch.optim.AdamW(groups)
    for param in model.values():
        param.grad = torch.ones_like(param)
    optimizer.step()
    gs.save({"optimizer": OptimizerState(optimizer, model)}, path)


def loaded(path: Path, groups: list[dict[str, Any]], model: dict[str, torch.nn.Parameter], **options: Any) -> Any:
    optimizer = torch.optim.AdamW(groups)
    state = OptimizerState(optimizer, model, options=OptimizerOptions(**options))
    gs.load({"optimizer": state}, path)
    return optimizer, state


def pick(model: dict[str, torch.nn.Parameter], names: str) -> list[torch.nn.Parameter]:
    return [model[name] for name in names]


def test_groups_in_another_order_and_number_get_their_own_hyper_parameters(tmp_path: Path) -> None:
    model = params("abcde")
    saved(
        tmp_path / "c",
        [{"params": pick(model, "abd"), "lr": 0.5, "weight_decay": 0.1}, {"params": pick(model, "ce"), "lr": 0.25}],
        model,
    )
    fresh = params("abcde")
    groups = [{"params": pick(fresh, names)} for names in ("e", "da", "b", "c")]
    optimizer, state = loaded(tmp_path / "c", groups, fresh)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5, 0.5, 0.25]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.1, 0.1, 0.01]
    assert [group["params"] for group in optimizer.param_groups] == [pick(fresh, names) for names in ("e", "da", "b", "c")]
    assert state.report.groups == ()
    assert optimizer.state[fresh["d"]]["step"] == 1


def test_a_group_of_parameters_with_different_hyper_parameters_is_an_error_that_names_them(tmp_path: Path) -> None:
    model = params("ab")
    saved(tmp_path / "c", [{"params": [model["a"]], "lr": 0.5}, {"params": [model["b"]], "lr": 0.25}], model)
    fresh = params("ab")
    with pytest.raises(MismatchError, match=r"group 0 .*lr: 0\.5 of 'a', 0\.25 of 'b'"):
        loaded(tmp_path / "c", [{"params": pick(fresh, "ab")}], fresh)
    assert not torch.optim.AdamW(fresh.values()).state
    optimizer, state = loaded(tmp_path / "c", [{"params": pick(fresh, "ab"), "lr": 7.0}], fresh, on_group_conflict="keep")
    assert optimizer.param_groups[0]["lr"] == 7.0
    assert state.report.groups == ("group 0: keeps its own lr, in which its parameters differ",)
    assert set(optimizer.state) == set(fresh.values())


def test_a_name_decides_where_a_parameter_has_moved_between_groups(tmp_path: Path) -> None:
    model = params("abc")
    groups = [{"params": pick(model, "ab"), "name": "decay", "lr": 0.5}, {"params": [model["c"]], "name": "plain", "lr": 0.25}]
    saved(tmp_path / "c", groups, model)
    fresh = params("abc")
    groups = [{"params": pick(fresh, "bc"), "name": "plain"}, {"params": [fresh["a"]], "name": "decay"}]
    optimizer, state = loaded(tmp_path / "c", groups, fresh)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]
    assert state.report.groups == ("group 0 ('plain'): 1 parameters were in other groups: b",)


def test_an_empty_group_finds_the_stored_one_that_it_is_like(tmp_path: Path) -> None:
    model = params("ab")
    groups = [{"params": pick(model, "ab"), "lr": 0.5}, {"params": [], "lr": 0.125, "weight_decay": 0.0}]
    saved(tmp_path / "c", groups, model)
    fresh = params("ab")
    groups = [
        {"params": [], "lr": 1.0, "weight_decay": 0.0},
        {"params": [], "weight_decay": 3.0},
        {"params": pick(fresh, "ab")},
    ]
    optimizer, state = loaded(tmp_path / "c", groups, fresh)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 1e-3, 0.5]
    assert state.report.groups == ("group 1: left as it is: it is empty, and none like it was saved",)


def test_hyper_parameters_of_another_algorithm_are_reported(tmp_path: Path) -> None:
    model = params("ab")
    gs.save({"optimizer": OptimizerState(torch.optim.Adam(model.values()), model)}, tmp_path / "c")
    for make, said in (
        (torch.optim.Adam, ()),
        (torch.optim.AdamW, ("; takes decoupled_weight_decay=False, unlike this optimizer",)),
        (torch.optim.Adagrad, ("; takes amsgrad=False, betas=(0.9, 0.999), decoupled_weight_decay=False, ",)),
    ):
        fresh = params("ab")
        state = OptimizerState(make(fresh.values()), fresh)
        gs.load({"optimizer": state}, tmp_path / "c")
        assert len(state.report.groups) == len(said)
        assert all(part in note for note, part in zip(state.report.groups, said, strict=True)), state.report.groups


def test_how_this_process_computes_is_not_taken_from_the_checkpoint(tmp_path: Path) -> None:
    model = params("a")
    saved(tmp_path / "c", [{"params": [model["a"]], "fused": True, "maximize": True}], model)
    fresh = params("a")
    optimizer, state = loaded(tmp_path / "c", [{"params": [fresh["a"]]}], fresh)
    assert optimizer.param_groups[0]["fused"] is None
    assert optimizer.param_groups[0]["maximize"] is True
    assert state.report.groups == ("group 0: keeps its own fused; takes maximize=True, unlike this optimizer",)


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_a_learning_rate_that_is_a_tensor_stays_the_tensor_that_it_is(before: bool, after: bool, tmp_path: Path) -> None:
    model, fresh = params("a"), params("a")
    saved(tmp_path / "c", [{"params": [model["a"]], "lr": torch.tensor(0.5) if before else 0.5}], model)
    rate: Any = torch.tensor(0.0) if after else 0.1
    optimizer, _ = loaded(tmp_path / "c", [{"params": [fresh["a"]], "lr": rate}], fresh)
    found = optimizer.param_groups[0]["lr"]
    assert found == 0.5
    assert (found is rate) if after else isinstance(found, float)


def test_one_tensor_of_several_groups_becomes_several_where_values_differ(tmp_path: Path) -> None:
    model, fresh = params("abc"), params("abc")
    saved(
        tmp_path / "c", [{"params": [model[name]], "lr": rate} for name, rate in (("a", 0.5), ("b", 0.25), ("c", 0.5))], model
    )
    rate = torch.tensor(0.0)
    optimizer, _ = loaded(tmp_path / "c", [{"params": [fresh[name]], "lr": rate} for name in "abc"], fresh)
    found = [group["lr"] for group in optimizer.param_groups]
    assert found == [0.5, 0.25, 0.5]
    assert found[0] is rate
    assert found[2] is rate


def test_schedulers_go_on_where_they_were(tmp_path: Path) -> None:
    def make() -> Any:
        model = params("ab")
        optimizer = torch.optim.SGD([{"params": [model["a"]], "lr": 1.0}, {"params": [model["b"]], "lr": 2.0}])
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    model, optimizer, scheduler = make()
    optimizer.step()
    scheduler.step()
    tree = {"optimizer": OptimizerState(optimizer, model), "scheduler": scheduler}
    gs.save(tree, tmp_path / "c")
    model, optimizer, scheduler = make()
    gs.load({"optimizer": OptimizerState(optimizer, model), "scheduler": scheduler}, tmp_path / "c")
    optimizer.step()
    scheduler.step()
    assert [(group["lr"], group["initial_lr"]) for group in optimizer.param_groups] == [(0.25, 1.0), (0.5, 2.0)]


def test_ranks_that_hold_parts_of_groups_make_them_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Pipeline stages: one has parameters of the first group only, its second is empty; another the other way round."""
    held = {0: ("ab", ""), 1: ("c", "de"), 2: ("", "f")}

    def save_stage(group: Any) -> None:
        first, second = held[group.rank]
        model = params(first + second)
        optimizer = torch.optim.AdamW(
            [{"params": pick(model, first), "lr": 0.5}, {"params": pick(model, second), "lr": 0.25, "weight_decay": 0.0}]
        )
        gs.save({"optimizer": OptimizerState(optimizer, model)}, tmp_path / "c", process_group=group)

    with caplog.at_level(logging.WARNING, "giantstep"):
        run_ranks(3, save_stage)
    assert caplog.text == ""
    fresh = params("abcdef")
    groups = [{"params": pick(fresh, "fed"), "weight_decay": 0.0}, {"params": pick(fresh, "abc")}]
    optimizer, state = loaded(tmp_path / "c", groups, fresh)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]
    assert set(state.report.without_state) == set("abcdef")


def test_what_cannot_be_stored_of_a_group_is_named(tmp_path: Path) -> None:
    model = params("a")
    optimizer = torch.optim.AdamW([{"params": [model["a"]], "hook": lambda: None}])
    with pytest.raises(UnsupportedTypeError, match=r"optimizer\.group\.hook"):
        gs.save({"optimizer": OptimizerState(optimizer, model)}, tmp_path / "c")


@given(st.data())
def test_every_division_that_splits_saved_groups_restores_them(data: st.DataObject) -> None:
    """Of any groups: divide each into parts, in any order; each part gets its group's hyper-parameters."""
    keys = [f"p{n}" for n in range(data.draw(st.integers(1, 12)))]
    owner = {key: data.draw(st.integers(0, 3), label=key) for key in keys}
    stored = {str(n): {"lr": n / 10, "weight_decay": n % 2} for n in set(owner.values())}
    part = {key: (owner[key], data.draw(st.integers(0, 2))) for key in keys}
    parts = data.draw(st.permutations(sorted(set(part.values()))))
    members = [{key: str(owner[key]) for key in keys if part[key] == wanted} for wanted in parts]
    groups = [{"params": list(held), "lr": 99.0} for held in members]
    plans = plan_groups(groups, members, stored, keep_conflicts=False)
    assert [plan.values for plan in plans] == [stored[str(number)] for number, _ in parts]
    assert options_of({"params": [1], "param_names": ["x"], "lr": 1}) == {"lr": 1}


def test_a_hyper_parameter_that_no_tensor_can_hold_replaces_it(tmp_path: Path) -> None:
    """Of groups that were saved alike each has its own."""
    for value, here in ((None, torch.tensor(1.0)), (torch.tensor([0.5]), torch.tensor(1.0)), ((torch.tensor(0.9),), 3)):
        saved_model, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        optimizers = [
            torch.optim.SGD([{"params": [param]} for param in one.parameters()], lr=0.1) for one in (saved_model, model)
        ]
        for optimizer, option in zip(optimizers, (value, here), strict=True):
            for group in optimizer.param_groups:
                group["option"] = option
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        gs.save({"optimizer": OptimizerState(optimizers[0], saved_model)}, path)
        gs.load({"optimizer": OptimizerState(optimizers[1], model)}, path)
        first, second = (group["option"] for group in optimizers[1].param_groups)
        if value is None:
            assert (first, second) == (None, None)
        elif isinstance(value, tuple):
            assert torch.equal(first[0], value[0])
            assert first[0] is not second[0]
        else:
            assert first is here
            assert torch.equal(first, torch.tensor(0.5))
