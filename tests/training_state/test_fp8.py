"""Training with 8-bit weights by delayed scaling, emulated: goes on to the bit; under another tensor parallelism by rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import BadArgumentError, ShapeMismatchError
from giantstep.group.threads import ThreadGroup
from giantstep.optimizer import OptimizerState
from giantstep.testing.ranks import RanksFailedError, run_ranks
from giantstep.training_state import extra_states, largest, plain_extra_states

HISTORY, ROWS, WIDTH = 4, 8, 6


class Fp8Linear(torch.nn.Module):
    """Rows of a weight in bfloat16, used as float8 with a scale that follows from the largest values of the last steps."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        whole = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
        self.weight = torch.nn.Parameter(whole.chunk(ranks)[rank].clone())
        self.history = torch.zeros(HISTORY)
        self.next = 0

    def quantised(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float8 values and their scale, by the largest value of the history."""
        scale = 448.0 / torch.clamp(self.history.max(), min=0.01)
        values = (self.weight.detach() * scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        self.history[self.next % HISTORY] = self.weight.detach().abs().max()
        self.next += 1
        return values, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, scale = self.quantised()
        # Gradients pass as if nothing had been rounded.
        used = self.weight + (values.float() / scale - self.weight).detach()
        return x @ used.T

    def get_extra_state(self) -> Any:
        return {"amax_history": self.history.clone(), "next": self.next}

    def set_extra_state(self, state: Any) -> None:
        self.history, self.next = state["amax_history"].clone(), state["next"]


class Job:
    """Column-parallel ranks that need nothing of each other."""

    def __init__(self, group: ThreadGroup, **settings: Any) -> None:
        self.group, self.settings = group, settings
        self.model = Fp8Linear(group.rank, group.size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)

    def train(self, steps: range) -> list[bytes]:
        seen = []
        for step in steps:
            x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(step))
            out = self.model(x)
            self.optimizer.zero_grad()
            (out - 1).pow(2).sum().backward()
            self.optimizer.step()
            seen.append(out.detach().numpy().tobytes())
        return seen

    def state(self) -> dict[str, Any]:
        group = self.group
        state: dict[str, Any] = dict(self.model.state_dict(keep_vars=True))
        state["weight"] = gs.ShardedTensor.from_rank_offsets("weight", self.model.weight, (0, group.rank, group.size))
        state = extra_states(state, grid=group.size, position=group.rank, **self.settings)
        return {"model": state, "optimizer": OptimizerState(self.optimizer, state)}

    def save(self, path: Path) -> None:
        values, scale = self.model.quantised()
        quantised = {
            "values": gs.ShardedTensor.from_rank_offsets("fp8", values, (0, self.group.rank, self.group.size)),
            "scale": gs.ShardedTensor.from_rank_offsets("scale", scale.view(1), (0, self.group.rank, self.group.size)),
        }
        gs.save({**self.state(), "quantised": quantised}, path, process_group=self.group)

    def load(self, path: Path) -> None:
        strict = gs.StrictHandling.RAISE_UNEXPECTED
        loaded = gs.load(self.state(), path, strict=strict, process_group=self.group)
        self.model.load_state_dict(plain_extra_states(loaded["model"]))


def test_training_goes_on_to_the_bit_with_the_same_ranks(tmp_path: Path) -> None:
    def first(group: ThreadGroup) -> list[bytes]:
        job = Job(group)
        job.train(range(6))
        job.save(tmp_path)
        return job.train(range(6, 12))

    def second(group: ThreadGroup) -> list[bytes]:
        job = Job(group)
        job.load(tmp_path)
        return job.train(range(6, 12))

    expected = run_ranks(2, first)
    assert run_ranks(2, second) == expected

    def forgetful(group: ThreadGroup) -> list[bytes]:
        job = Job(group)
        job.load(tmp_path)
        job.model.history.zero_()
        return job.train(range(6, 12))

    assert run_ranks(2, forgetful) != expected, "the history matters"


def test_with_other_ranks_histories_are_the_largest_of_all_or_dropped_or_those_of_the_first(tmp_path: Path) -> None:
    def save(group: ThreadGroup) -> tuple[torch.Tensor, int]:
        job = Job(group)
        job.train(range(6))
        job.save(tmp_path)
        return job.model.history, job.model.next

    histories = run_ranks(4, save)
    expected = {
        "largest": torch.stack([history for history, _ in histories]).amax(0),
        "first": histories[0][0],
        "drop": torch.zeros(HISTORY),
    }
    assert not torch.equal(expected["largest"], expected["first"])

    def load(group: ThreadGroup, policy: str) -> tuple[torch.Tensor, int]:
        job = Job(group, on_reshard=largest if policy == "largest" else policy)
        job.load(tmp_path)
        return job.model.history, job.model.next

    for policy, wanted in expected.items():
        for history, count in run_ranks(2, lambda group, policy=policy: load(group, policy)):  # type: ignore[misc]
            assert torch.equal(history, wanted), policy
            assert count == (0 if policy == "drop" else histories[0][1])
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(2, lambda group: load(group, "raise"))
    assert all(isinstance(error, ShapeMismatchError) for error in caught.value.errors)


def test_float8_values_and_their_scales_are_resharded_to_the_bit(tmp_path: Path) -> None:
    def save(group: ThreadGroup) -> None:
        job = Job(group)
        job.train(range(6))
        job.save(tmp_path)

    run_ranks(4, save)
    stored = gs.open_checkpoint(tmp_path)

    def load(group: ThreadGroup) -> tuple[bytes, list[float]]:
        values = torch.empty(ROWS // 2, WIDTH, dtype=torch.float8_e4m3fn)
        scales = torch.empty(2)
        wanted = {
            "values": gs.ShardedTensor.from_rank_offsets("fp8", values, (0, group.rank, group.size)),
            "scale": gs.ShardedTensor.from_rank_offsets("scale", scales, (0, group.rank, group.size)),
        }
        strict = gs.StrictHandling.RAISE_UNEXPECTED
        gs.load({"quantised": wanted}, tmp_path, strict=strict, process_group=group)
        return values.view(torch.uint8).numpy().tobytes(), scales.tolist()

    parts = run_ranks(2, load)
    assert b"".join(part for part, _ in parts) == stored["fp8"][...].tobytes()
    assert [scale for _, scales in parts for scale in scales] == stored["scale"][...].tolist()


def test_extra_states_that_are_missing_are_kept_and_others_need_a_policy(tmp_path: Path) -> None:
    gs.save({"model": {"weight": torch.ones(2)}}, tmp_path)
    state = {"weight": torch.zeros(2), "layer": {"_extra_state": {"amax": torch.ones(3)}}}
    loaded = gs.load({"model": extra_states(state)}, tmp_path)
    assert torch.equal(plain_extra_states(loaded)["model"]["layer"]["_extra_state"]["amax"], torch.ones(3))
    assert loaded.report.skipped == ("model.layer._extra_state",)
    with pytest.raises(gs.errors.KeyMismatchError):
        gs.load({"model": extra_states(state, on_missing="strict")}, tmp_path)


def test_the_largest_of_unlike_values_is_refused() -> None:
    def of(*values: Any) -> Any:
        return largest({(number,): value for number, value in enumerate(values)}, (1,), (0,))

    assert of({"a": [1, (2.0,)]}, {"a": [3, (1.0,)]}) == {"a": [3, (2.0,)]}
    assert of({"recipe": "x", "n": None}, {"recipe": "x", "n": None}) == {"recipe": "x", "n": None}
    for values in ((1, "x"), ({"a": 1}, {"b": 1}), ("x", "y"), (torch.ones(2), torch.ones(3)), ([1], [1, 2])):
        with pytest.raises(BadArgumentError, match="differ in kind"):
            of(*values)
    with pytest.raises(BadArgumentError, match="'raise', 'drop', 'first'"):
        extra_states({}, on_reshard="sum")  # type: ignore[arg-type]
