"""State that is not shaped like its parameter: statistics over an axis, preconditioners, values, objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import pytest
import torch

import giantstep as gs
from giantstep.errors import BadArgumentError, CorruptionError, MismatchError, UnsupportedTypeError
from giantstep.optimizer import OptimizerOptions, OptimizerState
from giantstep.optimizer.kinds import DISTRIBUTED, ELEMENTS, SHARD, SHARD_OBJECT, VALUE, kind_of, statistic
from giantstep.optimizer.options import STATISTICS
from giantstep.testing.ranks import RanksFailedError, run_ranks

WHOLE = torch.arange(48.0).reshape(8, 6) + 1


class RowScaled(torch.Tensor):
    """int8 values, and a scale for every four rows."""

    int8: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> Self:
        self = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)
        self.int8, self.scale = values, scale
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


class Rank:
    """A weight, and a bias that all ranks hold, in a layout: how many parts along which axis, or flat."""

    def __init__(self, group: Any, layout: str, make: Any, options: OptimizerOptions | None = None) -> None:
        rank, ranks = group.rank, group.size
        axis = {"rows": 0, "columns": 1}.get(layout)
        if axis is not None:
            self.weight = torch.nn.Parameter(WHOLE.chunk(ranks, dim=axis)[rank].contiguous())
            leaf = gs.ShardedTensor.from_rank_offsets("w", self.weight, (axis, rank, ranks))
        else:
            part = slice(rank * 48 // ranks, (rank + 1) * 48 // ranks)
            self.weight = torch.nn.Parameter(WHOLE.reshape(-1)[part].clone())
            leaf = gs.ShardedTensor.from_rank_offsets_flat("w", self.weight, (8, 6), flattened_range=part)
        self.bias = torch.nn.Parameter(torch.ones(8))
        self.optimizer = make([self.weight, self.bias])
        leaves = [leaf, gs.ShardedTensor.from_rank_offsets("b", self.bias, replica_id=rank)]
        self.state = OptimizerState(self.optimizer, leaves, options=options)
        self.leaves = leaves

    def train(self, steps: int) -> Rank:
        for step in range(steps):
            for param in (self.weight, self.bias):
                param.grad = torch.sin(param.detach() + step)
            self.optimizer.step()
        return self

    def of(self, name: str) -> Any:
        return self.optimizer.state[self.weight][name]


def saved(path: Path, ranks: int, layout: str, make: Any, steps: int = 2) -> list[Rank]:
    def save(group: Any) -> Rank:
        rank = Rank(group, layout, make).train(steps)
        gs.save({"model": rank.leaves, "optimizer": rank.state}, path, process_group=group)
        return rank

    return run_ranks(ranks, save)


def loaded(path: Path, ranks: int, layout: str, make: Any, options: OptimizerOptions | None = None) -> list[Rank]:
    def load(group: Any) -> Rank:
        rank = Rank(group, layout, make, options)
        report = gs.load({"model": rank.leaves, "optimizer": rank.state}, path, process_group=group).report
        assert report.missing == report.unexpected == ()
        return rank

    return run_ranks(ranks, load)


def same_values(left: dict[str, Any], right: dict[str, Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, list):
            return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, dict):
            return isinstance(b, dict) and same_values(a, b)
        return bool(a == b)

    return left.keys() == right.keys() and all(same(value, right[name]) for name, value in left.items())


def adafactor(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(params, lr=0.1)


class OtherAdafactor(torch.optim.Optimizer):
    """Statistics without the axis that they are over, as in transformers."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            state["step"] = state.get("step", 0) + 1
            state["RMS"] = None
            if param.dim() == 2:
                state["exp_avg_sq_row"] = state.get("exp_avg_sq_row", 0) * 0.9 + param.grad.pow(2).mean(-1)
                state["exp_avg_sq_col"] = state.get("exp_avg_sq_col", 0) * 0.9 + param.grad.pow(2).mean(-2)
                scale = state["exp_avg_sq_row"][:, None] * state["exp_avg_sq_col"][None, :]
                param.sub_(param.grad / (scale.sqrt() + 1))


