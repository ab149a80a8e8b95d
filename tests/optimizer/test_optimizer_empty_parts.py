"""Ranks that hold no elements of a parameter have no say in its state."""

from __future__ import annotations

from pathlib import Path

import torch

import giantstep as gs
from giantstep.group.threads import ThreadGroup
from giantstep.optimizer import OptimizerState
from giantstep.testing.ranks import run_ranks


def test_a_rank_without_elements_that_has_not_stepped_since_a_load_does_not_hinder_the_next_save(tmp_path: Path) -> None:
    """Experts are spread unevenly: one rank has none, and so no gradients."""

    def run(group: ThreadGroup, first: int, saves: list[int]) -> list[float]:
        rows = [2, 0, 1][group.rank]
        start = [0, 2, 2][group.rank]
        weight = torch.nn.Parameter(torch.ones(rows, 4))
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        shard = gs.ShardedTensor("w", weight, weight.dtype, (rows, 4), (3, 4), (start, 0), None)
        state = {"w": shard, "optimizer": OptimizerState(optimizer, {"w": shard})}
        if first:
            gs.load(state, tmp_path / str(first), process_group=group)
        for step in saves:
            if rows:
                weight.grad = torch.full((rows, 4), float(step))
                optimizer.step()
            gs.save(state, tmp_path / str(step), process_group=group)
        return weight.detach().flatten().tolist()

    run_ranks(3, lambda group: run(group, 0, [1, 2]))
    resumed = run_ranks(3, lambda group: run(group, 1, [2, 3]))
    assert resumed == run_ranks(3, lambda group: run(group, 0, [1, 2, 3]))
    assert gs.open_checkpoint(tmp_path / "3").object("optimizer.param.w/shard__")["values"] == {"step": 3.0}
