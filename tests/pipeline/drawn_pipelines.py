"""Layouts drawn at random, and a tiny model: whole, and as the stages of a pipeline hold it."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from giantstep.pipeline import PipelineLayout

WIDTH, WORDS = 3, 5


@st.composite
def stage_symbols(draw: st.DrawFn, layers: int | None = None, *, mtp: int | None = None) -> list[str]:
    """Stages that are a layout, whatever their number."""
    count = draw(st.integers(0, 9)) if layers is None else layers
    extra = draw(st.integers(0, 2)) if mtp is None else mtp
    order = "E" + "t" * count + "m" * extra + "L"
    cuts = sorted(draw(st.lists(st.integers(0, len(order)), max_size=7)))
    return [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)]


@st.composite
def layouts(draw: st.DrawFn, layers: int | None = None, *, mtp: int | None = None) -> PipelineLayout:
    """Any layout: uneven and empty stages, embedding and loss alone or not, virtual stages."""
    stages = draw(stage_symbols(layers, mtp=mtp))
    ranks = draw(st.sampled_from([n for n in range(1, len(stages) + 1) if len(stages) % n == 0]))
    return PipelineLayout(tuple(stages), ranks)


def whole_model(layers: int, mtp: int, *, tied: bool, start: float) -> dict[str, torch.Tensor]:
    """Every tensor of the model, by global name, with values of its own."""
    names = {"embedding.word_embeddings.weight": (WORDS, WIDTH), "decoder.final_layernorm.weight": (WIDTH,)}
    names |= {f"decoder.layers.{n}.{part}": shape for n in range(layers) for part, shape in _LAYER.items()}
    names |= {f"mtp.layers.{n}.proj.weight": (WIDTH, WIDTH) for n in range(mtp)}
    if not tied:
        names["output_layer.weight"] = (WORDS, WIDTH)
    return {name: start + 100 * n + torch.rand(shape) for n, (name, shape) in enumerate(names.items())}


_LAYER = {"weight": (WIDTH, WIDTH), "bias": (WIDTH,)}


def stage_of(whole: dict[str, torch.Tensor], symbols: str, before: dict[str, int], *, tied: bool) -> dict[str, torch.Tensor]:
    """What a stage holds, with layers counted from 0. `before`: number of layers of each kind on earlier stages."""
    embedding = whole["embedding.word_embeddings.weight"]
    state: dict[str, torch.Tensor] = {}
    if "E" in symbols or "m" in symbols:
        state["embedding.word_embeddings.weight"] = embedding.clone()
    for n in range(symbols.count("t")):
        for part in _LAYER:
            state[f"decoder.layers.{n}.{part}"] = whole[f"decoder.layers.{before['t'] + n}.{part}"].clone()
    for n in range(symbols.count("m")):
        state[f"mtp.layers.{n}.proj.weight"] = whole[f"mtp.layers.{before['m'] + n}.proj.weight"].clone()
    if "L" in symbols:
        state["decoder.final_layernorm.weight"] = whole["decoder.final_layernorm.weight"].clone()
        # A tied output layer has memory of its own where another stage has the embedding.
        own = embedding.clone() if "E" not in symbols and "m" not in symbols else state.get("embedding.word_embeddings.weight")
        state["output_layer.weight"] = own if tied and own is not None else whole["output_layer.weight"].clone()
    return state


def stages_of(layout: PipelineLayout, whole: dict[str, torch.Tensor], *, tied: bool) -> list[dict[str, torch.Tensor]]:
    """By stage, what it holds."""
    found, before = [], {"t": 0, "m": 0}
    for symbols in layout.stages:
        found.append(stage_of(whole, symbols, before, tied=tied))
        before = {kind: count + symbols.count(kind) for kind, count in before.items()}
    return found


def by_rank(layout: PipelineLayout, stages: list[Any]) -> list[list[Any]]:
    """Of each rank, what belongs to its virtual stages, in order."""
    return [[stages[virtual * layout.ranks + rank] for virtual in range(layout.virtual)] for rank in range(layout.ranks)]