class Shampoo(torch.optim.Optimizer):
    """A preconditioner for each axis, in a dict, and one beside it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            if param.dim() == 2:
                state = self.state[param]
                state["left"] = state.get("left", 0) + param.grad @ param.grad.T
                state["more"] = {"right": state.get("more", {"right": 0})["right"] + param.grad.T @ param.grad, "kind": "x"}
                param.sub_(0.01 * state["left"] @ param.grad)


KINDS = {"adafactor": adafactor, "other adafactor": OtherAdafactor, "shampoo": Shampoo}


@pytest.mark.parametrize("layout", ["rows", "columns", "flat"])
@pytest.mark.parametrize("name", KINDS)
def test_in_the_layout_that_saved_all_state_is_the_same_and_training_goes_on(name: str, layout: str, tmp_path: Path) -> None:
    before = saved(tmp_path / "c", 2, layout, KINDS[name])
    after = loaded(tmp_path / "c", 2, layout, KINDS[name])
    for left, right in zip(before, after, strict=True):
        for first, second in ((left.weight, right.weight), (left.bias, right.bias)):
            assert same_values(left.optimizer.state.get(first, {}), right.optimizer.state.get(second, {}))
        left.train(2)
        right.train(2)
        assert torch.equal(left.weight, right.weight)
        assert torch.equal(left.bias, right.bias)


def test_a_statistic_over_an_axis_that_is_whole_is_cut_anew(tmp_path: Path) -> None:
    options = OptimizerOptions(statistics={"rows": (-1, True), "flat_rows": (-1, False)})

    def job(group: Any, *, filled: bool) -> Rank:
        rank = Rank(group, "rows", lambda params: torch.optim.SGD(params, momentum=0.9), options)
        if filled:
            rank.optimizer.state[rank.weight] = {
                "rows": rank.weight.detach().sum(-1, keepdim=True),
                "flat_rows": rank.weight.detach().sum(-1).double(),
            }
        return rank

    run_ranks(2, lambda group: gs.save({"optimizer": job(group, filled=True).state}, tmp_path / "c", process_group=group))
    checkpoint = gs.open_checkpoint(tmp_path / "c")
    assert checkpoint["optimizer.state.rows.w"].shape == (8, 1)
    assert checkpoint["optimizer.state.flat_rows.w"].shape == (8,)

    def load(group: Any) -> Rank:
        rank = job(group, filled=False)
        gs.load({"optimizer": rank.state}, tmp_path / "c", process_group=group)
        return rank

    for ranks in (1, 4):
        for rank in run_ranks(ranks, load):
            assert torch.equal(rank.of("rows"), rank.weight.detach().sum(-1, keepdim=True))
            assert torch.equal(rank.of("flat_rows"), rank.weight.detach().sum(-1).double())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("source", "target"), [((2, "rows"), (2, "columns")), ((2, "rows"), (1, "rows")), ((1, "rows"), (3, "columns"))]
)
def test_state_of_another_part_is_an_error_that_says_so_before_anything_changes(
    name: str, source: tuple[int, str], target: tuple[int, str], tmp_path: Path
) -> None:
    saved(tmp_path / "c", *source, KINDS[name])
    with pytest.raises(RanksFailedError) as caught:
        loaded(tmp_path / "c", *target, KINDS[name])
    error = caught.value.errors[0]
    assert isinstance(error, MismatchError)
    assert "of w: nothing is stored for the shard" in str(error)
    assert "on_uncuttable='drop'" in str(error)
    for rank in loaded(tmp_path / "c", *target, KINDS[name], OptimizerOptions(on_uncuttable="drop")):
        assert rank.weight not in rank.optimizer.state
        assert rank.state.report.dropped == ("w",)
        assert (rank.bias in rank.optimizer.state) == (name != "shampoo")
        rank.train(1)


def test_statistics_of_a_rank_with_a_row_are_not_taken_for_elements(tmp_path: Path) -> None:
    """With one row per rank the statistic over rows has the shape of the rank's part."""
    saved(tmp_path / "c", 8, "rows", adafactor)
    after = loaded(tmp_path / "c", 8, "rows", adafactor)
    assert after[3].of("col_var").shape == (1, 6)
    with pytest.raises(RanksFailedError):
        loaded(tmp_path / "c", 4, "rows", adafactor)


def test_statistics_of_a_parameter_that_is_described_in_another_shape_load_where_that_is_the_same(tmp_path: Path) -> None:
    def job() -> Any:
        weight = torch.nn.Parameter(WHOLE.clone())
        optimizer = adafactor([weight])
        return weight, optimizer, OptimizerState(optimizer, [gs.ShardedTensor.from_rank_offsets("w", weight.view(2, 4, 6))])

    weight, optimizer, state = job()
    weight.grad = torch.rand(8, 6)
    optimizer.step()
    gs.save({"optimizer": state}, tmp_path / "c")
    fresh, other, state = job()
    gs.load({"optimizer": state}, tmp_path / "c")
    assert same_values(dict(optimizer.state[weight]), dict(other.state[fresh]))


