"""Data parallelism: DistributedDataParallel, AdamW, a learning-rate schedule. Saved in the background.

Stop it whenever you like, and go on with any number of processes:

    torchrun --nproc-per-node 2 examples/ddp.py --steps 6
    torchrun --nproc-per-node 4 examples/ddp.py --steps 12
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import giantstep as gs
from giantstep.optimizer import OptimizerState

WIDTH, BATCH = 32, 24


def samples(step: int, rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of the batch of a step."""
    inputs = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1000 + step))
    part = inputs.chunk(ranks)[rank]
    return part, torch.roll(part, 1, dims=1).tanh()


def newest(folder: Path) -> Path | None:
    """The last checkpoint that is complete: whatever a save that was cut off has left is none."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            gs.open_checkpoint(path)
        except gs.errors.OpenError:
            continue
        return path
    return None


def main() -> None:
    """Train, from the newest checkpoint on if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="train until this step")
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument("--dir", type=Path, default=Path("runs/ddp"))
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, 64), torch.nn.GELU(), torch.nn.Linear(64, WIDTH))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)

    def state(step: int) -> dict[str, Any]:
        # The model inside DDP, so that no key begins with "module.": then anything can load it.
        return {"model": model, "optimizer": OptimizerState(optimizer, {"model": model}), "schedule": schedule, "step": step}

    step, path = 0, newest(arguments.dir)
    if path is not None:
        step = gs.load(state(0), path)["step"]
    if rank == 0:
        print(f"{ranks} ranks, from step {step}", flush=True)
    while step < arguments.steps:
        inputs, targets = samples(step, rank, ranks)
        loss = torch.nn.functional.mse_loss(parallel(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        step += 1
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step} loss {float(mean):.6f} {float(mean).hex()}", flush=True)
        if step % arguments.save_every == 0:
            gs.async_save(state(step), arguments.dir / f"step_{step:08d}").guard(optimizer)
    gs.finish_saves()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
