"""Which parameters there are: frozen, without state, added, removed, tied, copied, stacked, of several optimizers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import BadArgumentError, DisagreementError, KeyMismatchError, MismatchError
from giantstep.fused import fused_rows
from giantstep.optimizer import OptimizerOptions, OptimizerState
from giantstep.testing.ranks import RanksFailedError, run_ranks

IGNORE = gs.StrictHandling.IGNORE_ALL


def params(names: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.full((3, 2), float(ord(name)), dtype=dtype)) for name in names}


def stepped(optimizer: Any, model: dict[str, torch.nn.Parameter], names: str) -> Any:
    for param in model.values():
        param.grad = None
    for name in names:
        model[name].grad = torch.full_like(model[name], float(ord(name)))
    optimizer.step()
    return optimizer


def adamw(model: dict[str, torch.nn.Parameter], stepping: str = "") -> torch.optim.AdamW:
    return stepped(torch.optim.AdamW(model.values()), model, stepping)


def test_parameters_without_state_have_none_after_loading(tmp_path: Path) -> None:
    model = params("abc")
    model["c"].requires_grad_(False)
    state = OptimizerState(adamw(model, "a"), model)
    gs.save({"optimizer": state}, tmp_path / "c")
    assert state.report.without_state == ("b", "c")
    assert state.report.stored == ("exp_avg of a", "exp_avg_sq of a")
    fresh = params("abc")
    optimizer = adamw(fresh, "ab")
    state = OptimizerState(optimizer, fresh)
    report = gs.load({"optimizer": state}, tmp_path / "c").report
    assert set(optimizer.state) == {fresh["a"]}
    assert state.report.without_state == ("b", "c")
    assert state.report.loaded == ("exp_avg of a", "exp_avg_sq of a")
    assert set(state.report.removed) == {f"{name} of b" for name in ("step", "exp_avg", "exp_avg_sq")}
    assert report.missing == report.unexpected == ()


def test_parameters_that_are_not_optimized_do_not_shift_others(tmp_path: Path) -> None:
    model = params("abc")
    optimizer = torch.optim.AdamW([model["c"], model["a"]])
    stepped(optimizer, model, "ac")
    gs.save({"optimizer": OptimizerState(optimizer, model)}, tmp_path / "c")
    fresh = params("abc")
    optimizer = torch.optim.AdamW([fresh["a"], fresh["c"]])
    gs.load({"optimizer": OptimizerState(optimizer, fresh)}, tmp_path / "c")
    assert {name: float(optimizer.state[fresh[name]]["exp_avg"][0, 0].round()) for name in "ac"} == {"a": 10.0, "c": 10.0}
    assert not torch.equal(optimizer.state[fresh["a"]]["exp_avg"], optimizer.state[fresh["c"]]["exp_avg"])


def test_an_added_parameter_is_an_error_by_default_and_else_keeps_what_it_has(tmp_path: Path) -> None:
    model = params("ab")
    gs.save({"optimizer": OptimizerState(adamw(model, "ab"), model)}, tmp_path / "c")
    fresh = params("abn")
    optimizer = adamw(fresh, "n")
    before = optimizer.state[fresh["n"]]["exp_avg"].clone()
    state = OptimizerState(optimizer, fresh)
    with pytest.raises(KeyMismatchError, match=r"optimizer\.param\.n"):
        gs.load({"optimizer": state}, tmp_path / "c")
    assert set(optimizer.state) == {fresh["n"]}, "nothing was touched"
    overrides = {"optimizer.param.n": gs.StrictHandling.RETURN_ALL}
    report = gs.load({"optimizer": state}, tmp_path / "c", options=gs.LoadOptions(strict_overrides=overrides)).report
    assert report.unexpected == ("optimizer.param.n",)
    assert state.report.added == ("n",)
    assert torch.equal(optimizer.state[fresh["n"]]["exp_avg"], before)
    assert optimizer.state[fresh["a"]]["step"] == 1


def test_a_removed_parameter_is_an_error_by_default_and_else_reported(tmp_path: Path) -> None:
    model = params("ab")
    gs.save({"optimizer": OptimizerState(adamw(model, "ab"), model)}, tmp_path / "c")
    fresh = params("a")
    state = OptimizerState(adamw(fresh), fresh)
    with pytest.raises(KeyMismatchError, match=r"optimizer\.state\.exp_avg\.b"):
        gs.load({"optimizer": state}, tmp_path / "c")
    report = gs.load({"optimizer": state}, tmp_path / "c", strict=IGNORE).report
    assert report.missing == ("optimizer.param.b", "optimizer.state.exp_avg.b", "optimizer.state.exp_avg_sq.b")
    assert len(state.report.loaded) == 2


def test_state_left_out_by_rename_stays_as_it_is(tmp_path: Path) -> None:
    model = params("ab")
    gs.save({"optimizer": OptimizerState(adamw(model, "ab"), model)}, tmp_path / "c")
    fresh = params("ab")
    optimizer = adamw(fresh)
    state = OptimizerState(optimizer, fresh)
    options = gs.LoadOptions(rename={"optimizer.state.exp_avg.b": None})
    report = gs.load({"optimizer": state}, tmp_path / "c", options=options).report
    assert report.skipped == ("optimizer.state.exp_avg.b",)
    assert state.report.skipped == ("b",)
    assert set(optimizer.state) == {fresh["a"]}


def test_state_of_which_a_part_is_left_out_stays_as_it_was_in_all_of_it(tmp_path: Path) -> None:
    model = params("ab")
    optimizer = adamw(model, "ab")
    gs.save({"optimizer": OptimizerState(optimizer, model)}, tmp_path / "c")
    fresh = params("ab")
    other = adamw(fresh, "ab")
    for param in fresh.values():
        other.state[param]["exp_avg"].fill_(7)
        other.state[param]["step"].fill_(7)
    state = OptimizerState(other, fresh)
    options = gs.LoadOptions(rename={"optimizer.state.exp_avg_sq.b": None})
    gs.load({"optimizer": state}, tmp_path / "c", options=options)
    assert state.report.skipped == ("b",)
    assert len(state.report.loaded) == 2
    assert other.state[fresh["b"]]["step"] == 7
    assert torch.all(other.state[fresh["b"]]["exp_avg"] == 7)
    assert torch.equal(other.state[fresh["a"]]["exp_avg"], optimizer.state[model["a"]]["exp_avg"])


@pytest.mark.parametrize("steps", [0, 1])
def test_state_of_a_factory_of_which_one_tensor_is_left_out_stays_as_it_was(steps: int, tmp_path: Path) -> None:
    def job(steps: int) -> Any:
        weight = torch.nn.Parameter(torch.ones(8, 3))
        optimizer = adamw({"w": weight}, "w" if steps else "")
        leaf = fused_rows("w", weight, (4, 4), 0, 1, names=("gate", "up"))
        return weight, optimizer, OptimizerState(optimizer, [leaf])

    gs.save({"optimizer": job(1)[2]}, tmp_path / "c")
    weight, optimizer, state = job(steps)
    for value in optimizer.state.get(weight, {}).values():
        value.fill_(7)
    options = gs.LoadOptions(rename={"optimizer.state.exp_avg.w.up": None})
    gs.load({"optimizer": state}, tmp_path / "c", options=options)
    assert state.report.skipped == ("w",)
    assert len(optimizer.state.get(weight, {})) == 3 * steps
    assert all(torch.all(value == 7) for value in optimizer.state.get(weight, {}).values())


def test_a_renamed_model_finds_its_state(tmp_path: Path) -> None:
    model = params("ab")
    gs.save({"optimizer": OptimizerState(adamw(model, "ab"), {"old": model})}, tmp_path / "c")
    fresh = params("ab")
    optimizer = adamw(fresh)
    options = gs.LoadOptions(rename=lambda key: key.replace(".new.", ".old."))
    gs.load({"optimizer": OptimizerState(optimizer, {"new": fresh})}, tmp_path / "c", options=options)
    assert optimizer.state[fresh["b"]]["step"] == 1


def test_an_optimizer_that_was_saved_under_another_name_is_found(tmp_path: Path) -> None:
    model, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    optimizer, fresh = torch.optim.AdamW(model.parameters(), lr=0.5), torch.optim.AdamW(other.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    gs.save({"optimizer": OptimizerState(optimizer, model)}, tmp_path / "c")
    options = gs.LoadOptions(rename=lambda key: key.replace("job.adam.", "optimizer."))
    gs.load({"job": {"adam": OptimizerState(fresh, other)}}, tmp_path / "c", options=options)
    assert torch.equal(fresh.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    assert fresh.param_groups[0]["lr"] == 0.5


def test_state_that_was_removed_from_the_checkpoint_is_not_invented(tmp_path: Path) -> None:
    model = params("ab")
    gs.save({"optimizer": OptimizerState(adamw(model, "ab"), model)}, tmp_path / "c")
    gs.remove_sharded_tensors(tmp_path / "c", "optimizer.state.exp_avg.b")
    fresh = params("ab")
    optimizer = adamw(fresh)
    state = OptimizerState(optimizer, fresh)
    with pytest.raises(KeyMismatchError, match=r"optimizer\.state\.exp_avg\.b"):
        gs.load({"optimizer": state}, tmp_path / "c")
    gs.load({"optimizer": state}, tmp_path / "c", strict=IGNORE)
    assert set(optimizer.state) == {fresh["a"]}
    assert state.report.skipped == ("b",)


def test_a_parameter_that_is_not_of_the_model_is_named(tmp_path: Path) -> None:
    model = params("ab")
    optimizer = torch.optim.AdamW([{"params": [model["a"]]}, {"params": [model["b"], torch.nn.Parameter(torch.ones(7))]}])
    with pytest.raises(BadArgumentError, match=r"parameter 1 of group 1, of shape \(7,\), is none of the 2 tensors"):
        OptimizerState(optimizer, model)


def test_a_parameter_in_two_optimizers_is_an_error() -> None:
    model = params("ab")
    pair = {"first": torch.optim.SGD([model["a"]]), "second": torch.optim.SGD(model.values())}
    with pytest.raises(BadArgumentError, match="'a' is in two optimizers, 'first' and 'second'"):
        OptimizerState(pair, model)


def test_a_list_of_optimizers_is_stored_by_number(tmp_path: Path) -> None:
    def make() -> Any:
        model = params("ab")
        return model, [torch.optim.SGD([model["a"]], momentum=0.9), torch.optim.SGD([model["b"]], momentum=0.9)]

    model, pair = make()
    for optimizer in pair:
        stepped(optimizer, model, "ab")
    gs.save({"optimizer": OptimizerState(pair, model)}, tmp_path / "c")
    assert "optimizer.1.state.momentum_buffer.b" in gs.open_checkpoint(tmp_path / "c")
    fresh, others = make()
    gs.load({"optimizer": OptimizerState(others, fresh)}, tmp_path / "c")
    assert torch.equal(others[1].state[fresh["b"]]["momentum_buffer"], pair[1].state[model["b"]]["momentum_buffer"])


@pytest.mark.parametrize("wrong", [None, 3, "adam", [None], {"": torch.optim.SGD(params("a").values()), "x": None}])
def test_what_is_no_optimizer_is_refused(wrong: Any) -> None:
    with pytest.raises(BadArgumentError, match="expected one with param_groups"):
        OptimizerState(wrong, {})


# Tied parameters.


class Tied(torch.nn.Module):
    def __init__(self, *, tie: bool = True) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(6, 4)
        self.head = torch.nn.Linear(4, 6, bias=False)
        if tie:
            self.head.weight = self.embed.weight
        else:
            self.head.weight.data.copy_(self.embed.weight.data)


def test_tied_parameters_have_state_under_both_names_and_load_untied(tmp_path: Path) -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    model.embed.weight.grad = torch.ones(6, 4)
    optimizer.step()
    report = gs.save({"model": model, "optimizer": OptimizerState(optimizer, {"model": model})}, tmp_path / "c")
    assert report.tensors == 6
    checkpoint = gs.open_checkpoint(tmp_path / "c")
    chunks = [checkpoint.info(f"optimizer.state.exp_avg.model.{name}.weight").chunks for name in ("embed", "head")]
    assert chunks[0] == chunks[1], "stored once"
    apart = Tied(tie=False)
    other = torch.optim.AdamW(apart.parameters())
    gs.load({"model": apart, "optimizer": OptimizerState(other, {"model": apart})}, tmp_path / "c")
    for param in apart.parameters():
        assert torch.equal(other.state[param]["exp_avg"], optimizer.state[model.embed.weight]["exp_avg"])
    first, second = (other.state[param]["exp_avg"] for param in apart.parameters())
    assert first.data_ptr() != second.data_ptr()
    again = Tied()
    third = torch.optim.AdamW(again.parameters())
    gs.load({"model": again, "optimizer": OptimizerState(third, {"model": again})}, tmp_path / "c")
    assert torch.equal(third.state[again.head.weight]["exp_avg"], first)
    assert len(third.state) == 1


def test_state_saved_untied_and_different_does_not_load_tied(tmp_path: Path) -> None:
    apart = Tied(tie=False)
    optimizer = torch.optim.AdamW(apart.parameters())
    for number, param in enumerate(apart.parameters()):
        param.grad = torch.full_like(param, number + 1.0)
    optimizer.step()
    gs.save({"optimizer": OptimizerState(optimizer, {"model": apart})}, tmp_path / "c")
    model = Tied()
    other = torch.optim.AdamW(model.parameters())
    with pytest.raises(MismatchError):
        gs.load({"optimizer": OptimizerState(other, {"model": model})}, tmp_path / "c")


# Copies of parameters.


def offloaded(names: str, stepping: str = "", dtype: torch.dtype = torch.bfloat16) -> Any:
    model = params(names, dtype)
    copies = {name: param.detach().float().clone().requires_grad_() for name, param in model.items()}
    optimizer = torch.optim.AdamW(copies.values(), lr=1e-4)
    for name in stepping:
        copies[name].grad = torch.full((3, 2), float(ord(name)))
    optimizer.step()
    for name, copy in copies.items():
        model[name].data.copy_(copy.data)
    main = {copies[name]: model[name] for name in names}
    return model, copies, optimizer, OptimizerState(optimizer, model, main_params=main)


def test_main_parameters_are_stored_to_the_bit_beside_their_bf16_ones(tmp_path: Path) -> None:
    model, copies, optimizer, state = offloaded("ab", "ab")
    gs.save({"model": model, "optimizer": state}, tmp_path / "c")
    checkpoint = gs.open_checkpoint(tmp_path / "c")
    kinds = {key: checkpoint.info(key).dtype for key in checkpoint.keys() if key.endswith("a")}  # noqa: SIM118 - a list
    assert kinds["model.a"] == "bfloat16"
    assert kinds["optimizer.state.fp32_param.a"] == kinds["optimizer.state.exp_avg.a"] == "float32"
    other_model, other_copies, other, state = offloaded("ab")
    for copy in other_copies.values():
        copy.data.zero_()
    gs.load({"model": other_model, "optimizer": state}, tmp_path / "c")
    for name in "ab":
        assert torch.equal(other_copies[name], copies[name])
        assert not torch.equal(copies[name].data, model[name].data.float()), "bf16 would not do"
        assert torch.equal(other.state[other_copies[name]]["exp_avg"], optimizer.state[copies[name]]["exp_avg"])
    assert "fp32_param of a" in state.report.loaded


def test_main_parameters_that_are_not_stored_are_made_from_the_models(tmp_path: Path) -> None:
    model = params("ab", torch.bfloat16)
    gs.save({"model": model, "optimizer": OptimizerState(adamw(model, "ab"), model)}, tmp_path / "c")
    other_model, copies, other, state = offloaded("ab")
    for copy in copies.values():
        copy.data.zero_()
    gs.load({"model": other_model, "optimizer": state}, tmp_path / "c")
    assert state.report.derived == ("a", "b")
    assert torch.equal(copies["a"].data, model["a"].data.float())
    assert other.state[copies["a"]]["exp_avg"].dtype == torch.bfloat16, "as it was stored"


def test_main_parameters_that_are_left_out_are_made_from_the_models(tmp_path: Path) -> None:
    model, _, _, state = offloaded("ab")
    gs.save({"model": model, "optimizer": state}, tmp_path / "c")
    other_model, copies, _, state = offloaded("ab")
    for copy in copies.values():
        copy.data.zero_()
    options = gs.LoadOptions(rename={"optimizer.state.fp32_param.b": None})
    gs.load({"model": other_model, "optimizer": state}, tmp_path / "c", options=options)
    assert (state.report.skipped, state.report.derived) == (("b",), ("b",))
    assert torch.equal(copies["b"].data, model["b"].data.float())


def test_fp32_moments_of_bf16_parameters_keep_every_bit(tmp_path: Path) -> None:
    model = params("a", torch.bfloat16)
    optimizer = torch.optim.AdamW(model.values())
    moment = torch.full((3, 2), 1 / 3)
    optimizer.state[model["a"]] = {"step": torch.tensor(5.0), "exp_avg": moment, "exp_avg_sq": moment * 2}
    gs.save({"optimizer": OptimizerState(optimizer, model)}, tmp_path / "c")
    fresh = params("a", torch.bfloat16)
    other = torch.optim.AdamW(fresh.values())
    gs.load({"optimizer": OptimizerState(other, fresh)}, tmp_path / "c")
    assert other.state[fresh["a"]]["exp_avg"].dtype == torch.float32
    assert torch.equal(other.state[fresh["a"]]["exp_avg_sq"], moment * 2)
    assert other.state[fresh["a"]]["step"].dtype == torch.float32


def test_flat_ranges_of_main_parameters_load_into_other_ranges(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(6, 4)

    def job(rank: int, ranks: int, *, filled: bool) -> Any:
        weight = torch.nn.Parameter(whole.bfloat16() if filled else torch.zeros(6, 4, dtype=torch.bfloat16))
        leaf = gs.ShardedTensor.from_rank_offsets("w", weight, replica_id=rank)
        part = slice(rank * 24 // ranks, (rank + 1) * 24 // ranks)
        copy = (whole.reshape(-1)[part] + 1 / 3 if filled else torch.zeros(part.stop - part.start)).requires_grad_()
        optimizer = torch.optim.SGD([copy], momentum=0.9)
        if filled:
            optimizer.state[copy]["momentum_buffer"] = copy.detach() * 7
        return leaf, copy, optimizer, OptimizerState(optimizer, [leaf], main_params={copy: (weight, part)})

    def save(group: Any) -> None:
        leaf, _, _, state = job(group.rank, 3, filled=True)
        gs.save({"model": [leaf], "optimizer": state}, tmp_path / "c", process_group=group)

    def load(group: Any) -> bool:
        leaf, copy, optimizer, state = job(group.rank, 5, filled=False)
        gs.load({"model": [leaf], "optimizer": state}, tmp_path / "c", process_group=group)
        expected = job(group.rank, 5, filled=True)[1].detach()
        return torch.equal(copy.detach(), expected) and torch.equal(optimizer.state[copy]["momentum_buffer"], expected * 7)

    run_ranks(3, save)
    assert all(run_ranks(5, load))


def test_a_copy_may_be_described_by_a_sharded_tensor(tmp_path: Path) -> None:
    """Ranges that ranks of an outer group hold twice: their replica ids are the caller's to say."""

    def job(group: Any) -> Any:
        part = slice(12 * (group.rank % 2), 12 * (group.rank % 2) + 12)
        copy = torch.arange(24.0)[part].clone().requires_grad_()
        shard = gs.ShardedTensor.from_rank_offsets_flat(
            "w", copy.detach(), (6, 4), flattened_range=part, replica_id=group.rank // 2
        )
        optimizer = torch.optim.SGD([copy], momentum=0.9)
        return copy, optimizer, OptimizerState(optimizer, {}, main_params={copy: shard})

    def save(group: Any) -> None:
        copy, optimizer, state = job(group)
        optimizer.state[copy] = {"momentum_buffer": copy.detach() + 1}
        gs.save({"optimizer": state}, tmp_path / "c", process_group=group)

    run_ranks(4, save)
    checkpoint = gs.open_checkpoint(tmp_path / "c")
    assert checkpoint["optimizer.state.momentum_buffer.w"][...].reshape(-1).tolist() == [n + 1.0 for n in range(24)]
    assert checkpoint["optimizer.state.fp32_param.w"].shape == (6, 4)


