"""A transformer with experts under pipeline, tensor, expert and data parallelism at once, loaded under any other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from drawn_pipelines import layouts
from hypothesis import given, settings
from hypothesis import strategies as st

from giantstep import ShardedTensor
from giantstep.experts import Inner, LocalExperts, grouped, sequential
from giantstep.fused import Cut, Gated, Heads, fused, qkv, swiglu
from giantstep.pipeline import ModelNames, PipelineLayout, describe_stage
from giantstep.testing import round_trip
from unsharded import Attention, fused_of

WORDS, HIDDEN, FFN, EXPERTS = 8, 4, 8, 4
SIZES = Attention(groups=2, queries_per_group=2, size=2, value_size=2, hidden=HIDDEN)
NAMES = ModelNames(tied=True)
EMBEDDING, OUTPUT = NAMES.embedding, NAMES.output


@dataclass(frozen=True)
class Layer:
    """One layer of the unsharded model. Every second has experts, with a shared one beside."""

    heads: dict[str, list[torch.Tensor]]
    projection: torch.Tensor
    norm: torch.Tensor
    mlp: torch.Tensor
    up: list[torch.Tensor]
    down: list[torch.Tensor]
    router: torch.Tensor

    @classmethod
    def of(cls, number: int, start: float) -> Layer:
        def values(*shape: int) -> torch.Tensor:
            return start + number + torch.rand(shape)

        heads = {name: [part + start for part in parts] for name, parts in SIZES.heads(1 + 7 * number).items()}
        experts = range(EXPERTS) if number % 2 else ()
        return cls(
            heads,
            values(HIDDEN, SIZES.query * 2),
            values(HIDDEN),
            values(2 * FFN, HIDDEN),
            [values(2 * FFN, HIDDEN) for _ in experts],
            [values(HIDDEN, FFN) for _ in experts],
            values(EXPERTS, HIDDEN),
        )


@dataclass(frozen=True)
class World:
    """How ranks divide the model: pipeline rank by pipeline rank, each with `tp * dp` ranks."""

    layout: PipelineLayout
    tp: int
    dp: int
    etp: int
    ep: int
    order: Any
    form: str

    def ranks(self) -> list[Rank]:
        return [Rank(self, pp, n) for pp in range(self.layout.ranks) for n in range(self.tp * self.dp)]


@dataclass(frozen=True)
class Rank:
    """One rank of a world, number `n` of its pipeline stage."""

    world: World
    pp: int
    n: int

    def tensors(self, embedding: torch.Tensor, layers: list[Layer]) -> list[dict[str, Any]]:
        """By virtual stage, what it holds, by local name; experts as lists."""
        world, found = self.world, []
        for virtual in range(world.layout.virtual):
            symbols = world.layout.stages[virtual * world.layout.ranks + self.pp]
            rows = embedding.chunk(world.tp)[self.n % world.tp]
            held: dict[str, Any] = {EMBEDDING: rows.clone()} if "E" in symbols else {}
            held |= {OUTPUT: rows.clone()} if "L" in symbols else {}
            first = world.layout.layer_offset(self.pp, virtual)
            for local in range(symbols.count("t")):
                parts = self._layer(layers[first + local])
                held |= {f"decoder.layers.{local}.{name}": part for name, part in parts.items()}
            found.append(held)
        return found

    def _layer(self, layer: Layer) -> dict[str, Any]:
        world, tp = self.world, self.n % self.world.tp
        held: dict[str, Any] = {
            "qkv": SIZES.local(layer.heads, tp, world.tp, world.order),
            "projection": layer.projection.chunk(world.tp, dim=1)[tp].clone(),
            "norm": layer.norm.clone(),
            "mlp": fused_of([*layer.mlp.chunk(2)], tp, world.tp),
        }
        if not layer.up:
            return held
        mine, part = self.experts().ids, self.n % world.etp
        up = [fused_of([*layer.up[one].chunk(2)], part, world.etp) for one in mine]
        down = [layer.down[one].chunk(world.etp, dim=1)[part].clone() for one in mine]
        held |= {"router": layer.router.clone(), "experts.up": up, "experts.down": down}
        if world.form == "grouped":
            held |= {"experts.up": torch.stack(up), "experts.down": torch.stack(down)}
        return held

    def experts(self) -> LocalExperts:
        return LocalExperts.even(EXPERTS, self.n // self.world.etp % self.world.ep, self.world.ep)

    def state(self, tensors: list[dict[str, Any]], front: str) -> dict[int, Any]:
        """Described, as a user would; keys begin with `front`."""
        layout = self.world.layout
        return {
            virtual: describe_stage(self._described(held, front), layout, self.pp, virtual, names=NAMES)
            for virtual, held in enumerate(tensors)
        }

    def _described(self, held: dict[str, Any], front: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in held.items():
            described = self._leaf(name, value)
            for n, leaf in enumerate(described) if isinstance(described, list) else [(None, described)]:
                # Experts with tensors of their own have names of their own in a module.
                place = name if n is None else f"{name}.{n}"
                found[place] = replace(leaf, key=front + leaf.key)
        return found

    def _leaf(self, name: str, value: Any) -> Any:
        world = self.world
        tp, dp = self.n % world.tp, self.n // world.tp
        kind = name.rpartition(".")[2]
        if name in (EMBEDDING, OUTPUT):
            return ShardedTensor.from_rank_offsets(name, value, (0, tp, world.tp), replica_id=dp)
        if kind == "qkv":
            heads = Heads(SIZES.query, SIZES.groups, SIZES.size, order=world.order)
            return qkv(name, value, heads, tp, world.tp, replica_id=dp)
        if kind == "projection":
            return fused(name, value, {1: Cut(tp, world.tp)}, replica_id=dp)
        if kind == "mlp":
            return swiglu(name, value, tp, world.tp, replica_id=dp)
        if kind in ("norm", "router"):
            return ShardedTensor.from_rank_offsets(name, value, replica_id=(tp, dp))
        part = self.n % world.etp
        inner = Inner({0: Gated(part, world.etp)} if kind == "up" else {1: Cut(part, world.etp)})
        make: Any = sequential if isinstance(value, list) else grouped
        return make(name, value, self.experts(), inner=inner, replica_id=self.n // (world.etp * world.ep))


@st.composite
def worlds(draw: st.DrawFn, layers: int) -> World:
    tp, dp = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 2))
    grids = [(etp, ep) for etp in (1, 2, 4) for ep in (1, 2, 4) if tp * dp % (etp * ep) == 0]
    etp, ep = draw(st.sampled_from(grids))
    order = draw(st.sampled_from(["grouped", "blocks"]))
    return World(draw(layouts(layers, mtp=0)), tp, dp, etp, ep, order, draw(st.sampled_from(["grouped", "sequential"])))


def leaves(tensors: Any) -> list[torch.Tensor]:
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    return [leaf for part in (tensors.values() if isinstance(tensors, dict) else tensors) for leaf in leaves(part)]


@settings(max_examples=25, deadline=None)
@given(data=st.data(), layers=st.integers(1, 4))
def test_any_world_loads_what_any_other_has_saved(data: st.DataObject, layers: int) -> None:
    models = [(torch.rand(WORDS, HIDDEN) + start, [Layer.of(n, start) for n in range(layers)]) for start in (0.0, 50.0)]
    saving, loading = data.draw(worlds(layers)), data.draw(worlds(layers))
    fronts = ("", "exp_avg.")

    def states(ranks: list[Rank], held: list[list[Any]]) -> list[dict[str, Any]]:
        return [
            {front: rank.state(tensors, front) for front, tensors in zip(fronts, parts, strict=True)}
            for rank, parts in zip(ranks, held, strict=True)
        ]

    before = [[rank.tensors(*model) for model in models] for rank in saving.ranks()]
    expected = [[rank.tensors(*model) for model in models] for rank in loading.ranks()]
    found = [[rank.tensors(*model) for model in models] for rank in loading.ranks()]
    for leaf in leaves(found):
        leaf.zero_()
    round_trip(states(saving.ranks(), before), states(loading.ranks(), found))
    pairs = list(zip(leaves(expected), leaves(found), strict=True))
    assert len(pairs) >= 2 * (2 + 4 * layers)
    assert all(torch.equal(a, b) for a, b in pairs)
