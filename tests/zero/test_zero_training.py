"""Training with a ZeRO-1 optimizer that is interrupted and resumed, in the same layout and in others, and by plain AdamW.

State comes back to the bit in any layout. What follows is equal to the bit in the same layout; in another one, sums are made
in another order. Tolerance of the loss k steps after loading: k * 2 * sqrt(N) * 2**-24 * loss, with N the terms in the
longest chain of sums of a step: a gradient of a weight is a sum over the batch, of values that went through sums over
HIDDEN and INNER, two of each per block and direction. A run that loses the moments misses it by far, which a test shows.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from zero_layouts import Place, Side
from zero_training import BATCH, BETAS, BLOCKS, DECAY, EPS, HIDDEN, INNER, LR, Job, batch, block, initial, model_specs

import giantstep as gs
from giantstep.group.torch_group import group_of
from giantstep.storage.memory import MemoryStore
from giantstep.testing import run_ranks
from giantstep.zero import BucketRules
from processes import results, run_processes

_NUMBERS = itertools.count()
LOAD = gs.LoadOptions(reader_threads=1, buffer_bytes=1 << 20)
SAVE = gs.SaveOptions(writer_threads=1, buffer_bytes=1 << 20, on_object_difference="raise")
TERMS = BATCH + BLOCKS * 2 * 2 * (HIDDEN + INNER)
BEFORE, AFTER = 4, 4


def size(side: Side) -> int:
    return len(side.places)


def run(
    side: Side,
    first: int,
    last: int,
    store: Any = None,
    dtype: torch.dtype = torch.float32,
    form: str = "reshardable",
    *,
    save: bool = False,
    forget: bool = False,
) -> tuple[list[float], list[Job]]:
    """Steps `first` to `last`, after loading if there is a store to load from; losses and ranks."""

    def rank(group: Any) -> tuple[list[float], Job]:
        job = Job(group, side, dtype)
        if store is not None and not save:
            job.restore(gs.load(job.state(form), store, process_group=group, options=LOAD))
            if forget:
                for name in ("exp_avg", "exp_avg_sq"):
                    for buffer in job.optimizer.states[name]:
                        buffer.zero_()
        losses = [job.train(step) for step in range(first, last)]
        if save:
            gs.save(job.state(form), store, process_group=group, options=SAVE)
        return losses, job

    found = run_ranks(size(side), rank)
    assert all(losses == found[0][0] for losses, _ in found)
    return found[0][0], [job for _, job in found]


def saved(side: Side, dtype: torch.dtype = torch.float32, form: str = "reshardable") -> tuple[MemoryStore, list[Job]]:
    store = MemoryStore(f"training-{next(_NUMBERS)}")
    _, jobs = run(side, 0, BEFORE, store, dtype, form, save=True)
    return store, jobs


def buffers_of(jobs: list[Job]) -> list[torch.Tensor]:
    return [buffer for job in jobs for buffers in job.optimizer.states.values() for buffer in buffers]


def close(losses: list[float], expected: list[float]) -> bool:
    """Whether losses after loading differ by no more than the order of sums explains."""
    pairs = enumerate(zip(losses, expected, strict=True))
    return all(abs(one - other) <= (k + 1) * 2 * math.sqrt(TERMS) * 2**-24 * other for k, (one, other) in pairs)


FIRST = Side(dp=4, rules=BucketRules(max_elements=500, parameter_alignment=16, bucket_alignment=32), seed=3)
RULES = BucketRules(max_elements=300, even=False)


@pytest.mark.parametrize("form", ["reshardable", "same layout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_is_resumed_in_the_same_layout_is_equal_to_the_bit(form: str, dtype: torch.dtype) -> None:
    side = replace(FIRST, dp=2, tp=2)
    losses, jobs = run(side, 0, BEFORE + AFTER, dtype=dtype)
    assert losses[-1] < losses[0]
    store, _ = saved(side, dtype, form)
    resumed, again = run(side, BEFORE, BEFORE + AFTER, store, dtype, form)
    assert resumed == losses[BEFORE:]
    assert all(map(torch.equal, buffers_of(jobs), buffers_of(again)))
    for job, other in zip(jobs, again, strict=True):
        assert all(torch.equal(tensor, other.parameters[name]) for name, tensor in job.parameters.items())


OTHERS = [
    Side(dp=2, rules=RULES),
    Side(dp=3, tp=2, rules=RULES, seed=8),
    Side(dp=1, tp=3, pp=2, rules=RULES),
    Side(dp=2, tp=2, pp=2, rules=RULES, seed=1),
    Side(dp=3, pp=4, whole=True),
]


@pytest.mark.parametrize("after", OTHERS, ids=lambda side: f"dp{side.dp}-tp{side.tp}-pp{side.pp}")
@pytest.mark.parametrize("before", [FIRST, Side(dp=2, tp=2, pp=2, rules=RULES)], ids=["dp4", "dp2-tp2-pp2"])
def test_state_is_equal_to_the_bit_and_losses_are_close_in_another_layout(before: Side, after: Side) -> None:
    expected, _ = run(before, 0, BEFORE + AFTER)
    store, _ = saved(before)
    stored = gs.open_checkpoint(store)
    _, loaded = run(after, BEFORE, BEFORE, store)
    # Saved again, the state is the same for each key.
    again = MemoryStore(f"training-{next(_NUMBERS)}")
    run_ranks(size(after), lambda group: gs.save(loaded[group.rank].state("reshardable"), again, process_group=group))
    copy = gs.open_checkpoint(again)
    assert copy.keys() == stored.keys()
    assert len(stored.keys()) == 4 * BLOCKS * 4
    for key in stored.keys():  # noqa: SIM118 - it is no dict
        assert (copy[key][...] == stored[key][...]).all(), key
    losses, _ = run(after, BEFORE, BEFORE + AFTER, store)
    assert close(losses, expected[BEFORE:])


def test_a_run_that_forgets_its_moments_is_not_close() -> None:
    expected, _ = run(FIRST, 0, BEFORE + AFTER)
    store, _ = saved(FIRST)
    losses, _ = run(OTHERS[0], BEFORE, BEFORE + AFTER, store, forget=True)
    assert not close(losses, expected[BEFORE:])
    missed = max(abs(one - other) for one, other in zip(losses, expected[BEFORE:], strict=True))
    assert missed > 100 * AFTER * 2 * math.sqrt(TERMS) * 2**-24 * max(expected[BEFORE:])


def test_state_of_low_precision_parameters_moves_between_data_parallel_sizes_to_the_bit() -> None:
    store, _ = saved(FIRST, torch.bfloat16)
    stored = gs.open_checkpoint(store)
    for ranks in (2, 3):
        _, loaded = run(replace(FIRST, dp=ranks), BEFORE, BEFORE, store, torch.bfloat16)
        for job in loaded:
            main = job.optimizer.states["fp32_param"]
            for owned in job.optimizer.layout.owned(job.place.dp):
                values = main[owned.bucket][owned.at : owned.at + owned.stop - owned.start]
                low = job.parameters[owned.parameter.name].flatten()[owned.start : owned.stop]
                assert torch.equal(values.to(low.dtype), low)
        assert stored["optimizer.state.fp32_param.block0.down"].dtype == "float32"


# Plain AdamW in one process.


class Plain:
    """The same model with whole tensors and torch's own AdamW."""

    def __init__(self) -> None:
        self.specs = model_specs()
        self.parameters = {spec.name: torch.nn.Parameter(torch.cat(initial(spec), dim=spec.axis or 0)) for spec in self.specs}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)

    def train(self, step: int) -> float:
        hidden, targets = batch(step)
        for n in range(BLOCKS):
            mlp, down, bias = (self.parameters[f"block{n}.{name}"] for name in ("mlp", "down", "bias"))
            hidden = hidden + block(hidden, mlp, down) + bias
        loss = ((hidden - targets) ** 2).sum() / (BATCH * HIDDEN)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def state(self) -> dict[str, Any]:
        """By name: the keys that an optimizer that is not sharded has; the parameters are their own main parameters."""
        model = {spec.name: spec.described(Place(0, 0, 0, 0), 1, self.parameters[spec.name].data) for spec in self.specs}
        found: dict[str, Any] = {"model": model, "optimizer": {"state": {}}}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            given = {
                "exp_avg": state.setdefault("exp_avg", torch.zeros_like(parameter)),
                "exp_avg_sq": state.setdefault("exp_avg_sq", torch.zeros_like(parameter)),
                "fp32_param": parameter.data,
            }
            found["optimizer"]["state"][name] = {
                kind: replace(model[name], key=f"optimizer.state.{kind}.{name}", data=tensor) for kind, tensor in given.items()
            }
        steps = [int(state["step"]) for state in self.optimizer.state.values() if "step" in state]
        found["optimizer"]["step"] = steps[0] if steps else 0
        return found

    def restore(self, loaded: dict[str, Any]) -> None:
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(float(loaded["optimizer"]["step"]))