def test_a_main_parameter_is_loaded_where_other_state_of_it_is_dropped(tmp_path: Path) -> None:
    """An optimizer with a preconditioner of its range of a parameter, under other ranges."""

    def job(part: slice) -> Any:
        weight = torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.bfloat16))
        copy = torch.zeros(part.stop - part.start, requires_grad=True)
        optimizer = torch.optim.SGD([copy])
        options = OptimizerOptions(on_uncuttable="drop")
        main = {copy: (weight, part)}
        leaf = gs.ShardedTensor.from_rank_offsets("w", weight)
        return copy, optimizer, OptimizerState(optimizer, [leaf], main_params=main, options=options)

    def save(group: Any) -> None:
        copy, optimizer, state = job(slice(12 * group.rank, 12 * group.rank + 12))
        copy.data.fill_(1 / 3)
        optimizer.state[copy] = {"inverse": torch.ones(5, 5)}
        gs.save({"optimizer": state}, tmp_path / "c", process_group=group)

    run_ranks(2, save)
    copy, optimizer, state = job(slice(0, 24))
    assert gs.load({"optimizer": state}, tmp_path / "c").report.missing == ()
    assert (state.report.dropped, state.report.derived) == (("w",), ())
    assert torch.equal(copy.detach(), torch.full((24,), 1 / 3))
    assert not optimizer.state


