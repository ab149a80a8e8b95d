"""Data parallelism: DistributedDataParallel, AdamW, a schedule, the place in shuffled data, random streams.

All of it is saved in the background, and goes on.

Stop it whenever you like, and go on with any number of processes:

    torchrun --nproc-per-node 2 examples/ddp.py --steps 6
    torchrun --nproc-per-node 4 examples/ddp.py --steps 12
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import giantstep as gs
from giantstep.optimizer import OptimizerState
from giantstep.training_state import RandomState, ResumableSampler

WIDTH, BATCH, SAMPLES = 32, 24, 120


class Samples(Dataset):
    """Inputs and targets, made from their numbers."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.randn(WIDTH, generator=torch.Generator().manual_seed(number))
        return inputs, torch.roll(inputs, 1, dims=0).tanh()


def batches(sampler: ResumableSampler, size: int) -> Iterator[list[torch.Tensor]]:
    """This rank's parts of batches, from where the sampler stands, epoch after epoch."""
    while True:
        # A generator of its own: a loader draws a seed when it begins, which would move the stream that training draws from.
        yield from DataLoader(Samples(), size, sampler=sampler, drop_last=True, generator=torch.Generator())
        sampler.set_epoch(sampler.epoch + 1)


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
    sampler = ResumableSampler(SAMPLES, rank, ranks)
    # Each rank's own stream from here on; on another number of ranks, new streams that follow from the stored ones.
    torch.manual_seed(rank)
    streams = RandomState(on_reshard="derive")

    def state(step: int) -> dict[str, Any]:
        return {
            # The model inside DDP, so that no key begins with "module.": then anything can load it.
            "model": model,
            "optimizer": OptimizerState(optimizer, {"model": model}),
            "schedule": schedule,
            "sampler": sampler,
            "streams": streams,
            "step": step,
        }

    step, path = 0, newest(arguments.dir)
    if path is not None:
        step = gs.load(state(0), path)["step"]
    if rank == 0:
        print(f"{ranks} ranks, from step {step}", flush=True)
    # After loading: an iterator does not notice that its sampler was moved.
    parts = batches(sampler, BATCH // ranks)
    while step < arguments.steps:
        inputs, targets = next(parts)
        loss = torch.nn.functional.mse_loss(parallel(inputs + 1e-4 * torch.randn_like(inputs)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        step += 1
        sampler.advance(BATCH)
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