def test_lbfgs_loads_in_its_own_layout(tmp_path: Path) -> None:
    def make(params: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(params, lr=0.1, max_iter=3)

    class Single:
        rank, size = 0, 1

    def train(rank: Rank, steps: int) -> None:
        def closure() -> torch.Tensor:
            rank.optimizer.zero_grad()
            loss = (rank.weight.sin().sum() + rank.bias.pow(2).sum()).abs()
            loss.backward()
            return loss

        for _ in range(steps):
            rank.optimizer.step(closure)

    rank = Rank(Single, "rows", make)
    train(rank, 2)
    gs.save({"model": rank.leaves, "optimizer": rank.state}, tmp_path / "c")
    other = Rank(Single, "rows", make)
    gs.load({"model": other.leaves, "optimizer": other.state}, tmp_path / "c")
    assert same_values(dict(rank.optimizer.state[rank.weight]), dict(other.optimizer.state[other.weight]))
    train(rank, 2)
    train(other, 2)
    assert torch.equal(rank.weight, other.weight)


VALUES: dict[str, Any] = {
    "count": 7,
    "ratio": 0.1,
    "nothing": None,
    "text": "warm",
    "history": [1, 2.5, (3, "x")],
    "table": {"a": {"b": 1}},
    "one": torch.tensor([5], dtype=torch.int32),
    "flag": torch.tensor(True),
    "small": {"t": torch.tensor(2.0)},
}


def test_values_of_every_kind_come_back_as_they_were_in_any_layout(tmp_path: Path) -> None:
    def job(group: Any, layout: str) -> Rank:
        return Rank(group, layout, lambda params: torch.optim.SGD(params, lr=0.1))

    def save(group: Any) -> None:
        rank = job(group, "rows")
        rank.optimizer.state[rank.weight] = dict(VALUES)
        gs.save({"optimizer": rank.state}, tmp_path / "c", process_group=group)

    def load(group: Any) -> bool:
        rank = job(group, "columns")
        gs.load({"optimizer": rank.state}, tmp_path / "c", process_group=group)
        found = dict(rank.optimizer.state[rank.weight])
        return torch.equal(found.pop("small")["t"], torch.tensor(2.0)) and same_values(
            found, {name: value for name, value in VALUES.items() if name != "small"}
        )

    run_ranks(2, save)
    assert all(run_ranks(3, load))


def test_what_cannot_be_stored_and_names_that_cannot_be_keys_are_refused(tmp_path: Path) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param])
    optimizer.state[param] = {"hook": lambda: None}
    with pytest.raises(UnsupportedTypeError, match="hook"):
        gs.save({"optimizer": OptimizerState(optimizer, {"w": param})}, tmp_path / "c")
    optimizer.state[param] = {"exp.avg": torch.ones(3)}
    with pytest.raises(BadArgumentError, match="a text without a dot"):
        gs.save({"optimizer": OptimizerState(optimizer, {"w": param})}, tmp_path / "c")


def test_kinds_follow_from_shapes_and_names() -> None:
    param = torch.zeros(4, 3)

    def kind(name: str, value: Any) -> Any:
        return kind_of(name, value, param, STATISTICS)

    assert kind("exp_avg", torch.zeros(4, 3)) == ELEMENTS
    assert kind("row_var", torch.zeros(4, 1)) == statistic(-1, keeps_axis=True)
    assert kind("exp_avg_sq_col", torch.zeros(3)) == statistic(-2, keeps_axis=False)
    assert kind("rows", torch.zeros(4, 1)) == SHARD
    assert kind("q", torch.zeros(4, 4)) == SHARD
    assert kind("step", torch.zeros(4, 3)) == kind("x", torch.tensor(1.0)) == kind("n", 3) == VALUE
    assert kind("old", [torch.zeros(12)]) == SHARD_OBJECT
    assert kind_of("exp_avg", torch.zeros(()), torch.zeros(()), STATISTICS) == ELEMENTS
    assert DISTRIBUTED != SHARD


@pytest.mark.parametrize("fused", [False, True])
def test_a_scalar_parameter_keeps_moment_and_step_apart(fused: bool, tmp_path: Path) -> None:
    def make() -> Any:
        param = torch.nn.Parameter(torch.tensor(2.0))
        return param, torch.optim.AdamW([param], fused=fused)

    param, optimizer = make()
    param.grad = torch.tensor(3.0)
    optimizer.step()
    gs.save({"optimizer": OptimizerState(optimizer, {"w": param})}, tmp_path / "c")
    fresh, other = make()
    gs.load({"optimizer": OptimizerState(other, {"w": fresh})}, tmp_path / "c")
    assert same_values(optimizer.state[param], other.state[fresh])