# Stacked parameters.


def expert(number: int, param: torch.Tensor, experts: int = 4) -> gs.ShardedTensor:
    return gs.ShardedTensor.from_rank_offsets("experts", param, (0, number, experts), prepend_axis_num=1)


def test_experts_without_tokens_have_no_state_while_others_of_their_key_have(tmp_path: Path) -> None:
    def job(rank: int, ranks: int, stepping: tuple[int, ...]) -> Any:
        numbers = [number for number in range(4) if number * ranks // 4 == rank]
        weights = {number: torch.nn.Parameter(torch.full((2, 3), float(number))) for number in numbers}
        optimizer = torch.optim.AdamW(weights.values())
        for _ in range(2):
            for number in numbers:
                weights[number].grad = torch.full((2, 3), number + 1.0) if number in stepping else None
            optimizer.step()
        return weights, optimizer, OptimizerState(optimizer, [expert(n, weight) for n, weight in weights.items()])

    def save(group: Any) -> None:
        gs.save({"optimizer": job(group.rank, 2, (0, 2, 3))[2]}, tmp_path / "c", process_group=group)

    def load(group: Any) -> dict[int, bool]:
        weights, optimizer, state = job(group.rank, 4, ())
        report = gs.load({"optimizer": state}, tmp_path / "c", process_group=group).report
        assert report.missing == report.unexpected == ()
        return {number: weight in optimizer.state for number, weight in weights.items()}

    run_ranks(2, save)
    found = run_ranks(4, load)
    assert {n: has for held in found for n, has in held.items()} == {0: True, 1: False, 2: True, 3: True}


def test_places_filled_for_parameters_without_state_are_not_missing(tmp_path: Path) -> None:
    """No expert has state; another parameter of the group has, so that all are filled."""

    def job() -> Any:
        weights = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
        dense = torch.nn.Parameter(torch.ones(4))
        optimizer = torch.optim.AdamW([*weights, dense])
        leaves = [*(expert(n, weight, 2) for n, weight in enumerate(weights)), gs.ShardedTensor.from_rank_offsets("d", dense)]
        return dense, optimizer, OptimizerState(optimizer, leaves)

    dense, optimizer, state = job()
    dense.grad = torch.ones(4)
    optimizer.step()
    gs.save({"optimizer": state}, tmp_path / "c")
    assert "optimizer.state.exp_avg.experts" in gs.open_checkpoint(tmp_path / "c")
    fresh, other, state = job()
    report = gs.load({"optimizer": state}, tmp_path / "c").report
    assert report.missing == report.unexpected == ()
    assert set(other.state) == {fresh}
    assert state.report.without_state == ("experts", "experts")


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adafactor])
def test_an_expert_without_tokens_may_be_the_only_one_of_its_group_on_a_rank(make: Any, tmp_path: Path) -> None:
    """What other groups and statistics have shows what its state would be."""

    def job(group: Any) -> Any:
        dense, weight = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2, 3))
        optimizer = make([{"params": [weight], "weight_decay": 0.5}, {"params": [dense]}])
        leaves = [expert(group.rank, weight, 2), gs.ShardedTensor.from_rank_offsets("d", dense, replica_id=group.rank)]
        return weight, dense, optimizer, OptimizerState(optimizer, leaves)

    def save(group: Any) -> dict[str, torch.Tensor]:
        weight, dense, optimizer, state = job(group)
        dense.grad = torch.ones_like(dense)
        weight.grad = torch.rand(2, 3) if group.rank == 0 else None
        optimizer.step()
        gs.save({"optimizer": state}, tmp_path / "c", process_group=group)
        return dict(optimizer.state.get(weight, {}))

    def load(group: Any) -> dict[str, torch.Tensor]:
        weight, _, optimizer, state = job(group)
        report = gs.load({"optimizer": state}, tmp_path / "c", process_group=group).report
        assert report.missing == report.unexpected == ()
        return dict(optimizer.state.get(weight, {}))

    before, after = run_ranks(2, save), run_ranks(2, load)
    assert before[1] == after[1] == {}
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())


