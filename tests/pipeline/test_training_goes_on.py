"""A small model trained in pipelines that change every few steps: losses and weights as of one that never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from drawn_pipelines import by_rank

import giantstep as gs
from giantstep.pipeline import ModelNames, PipelineLayout, describe_stage
from giantstep.testing.ranks import run_ranks

WIDTH, WORDS, LAYERS = 6, 11, 6
NAMES = ModelNames(layers="layers.", embedding="embedding.weight", output="output.weight", tied=True)
# Deeper, shallower, virtual or not, even or not, embedding and loss alone or not.
LAYOUTS = [
    PipelineLayout.parse(text, ranks)
    for text, ranks in (("Ett|tt|t|tL", 2), ("E|ttt|tt|t||L", 3), ("EttttttL", 1), ("E|t|t|t|t|t|t|L", 4), ("Ett|tttt|L", 3))
] + [PipelineLayout.even(LAYERS, 3, virtual=2), PipelineLayout.even(LAYERS, 1, virtual=3)]


class Stage(torch.nn.Module):
    """Some layers of the model; embedding and output layer if the layout says so."""

    def __init__(self, symbols: str) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(WORDS, WIDTH) if "E" in symbols else None
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(symbols.count("t")))
        self.output = torch.nn.Linear(WIDTH, WORDS, bias=False) if "L" in symbols else None
        if self.embedding is not None and self.output is not None:
            self.output.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.embedding is None else self.embedding(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x if self.output is None else self.output(x)


class Pipeline:
    """All stages, with an optimizer each, in one process."""

    def __init__(self, layout: PipelineLayout) -> None:
        self.layout = layout
        self.stages = [Stage(symbols) for symbols in layout.stages]
        parameters = [list(stage.parameters()) for stage in self.stages]
        self.optimizers = [torch.optim.Adam(held, lr=0.05) if held else None for held in parameters]
        for optimizer in self.optimizers:
            for group in [] if optimizer is None else optimizer.param_groups:
                for parameter in group["params"]:
                    zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    optimizer.state[parameter] = {"step": torch.zeros(()), **zeros}  # type: ignore[union-attr]

    def step(self, number: int) -> float:
        generator = torch.Generator().manual_seed(number)
        words = torch.randint(0, WORDS, (8,), generator=generator)
        hidden = words
        for stage in self.stages:
            hidden = stage(hidden)
        loss = torch.nn.functional.cross_entropy(hidden, (words * 3 + number) % WORDS)
        loss.backward()
        self._add_tied_gradients()
        for optimizer in self.optimizers:
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
        return float(loss.detach())

    def _add_tied_gradients(self) -> None:
        first = next(stage.embedding for stage in self.stages if stage.embedding is not None).weight
        last = next(stage.output for stage in self.stages if stage.output is not None).weight
        if first is not last:
            first.grad = last.grad = first.grad + last.grad  # type: ignore[operator]

    def states(self) -> list[dict[str, Any]]:
        """By rank, what is saved and loaded."""
        numbered = list(zip(self.stages, self.optimizers, strict=True))
        return [self._rank_state(rank, chunks) for rank, chunks in enumerate(by_rank(self.layout, numbered))]

    def _rank_state(self, rank: int, chunks: list[Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"model": {}, "exp_avg": {}, "exp_avg_sq": {}, "step": {}}
        for virtual, (stage, optimizer) in enumerate(chunks):
            parameters = dict(stage.named_parameters(remove_duplicate=False))
            found["model"][virtual] = describe_stage(parameters, self.layout, rank, virtual, names=NAMES)
            for moment in ("exp_avg", "exp_avg_sq", "step"):
                shards = {
                    name: gs.ShardedTensor.from_rank_offsets(f"{moment}.{name}", optimizer.state[parameter][moment])
                    for name, parameter in parameters.items()
                }
                found[moment][virtual] = describe_stage(shards, self.layout, rank, virtual, names=NAMES)
        return found


def test_training_goes_on_in_other_pipelines_as_if_nothing_had_happened(tmp_path: Path) -> None:
    torch.manual_seed(5)
    straight = Pipeline(PipelineLayout.parse("EttttttL", 1))
    changing = Pipeline(LAYOUTS[0])

    def moved(source: Pipeline, layout: PipelineLayout, name: str) -> Pipeline:
        states = source.states()
        run_ranks(len(states), lambda group: gs.save(states[group.rank], tmp_path / name, process_group=group))
        target = Pipeline(layout)
        wanted = target.states()
        run_ranks(len(wanted), lambda group: gs.load(wanted[group.rank], tmp_path / name, process_group=group))
        return target

    changing = moved(straight, LAYOUTS[0], "start")
    number = 0
    for turn, layout in enumerate([*LAYOUTS[1:], *reversed(LAYOUTS)]):
        for _ in range(2):
            assert changing.step(number) == straight.step(number)
            number += 1
        changing = moved(changing, layout, f"turn{turn}")
    assert number == 2 * (2 * len(LAYOUTS) - 1)
    last = moved(changing, straight.layout, "last")
    for before, after in zip(straight.stages[0].parameters(), last.stages[0].parameters(), strict=True):
        assert torch.equal(before, after)
        for name, value in straight.optimizers[0].state[before].items():  # type: ignore[union-attr]
            assert torch.equal(value, last.optimizers[0].state[after][name])  # type: ignore[union-attr]