def test_plain_adamw_goes_on_from_what_a_sharded_optimizer_saved() -> None:
    before = Side(dp=2, tp=2, pp=2, rules=RULES, seed=2)
    expected, _ = run(before, 0, BEFORE + AFTER)
    store, _ = saved(before)
    plain = Plain()
    plain.restore(gs.load(plain.state(), store, options=LOAD))
    stored = gs.open_checkpoint(store)
    for spec in plain.specs:
        for key, part in zip(spec.halves(), plain.parameters[spec.name].detach().chunk(len(spec.halves())), strict=True):
            assert (stored[f"optimizer.state.fp32_param.{key}"][...] == part.numpy()).all()
    assert close([plain.train(step) for step in range(BEFORE, BEFORE + AFTER)], expected[BEFORE:])


def test_a_sharded_optimizer_goes_on_from_what_plain_adamw_saved() -> None:
    plain, store = Plain(), MemoryStore(f"training-{next(_NUMBERS)}")
    for step in range(BEFORE):
        plain.train(step)
    gs.save(plain.state(), store)
    expected = [plain.train(step) for step in range(BEFORE, BEFORE + AFTER)]
    losses, _ = run(Side(dp=3, tp=2, pp=2, rules=RULES), BEFORE, BEFORE + AFTER, store)
    assert close(losses, expected)


# Processes.


def _process(rank: int, path: str) -> list[float]:
    group = group_of(None)
    job = Job(group, replace(FIRST, dp=2))
    losses = [job.train(step) for step in range(BEFORE)]
    gs.save(job.state("reshardable"), path, options=SAVE)
    return [*losses, *(job.train(step) for step in range(BEFORE, BEFORE + AFTER))]


def test_what_processes_saved_is_resumed_by_any_ranks(tmp_path: Path) -> None:
    first, second = results(run_processes(2, _process, str(tmp_path / "step")))
    assert first == second
    assert run(replace(FIRST, dp=2), BEFORE, BEFORE + AFTER, str(tmp_path / "step"))[0] == first[BEFORE:]
    assert close(run(OTHERS[1], BEFORE, BEFORE + AFTER, str(tmp_path / "step"))[0], first[BEFORE:])