def test_experts_with_statistics_and_without_tokens_on_one_rank(tmp_path: Path) -> None:
    weights = [torch.nn.Parameter(torch.rand(2, 3)) for _ in range(2)]
    optimizer = torch.optim.Adafactor(weights)
    weights[0].grad = torch.rand(2, 3)
    optimizer.step()
    gs.save({"optimizer": OptimizerState(optimizer, [expert(n, w, 2) for n, w in enumerate(weights)])}, tmp_path / "c")
    fresh = [torch.nn.Parameter(torch.rand(2, 3)) for _ in range(2)]
    other = torch.optim.Adafactor(fresh)
    gs.load({"optimizer": OptimizerState(other, [expert(n, w, 2) for n, w in enumerate(fresh)])}, tmp_path / "c")
    assert set(other.state) == {fresh[0]}
    assert torch.equal(other.state[fresh[0]]["row_var"], optimizer.state[weights[0]]["row_var"])


def test_state_that_was_not_saved_is_removed(tmp_path: Path) -> None:
    model = params("a")
    gs.save({"optimizer": OptimizerState(adamw(model, "a"), model)}, tmp_path / "c")
    fresh = params("a")
    optimizer = stepped(torch.optim.AdamW(fresh.values(), amsgrad=True), fresh, "a")
    state = OptimizerState(optimizer, fresh)
    gs.load({"optimizer": state}, tmp_path / "c")
    assert state.report.removed == ("max_exp_avg_sq of a",)
    assert set(optimizer.state[fresh["a"]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.param_groups[0]["amsgrad"] is False
    stepped(optimizer, fresh, "a")


def test_experts_that_become_one_parameter_must_agree(tmp_path: Path) -> None:
    def save(path: Path, steps: list[int]) -> None:
        weights = [torch.nn.Parameter(torch.ones(2, 3)) for _ in steps]
        optimizer = torch.optim.SGD(weights, momentum=0.9)
        for number, weight in enumerate(weights):
            optimizer.state[weight] = {"momentum_buffer": torch.full((2, 3), float(number)), "seen": steps[number]}
        gs.save({"optimizer": OptimizerState(optimizer, [expert(n, w, 2) for n, w in enumerate(weights)])}, path)

    together = torch.nn.Parameter(torch.ones(2, 2, 3))
    leaf = gs.ShardedTensor.from_rank_offsets("experts", together)
    save(tmp_path / "same", [5, 5])
    optimizer = torch.optim.SGD([together], momentum=0.9)
    gs.load({"optimizer": OptimizerState(optimizer, [leaf])}, tmp_path / "same")
    assert optimizer.state[together]["momentum_buffer"][:, 0, 0].tolist() == [0.0, 1.0]
    assert optimizer.state[together]["seen"] == 5
    save(tmp_path / "different", [5, 6])
    with pytest.raises(MismatchError, match=r"positions \(0,\) and \(1,\) had different steps"):
        gs.load({"optimizer": OptimizerState(optimizer, [leaf])}, tmp_path / "different")
    state = OptimizerState(optimizer, [leaf], options=OptimizerOptions(on_uncuttable="drop"))
    report = gs.load({"optimizer": state}, tmp_path / "different").report
    assert report.missing == report.unexpected == ()
    assert state.report.dropped == ("experts",)
    assert not optimizer.state


def test_a_parameter_stacked_otherwise_than_it_can_be_is_named(tmp_path: Path) -> None:
    weights = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(4)]
    optimizer = torch.optim.SGD(weights, momentum=0.9)
    gs.save(
        {"optimizer": OptimizerState(optimizer, [expert(n, weight, 4) for n, weight in enumerate(weights)])}, tmp_path / "c"
    )
    flat = torch.nn.Parameter(torch.ones(8, 3))
    other = torch.optim.SGD([flat], momentum=0.9)
    with pytest.raises(MismatchError, match=r"experts: stacked \(4,\) when saved, its shape is \(8, 3\) now"):
        gs.load({"optimizer": OptimizerState(other, {"experts": flat})}, tmp_path / "c")
    state = OptimizerState(other, {"experts": flat}, options=OptimizerOptions(on_uncuttable="drop"))
    assert gs.load({"optimizer": state}, tmp_path / "c").report.missing == ()
    assert state.report.dropped == ("experts",)


def test_one_parameter_becomes_experts(tmp_path: Path) -> None:
    together = torch.nn.Parameter(torch.ones(2, 2, 3))
    optimizer = torch.optim.SGD([together], momentum=0.9)
    optimizer.state[together] = {"momentum_buffer": torch.arange(12.0).reshape(2, 2, 3)}
    leaf = gs.ShardedTensor.from_rank_offsets("experts", together)
    gs.save({"optimizer": OptimizerState(optimizer, [leaf])}, tmp_path / "c")
    weights = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    other = torch.optim.SGD(weights, momentum=0.9)
    gs.load({"optimizer": OptimizerState(other, [expert(n, w, 2) for n, w in enumerate(weights)])}, tmp_path / "c")
    assert torch.equal(other.state[weights[1]]["momentum_buffer"], torch.arange(6.0, 12.0).reshape(2, 3))


def test_parts_of_one_parameter_on_a_rank_must_have_had_the_same_steps() -> None:
    halves = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    optimizer = torch.optim.AdamW(halves)
    leaves = [gs.ShardedTensor.from_rank_offsets("w", half, (0, n, 2)) for n, half in enumerate(halves)]
    state = OptimizerState(optimizer, leaves)
    for half in halves:
        half.grad = torch.ones(2, 3)
    optimizer.step()
    assert len(state.state_dict()["state"]["exp_avg"]) == 2
    optimizer.state[halves[1]]["step"] += 1
    with pytest.raises(BadArgumentError, match="two parts of parameter 'w'"):
        state.state_dict()


def test_ranks_whose_steps_of_one_parameter_differ_are_an_error(tmp_path: Path) -> None:
    def save(group: Any) -> None:
        weight = torch.nn.Parameter(torch.ones(2, 3))
        optimizer = torch.optim.AdamW([weight])
        weight.grad = torch.ones(2, 3)
        optimizer.step()
        optimizer.state[weight]["step"] += group.rank
        leaf = gs.ShardedTensor.from_rank_offsets("w", weight, (0, group.rank, 2))
        gs.save({"optimizer": OptimizerState(optimizer, [leaf])}, tmp_path / "c", process_group=group)

    with pytest.raises(RanksFailedError) as caught:
        run_ranks(2, save)
    assert isinstance(caught.value.errors[0], DisagreementError)
    assert "optimizer.param.w" in str(caught.value.errors[0])


def test_a_factory_parameter_gets_its_state_in_a_fresh_optimizer(tmp_path: Path) -> None:
    def build(key: str, data: torch.Tensor, replica_id: Any, _flat: Any) -> dict[str, gs.ShardedTensor]:
        parts = zip(("gate", "up"), data.chunk(2), strict=True)
        return {name: gs.ShardedTensor.from_rank_offsets(f"{key}.{name}", half, replica_id=replica_id) for name, half in parts}

    def job() -> Any:
        weight = torch.nn.Parameter(torch.ones(4, 3))
        factory = gs.ShardedTensorFactory("mlp", weight, build, lambda parts: torch.cat([parts["gate"], parts["up"]]))
        optimizer = torch.optim.AdamW([weight])
        return weight, optimizer, OptimizerState(optimizer, {"mlp": factory})

    weight, optimizer, state = job()
    weight.grad = torch.arange(12.0).reshape(4, 3)
    optimizer.step()
    gs.save({"optimizer": state}, tmp_path / "c")
    other_weight, other, state = job()
    gs.load({"optimizer": state}, tmp_path / "c")
    assert torch.equal(other.state[other_weight]["exp_avg"], optimizer.state[weight]["exp_avg"])
    assert other.state[other_weight]["step"] == 1


def test_an_asynchronous_save_stores_state_and_steps_of_the_time_of_the_call(tmp_path: Path) -> None:
    model = params("ab")
    optimizer = adamw(model, "ab")
    pending = gs.async_save({"optimizer": OptimizerState(optimizer, model)}, tmp_path / "c")
    pending.wait_staged()
    before = {name: optimizer.state[model[name]]["exp_avg"].clone() for name in "ab"}
    stepped(optimizer, model, "ab")
    optimizer.param_groups[0]["lr"] = 9.0
    pending.result()
    fresh = params("ab")
    other = adamw(fresh)
    gs.load({"optimizer": OptimizerState(other, fresh)}, tmp_path / "c")
    assert all(torch.equal(other.state[fresh[name]]["exp_avg"], before[name]) for name in "ab")
    assert other.state[fresh["a"]]["step"] == 1
    assert other.param_groups[0]["lr"] == 1e-3


def test_state_of_tensors_in_no_group_is_not_dropped_silently() -> None:
    model = params("ab")
    optimizer = adamw(model, "ab")
    optimizer.param_groups[0]["params"].pop()
    with pytest.raises(BadArgumentError, match="state of 1 tensors that are in none of its param groups"):
        OptimizerState(optimizer, model).state_dict()


def test_state_of_no_parameter_is_stored_too(tmp_path: Path) -> None:
    model, fresh = params("a"), params("a")
    optimizer, other = adamw(model, "a"), adamw(fresh)
    optimizer.state["rounds"] = 3  # type: ignore[index]
    gs.save({"optimizer": OptimizerState(optimizer, model)}, tmp_path / "c")
    gs.load({"optimizer": OptimizerState(other, fresh)}, tmp_path / "c")
    assert other.state["rounds"] == 3  # type: ignore[index]


def test_parameters_and_generators_are_untouched_by_a_load_into_a_fresh_optimizer(tmp_path: Path) -> None:
    model = params("ab")
    gs.save({"optimizer": OptimizerState(adamw(model, "ab"), model)}, tmp_path / "c")
    fresh = params("ab")
    optimizer = adamw(fresh)
    before = {name: param.detach().clone() for name, param in fresh.items()}
    generator = torch.get_rng_state()
    gs.load({"optimizer": OptimizerState(optimizer, fresh)}, tmp_path / "c")
    assert all(torch.equal(fresh[name], before[name]) and fresh[name].grad is None for name in "ab")
    assert torch.equal(torch.get_rng_state(), generator)


def test_new_state_is_made_where_the_options_say(tmp_path: Path) -> None:
    model = params("a")
    gs.save({"optimizer": OptimizerState(adamw(model, "a"), model)}, tmp_path / "c")
    fresh = params("a")
    other = adamw(fresh)
    gs.load({"optimizer": OptimizerState(other, fresh, options=OptimizerOptions(device="cpu"))}, tmp_path / "c")
    assert other.state[fresh["a"]]["exp_avg"].device.type == "cpu"


@pytest.mark.parametrize(
    "wrong",
    [
        {"on_group_conflict": "x"},
        {"on_uncuttable": "x"},
        {"statistics": {"r": (1, True)}},
        {"statistics": {"r": -1}},
        {"of_shards": "left"},
        {"of_shards": [3]},
    ],
)
def test_options_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadArgumentError):
        OptimizerOptions(**wrong)


