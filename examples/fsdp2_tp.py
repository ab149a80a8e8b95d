"""FSDP2 alone, or over tensor parallelism: DTensors, which giantstep takes as they are.

torchrun --nproc-per-node 4 examples/fsdp2_tp.py --tp 2 --steps 4
torchrun --nproc-per-node 2 examples/fsdp2_tp.py --tp 1 --steps 8
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import giantstep as gs
from giantstep.optimizer import OptimizerState

WIDTH, INNER, BATCH = 32, 96, 24


class Block(nn.Module):
    """x + down(gelu(up(norm(x))))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One block."""
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def samples(step: int, rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This data-parallel rank's part of the batch of a step."""
    inputs = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1000 + step))
    part = inputs.chunk(ranks)[rank]
    return part, torch.roll(part, 1, dims=1).tanh()


def newest(folder: Path) -> Path | None:
    """The last checkpoint that is complete: whatever a save that was cut off has left is none."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            gs.open_checkpoint(path)
        except (gs.errors.IncompleteError, gs.errors.NotACheckpointError):
            continue
        return path
    return None


def main() -> None:
    """Train, from the newest checkpoint on if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks; 1: FSDP2 alone")
    parser.add_argument("--steps", type=int, default=8, help="train until this step")
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument("--dir", type=Path, default=Path("runs/fsdp2_tp"))
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    shape = (dist.get_world_size() // arguments.tp, arguments.tp)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(WIDTH, WIDTH))
    for block in model[:2]:
        if arguments.tp > 1:
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def state(step: int) -> dict[str, Any]:
        return {"model": model, "optimizer": OptimizerState(optimizer, {"model": model}), "step": step}

    step, path = 0, newest(arguments.dir)
    if path is not None:
        # A new optimizer has no moments yet: they are made as the checkpoint has them, cut like their parameters are now.
        step = gs.load(state(0), path)["step"]
    if dist.get_rank() == 0:
        print(f"{shape[0]} data x {shape[1]} tensor ranks, from step {step}", flush=True)
    while step < arguments.steps:
        inputs, targets = samples(step, mesh["dp"].get_local_rank(), shape[0])
        loss = nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step} loss {float(mean):.6f} {float(mean).hex()}", flush=True)
        if step % arguments.save_every == 0:
            gs.async_save(state(step), arguments.dir / f"step_{step:08d}").guard(optimizer)
    gs.finish_saves()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
