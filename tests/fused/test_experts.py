"""Experts: grouped, concatenated or one by one, anywhere and in any parts, each loads what another has saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import giantstep as gs
from giantstep.errors import BadArgumentError, CoverageError
from giantstep.experts import Inner, LocalExperts, grouped, sequential
from giantstep.fused import Cut, Fused, Gated
from giantstep.testing import check_coverage, round_trip
from giantstep.testing.ranks import run_ranks
from unsharded import flat_cuts, fused_of, numbered

HIDDEN, FFN = 2, 6
FORMS = ("stacked", "transposed", "concatenated", "sequential")


@dataclass(frozen=True)
class Model:
    """[2 * FFN, HIDDEN] and [HIDDEN, FFN] of every expert."""

    up: list[torch.Tensor]
    down: list[torch.Tensor]

    @classmethod
    def of(cls, experts: int, start: int) -> Model:
        return cls(
            [numbered(2 * FFN, HIDDEN, start=start + 100 * n) for n in range(experts)],
            [numbered(HIDDEN, FFN, start=start + 10_000 + 100 * n) for n in range(experts)],
        )


@dataclass(frozen=True)
class Holding:
    """One rank: its experts, its part of each, and which of the ranks that hold the same it is."""

    ids: tuple[int, ...]
    total: int
    part: int
    parts: int
    copy: int
    form: str

    def local(self, model: Model) -> dict[str, list[torch.Tensor]]:
        """What it holds of each of its experts."""
        return {
            "up": [fused_of([*model.up[one].chunk(2)], self.part, self.parts) for one in self.ids],
            "down": [model.down[one].chunk(self.parts, dim=1)[self.part] for one in self.ids],
        }

    def tensors(self, model: Model) -> dict[str, list[torch.Tensor]]:
        """The same as its form has it."""
        local, share = self.local(model), FFN // self.parts
        if self.form == "sequential":
            return {name: [part.clone() for part in parts] for name, parts in local.items()}
        shapes = {"up": (2 * share, HIDDEN), "down": (HIDDEN, share)}
        stacked = {name: torch.stack(parts) if parts else torch.zeros(0, *shapes[name]) for name, parts in local.items()}
        if self.form == "stacked":
            return {name: [tensor] for name, tensor in stacked.items()}
        turned = {name: tensor.transpose(1, 2).contiguous() for name, tensor in stacked.items()}
        if self.form == "concatenated":
            # As grouped products have them: matrices [hidden, experts * ffn] and [experts * ffn, hidden], used by views.
            turned["up"] = turned["up"].view(HIDDEN, len(self.ids) * 2 * share)
            turned["down"] = turned["down"].view(len(self.ids) * share, HIDDEN)
        return {name: [tensor] for name, tensor in turned.items()}

    def state(self, tensors: dict[str, list[torch.Tensor]], prefix: str = "") -> dict[str, Any]:
        experts, share = LocalExperts(self.ids, self.total), FFN // self.parts
        turned = self.form in ("transposed", "concatenated")
        found: dict[str, Any] = {}
        for name, axes in (("up", {0: Gated(self.part, self.parts)}), ("down", {1: Cut(self.part, self.parts)})):
            shape = {"up": (HIDDEN, 2 * share), "down": (share, HIDDEN)}[name] if self.form == "concatenated" else None
            inner = Inner(axes, shape, transposed=turned)
            key = f"{prefix}experts.{name}"
            if self.form == "sequential":
                found[key] = sequential(key, tensors[name], experts, inner=inner, replica_id=self.copy)
            else:
                found[key] = grouped(key, tensors[name][0], experts, inner=inner, replica_id=self.copy)
        return found


@st.composite
def holdings(draw: st.DrawFn, total: int) -> list[Holding]:
    """Experts in any order on some ranks, as many as it happens; parts of each; copies."""
    order = draw(st.permutations(range(total)))
    cuts = sorted(draw(st.lists(st.integers(0, total), max_size=2)))
    shares = [tuple(order[a:b]) for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
    parts, copies = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 2))
    form = draw(st.sampled_from(FORMS))
    return [Holding(ids, total, part, parts, copy, form) for copy in range(copies) for ids in shares for part in range(parts)]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), total=st.integers(1, 5))
def test_every_form_on_any_ranks_loads_what_another_has_saved(data: st.DataObject, total: int) -> None:
    model, moments = Model.of(total, 1), Model.of(total, 50_000)
    saving, loading = data.draw(holdings(total)), data.draw(holdings(total))
    states = [holding.state(holding.tensors(model)) | holding.state(holding.tensors(moments), "exp_avg.") for holding in saving]
    zeros = [
        [{name: [part * 0 for part in parts] for name, parts in holding.tensors(model).items()} for _ in range(2)]
        for holding in loading
    ]
    targets = [
        holding.state(first) | holding.state(second, "exp_avg.")
        for holding, (first, second) in zip(loading, zeros, strict=True)
    ]
    round_trip(states, targets)
    for holding, found in zip(loading, zeros, strict=True):
        for whole, tensors in zip((model, moments), found, strict=True):
            for name, expected in holding.tensors(whole).items():
                assert all(torch.equal(a, b) for a, b in zip(tensors[name], expected, strict=True))
    # What is stored is one tensor of all experts, and any rows of it can be loaded without knowing of experts.
    plain = {"up": torch.zeros(total, 2 * FFN, HIDDEN), "down": torch.zeros(total, HIDDEN, FFN)}
    round_trip(states, [{"experts": plain}], strict=gs.StrictHandling.RAISE_UNEXPECTED)
    assert torch.equal(plain["up"], torch.stack(model.up))
    assert torch.equal(plain["down"], torch.stack(model.down))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), total=st.integers(1, 4))
def test_flat_ranges_of_experts_load_as_any_other_ranges(data: st.DataObject, total: int) -> None:
    """Also of transposed ones: ranges are of what lies in memory."""
    model = Model.of(total, 1)

    def states(*, zero: bool) -> tuple[list[dict[str, Any]], list[tuple[torch.Tensor, torch.Tensor]]]:
        found, pairs = [], []
        for holding in (held for held in data.draw(holdings(total)) if held.copy == 0):
            for path, leaves in holding.state(holding.tensors(model)).items():
                for n, factory in enumerate(leaves if isinstance(leaves, list) else [leaves]):
                    flattened = factory.data.reshape(-1)
                    for flat in data.draw(flat_cuts(flattened.numel())):
                        part = flattened[flat].clone()
                        pairs.append((part, flattened[flat].clone()))
                        part.mul_(0 if zero else 1)
                        found.append({f"{path}.{n}": replace(factory, data=part, flattened_range=flat)})
        return found, pairs

    saved, _ = states(zero=False)
    targets, pairs = states(zero=True)
    round_trip(saved, targets)
    assert all(torch.equal(part, expected) for part, expected in pairs)


def test_experts_of_layers_that_are_stacked_and_experts_with_names_of_their_own(tmp_path: Path) -> None:
    layers = [Model.of(4, 1 + 1000 * n) for n in range(2)]

    def save(group: Any) -> None:
        experts = LocalExperts.uneven([3, 1], group.rank)
        gs.save(
            {
                n: grouped(
                    "layers.experts",
                    torch.stack([layer.up[one] for one in experts.ids]),
                    experts,
                    inner=Inner({0: Fused((FFN, FFN), names=("gate", "up"))}),
                    prepend=((n, 2),),
                )
                for n, layer in enumerate(layers)
            },
            tmp_path,
            process_group=group,
        )

    run_ranks(2, save)
    checkpoint = gs.open_checkpoint(tmp_path)
    assert checkpoint.keys() == ["layers.experts.gate", "layers.experts.up"]
    assert checkpoint["layers.experts.up"].shape == (2, 4, FFN, HIDDEN)
    assert torch.equal(torch.from_numpy(checkpoint["layers.experts.up"][1, 2]), layers[1].up[2][FFN:])


def test_biases_of_experts() -> None:
    biases = [numbered(4, start=10 * n) for n in range(3)]
    one_by_one = [{"b": sequential("b", [biases[n]], LocalExperts((n,), 3))} for n in range(3)]
    joined = torch.zeros(12)
    target = {"b": grouped("b", joined, LocalExperts.even(3, 0, 1), inner=Inner(shape=(4,)))}
    round_trip(one_by_one, [target])
    assert torch.equal(joined, torch.cat(biases))


def test_an_expert_that_nobody_has_is_a_gap_and_one_that_two_have_a_doubled_main_replica() -> None:
    def states(counts: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
        return [{"w": grouped("w", torch.zeros(len(ids), 2, 2), LocalExperts(ids, 4))} for ids in counts]

    with pytest.raises(CoverageError, match=r"no rank saves region \[2:3,0:2,0:2\]"):
        check_coverage(states([(0, 1), (3,)]))
    with pytest.raises(CoverageError, match=r"2 main replicas, on rank 0, 1"):
        check_coverage(states([(0,), (0,), (1, 2, 3)]))


def test_experts_are_divided_evenly_or_as_said() -> None:
    assert LocalExperts.even(6, 1, 3) == LocalExperts((2, 3), 6)
    assert [LocalExperts.uneven([2, 0, 3], rank).ids for rank in range(3)] == [(0, 1), (), (2, 3, 4)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalExperts((0, 0), 3), "must be different numbers from 0 to 2"),
        (lambda: LocalExperts((3,), 3), "must be different numbers from 0 to 2"),
        (lambda: LocalExperts(("a",), 3), "must be whole numbers"),  # type: ignore[arg-type]
        (lambda: LocalExperts((0,), None), "must be whole numbers"),  # type: ignore[arg-type]
        (lambda: LocalExperts.even(4.0, 0, 2), "must be whole numbers"),  # type: ignore[arg-type]
        (lambda: LocalExperts.uneven([1.5, 2], 0), "must be whole numbers"),  # type: ignore[list-item]
        (lambda: sequential("k", [None], LocalExperts((0,), 1)), "is a NoneType, not a tensor"),  # type: ignore[list-item]
        (lambda: LocalExperts.even(5, 0, 2), "use LocalExperts.uneven"),
        (lambda: LocalExperts.even(4, 2, 2), r"rank 2 of expert counts \(2, 2\)"),
        (lambda: LocalExperts.uneven([2, -1], 0), "must not be negative"),
        (lambda: grouped("w", torch.zeros(2, 3), LocalExperts((0, 1, 2), 4)), r"there are 2 experts, but .* the 3 \(0, 1, 2\)"),
        (lambda: grouped("w", torch.zeros(()), LocalExperts((0,), 1)), "an axis of experts"),
        (
            lambda: grouped("w", torch.zeros(4, 3), LocalExperts((0, 1), 2), inner=Inner(shape=(3, 3))),
            r"local tensor of shape \(4, 3\) is to be stored as one of shape \(2, 3, 3\)",
        ),
        (lambda: grouped("w", torch.zeros(1, 3), LocalExperts((0,), 1), inner=Inner(transposed=True)), "no two axes"),
        (lambda: grouped("w", torch.zeros(1, 3), LocalExperts((0,), 1), inner=Inner({-1: Cut(0, 1)})), "counted from 0"),
        (lambda: sequential("w", [torch.zeros(3)], LocalExperts((0, 1), 2)), "1 tensors for 2 experts"),
    ],
)
def test_experts_that_do_not_fit_are_refused(make: Any, message: str) -> None:
    with pytest.raises(BadArgumentError, match=message):
        make()


def test_a_tensor_that_cannot_be_viewed_as_experts_is_refused_when_it_is_described(tmp_path: Path) -> None:
    experts = LocalExperts((0, 1), 2)
    turned = grouped("w", torch.zeros(3, 4).t(), experts, inner=Inner(shape=(3, 2)))
    with pytest.raises(BadArgumentError, match="Pass a contiguous tensor"):
        gs.save({"w": turned}, tmp_path)