def test_two_shards_of_one_tensor_keep_their_own_state(tmp_path: Path) -> None:
    halves = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    leaves = [replace(gs.ShardedTensor.from_rank_offsets("w", half, (0, n, 2))) for n, half in enumerate(halves)]
    optimizer = torch.optim.SGD(halves, momentum=0.9)
    for number, half in enumerate(halves):
        optimizer.state[half] = {"momentum_buffer": torch.full((2, 3), float(number))}
    gs.save({"optimizer": OptimizerState(optimizer, leaves)}, tmp_path / "c")
    whole = torch.nn.Parameter(torch.ones(4, 3))
    other = torch.optim.SGD([whole], momentum=0.9)
    gs.load({"optimizer": OptimizerState(other, [gs.ShardedTensor.from_rank_offsets("w", whole)])}, tmp_path / "c")
    assert other.state[whole]["momentum_buffer"][:, 0].tolist() == [0, 0, 1, 1]


def test_optimizers_may_be_called_anything_but_alike(tmp_path: Path) -> None:
    def optimizers(model: torch.nn.Linear, names: tuple[Any, Any]) -> dict[Any, torch.optim.Optimizer]:
        return {name: torch.optim.SGD([param], momentum=0.9) for name, param in zip(names, model.parameters(), strict=True)}

    model = torch.nn.Linear(2, 3)
    with pytest.raises(BadArgumentError, match="the same text"):
        OptimizerState(optimizers(model, (0, "0")), model)
    names = ("param_groups", "state")
    before, other = optimizers(model, names), torch.nn.Linear(2, 3)
    model(torch.ones(1, 2)).sum().backward()
    for optimizer in before.values():
        optimizer.step()
    gs.save({"optimizer": OptimizerState(before, model)}, tmp_path / "c")
    after = optimizers(other, names)
    gs.load({"optimizer": OptimizerState(after, other)}, tmp_path / "c")
    assert after["param_groups"].state[other.weight]["momentum_buffer"].tolist() == [[1.0, 1.0]] * 3
    assert after["state"].state[other.bias]["momentum_buffer"].tolist() == [1.0] * 3