def test_wrapper_tensors_as_state_load_where_the_optimizer_has_them(tmp_path: Path) -> None:
    """As of optimizers with quantised moments: of a class without `detach`, stored as its parts."""
    gs.register_wrapper(
        RowScaled,
        name="test_optimizer_kinds.RowScaled",
        take_apart=lambda tensor: ({"int8": tensor.int8, "scale": tensor.scale}, {}),
        put_together=lambda parts, attributes: RowScaled(parts["int8"], parts["scale"]),
    )

    def make() -> Any:
        param = torch.nn.Parameter(torch.ones(8, 2))
        return param, torch.optim.SGD([param]), gs.ShardedTensor.from_rank_offsets("w", param)

    param, optimizer, leaf = make()
    quantised = RowScaled(torch.arange(16, dtype=torch.int8).reshape(8, 2), torch.tensor([[2.0], [3.0]]))
    optimizer.state[param] = {"moment": quantised, "step": torch.tensor(3.0)}
    gs.save({"optimizer": OptimizerState(optimizer, [leaf])}, tmp_path / "c")
    assert "optimizer.state.moment.w.int8" in gs.open_checkpoint(tmp_path / "c")
    fresh, other, leaf = make()
    with pytest.raises(MismatchError, match="Let the optimizer make its state before loading"):
        gs.load({"optimizer": OptimizerState(other, [leaf])}, tmp_path / "c")
    target = RowScaled(torch.zeros(8, 2, dtype=torch.int8), torch.zeros(2, 1))
    other.state[fresh] = {"moment": target, "step": torch.tensor(0.0)}
    gs.load({"optimizer": OptimizerState(other, [leaf])}, tmp_path / "c")
    assert other.state[fresh]["moment"] is target
    assert torch.equal(target.int8, quantised.int8)
    assert torch.equal(target.scale, quantised.scale)
    assert other.state[fresh]["step"] == 3


@pytest.mark.parametrize(
    "wrong",
    [
        3,
        {},
        {"group": "", "tensors": {"a": ["elements"]}, "values": {}, "beside": [], "filler": []},
        {"group": 3, "tensors": {}, "values": {}, "beside": [], "filler": []},
        {"group": "g", "tensors": {"a": ["statistic", 1, True]}, "values": {}, "beside": [], "filler": []},
        {"group": "g", "tensors": {"a": "elements"}, "values": {}, "beside": [], "filler": []},
        {"group": "g", "tensors": {3: ["elements"]}, "values": {}, "beside": [], "filler": []},
    ],
)
def test_what_is_no_record_is_called_damaged(wrong: Any, tmp_path: Path) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    gs.save({"x": gs.ShardedObject("optimizer.param.w", wrong, (), ())}, tmp_path / "c")
    state = OptimizerState(torch.optim.SGD([param]), {"w": param})
    with pytest.raises(CorruptionError, match=r"optimizer\.(param|group)"):
        gs.load({"optimizer": state}, tmp_path / "c")


class TwoSided(torch.optim.Optimizer):
    """Moments, and a preconditioner for each axis."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        for param in self.param_groups[0]["params"]:
            rows, columns = param.shape
            self.state[param] = {"m": torch.rand_like(param.detach()), "left": torch.rand(rows, rows)}
            self.state[param]["right"] = torch.rand(columns, columns)


@pytest.mark.parametrize("told", [False, True])
def test_preconditioners_of_square_parts_are_not_taken_for_elements(told: bool, tmp_path: Path) -> None:
    """By another parameter of the group, or by options."""

    def job(rank: int, ranks: int) -> Any:
        place = divmod(rank, 2) if ranks == 4 else (0, 0)
        parts = 2 if ranks == 4 else 1
        params = [torch.nn.Parameter(torch.ones(8 // parts, columns // parts)) for columns in ([8] if told else [8, 12])]
        axes = [(axis, place[axis], parts) for axis in range(2)]
        leaves = [gs.ShardedTensor.from_rank_offsets(f"w{n}", param, *axes) for n, param in enumerate(params)]
        optimizer = TwoSided(params)
        options = OptimizerOptions(of_shards={"left", "right"} if told else ())
        return params[0], optimizer, OptimizerState(optimizer, leaves, options=options)

    def save(group: Any) -> dict[str, Any]:
        param, optimizer, state = job(group.rank, group.size)
        gs.save({"optimizer": state}, tmp_path / "c", process_group=group)
        return dict(optimizer.state[param])

    def load(group: Any) -> dict[str, Any]:
        param, optimizer, state = job(group.rank, group.size)
        gs.load({"optimizer": state}, tmp_path / "c", process_group=group)
        return dict(optimizer.state[param])

    before, after = run_ranks(4, save), run_ranks(4, load)
    assert all(same_values(one, other) for one, other in zip(before, after, strict=True))
    with pytest.raises(RanksFailedError, match="left of w0: nothing is stored for the shard"):
        run_ranks(1, load)