def test_what_was_not_loaded_is_not_taken_for_loaded() -> None:
    model = params("a")
    state = OptimizerState(adamw(model, "a"), model)
    for wrong in (state.state_dict(), torch.optim.AdamW(model.values()).state_dict()):
        with pytest.raises(BadArgumentError, match="Pass the OptimizerState to load"):
            state.load_state_dict(wrong)


def test_an_empty_part_without_state_does_not_speak_for_its_parameter(tmp_path: Path) -> None:
    """Ranges of a flat buffer: a rank's may be empty, and its optimizer leave such a parameter out of its steps."""

    def save(group: Any) -> None:
        part = [slice(0, 6), slice(6, 6)][group.rank]
        param = torch.nn.Parameter(torch.ones(part.stop - part.start))
        optimizer = torch.optim.AdamW([param])
        if group.rank == 0:
            param.grad = torch.ones(6)
            optimizer.step()
        leaf = gs.ShardedTensor.from_rank_offsets_flat("w", param.detach(), (2, 3), flattened_range=part)
        gs.save({"optimizer": OptimizerState(optimizer, [leaf])}, tmp_path / "c", process_group=group)

    run_ranks(2, save)
    whole = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([whole])
    gs.load({"optimizer": OptimizerState(optimizer, [gs.ShardedTensor.from_rank_offsets("w", whole)])}, tmp_path / "c")
    assert optimizer.state[whole]["step"] == 1
    assert optimizer.state[whole]["exp_avg"].shape == (2, 3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}, {}], ids=str)
def test_steps_of_gpu_optimizers_are_where_they_are_used(options: dict[str, Any], tmp_path: Path) -> None:
    def make() -> Any:
        model = {name: torch.nn.Parameter(param.detach().cuda()) for name, param in params("ab").items()}
        return model, torch.optim.AdamW(model.values(), **options)

    model, optimizer = make()
    stepped(optimizer, model, "ab")
    gs.save({"optimizer": OptimizerState(optimizer, model)}, tmp_path / "c")
    fresh, other = make()
    gs.load({"optimizer": OptimizerState(other, fresh)}, tmp_path / "c")
    for name in "ab":
        for what, value in optimizer.state[model[name]].items():
            found = other.state[fresh[name]][what]
            assert found.device == value.device
            assert torch.equal(found, value)
    stepped(other, fresh, "ab")
