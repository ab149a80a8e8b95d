"""accelerate: the loop stays as it is; giantstep instead of `accelerator.save_state` and `load_state`.

torchrun --nproc-per-node 2 examples/accelerate_loop.py --steps 4
torchrun --nproc-per-node 2 examples/accelerate_loop.py --fsdp --steps 8       # goes on, under FSDP2
python examples/accelerate_loop.py --steps 12                                  # goes on, on one process
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType

import giantstep as gs
from giantstep.optimizer import OptimizerState

WIDTH, BATCH = 32, 24


def samples(step: int, rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of the batch of a step."""
    inputs = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1000 + step))
    part = inputs.chunk(ranks)[rank]
    return part, torch.roll(part, 1, dims=1).tanh()


def sharding(accelerator: Accelerator) -> None:
    """Have accelerate cut models by FSDP2 on CPUs.

    With GPUs `Accelerator(fsdp_plugin=...)` does it. With `cpu=True` accelerate takes no notice of the plugin and makes DDP,
    so it is put where accelerate would have put it: for trying this without GPUs, and for nothing else.
    """
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Linear"]
    )
    accelerator.state.distributed_type = DistributedType.FSDP


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
    parser.add_argument("--fsdp", action="store_true", help="cut the model by FSDP2 instead of copying it by DDP: by torchrun")
    parser.add_argument("--dir", type=Path, default=Path("runs/accelerate_loop"))
    arguments = parser.parse_args()
    accelerator = Accelerator(cpu=True)
    if arguments.fsdp:
        sharding(accelerator)
    rank, ranks = accelerator.process_index, accelerator.num_processes

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, 64), torch.nn.GELU(), torch.nn.Linear(64, WIDTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    # Not the schedule: accelerate would step one that it prepares once per process, so rates would depend on their number.
    model, optimizer = accelerator.prepare(model, optimizer)

    def state(step: int) -> dict[str, Any]:
        # What accelerate has wrapped, unwrapped: keys and parameters are then those of the model.
        bare = accelerator.unwrap_model(model)
        moments = OptimizerState(optimizer.optimizer, {"model": bare})
        return {"model": bare, "optimizer": moments, "schedule": schedule, "step": step}

    step, path = 0, newest(arguments.dir)
    if path is not None:
        step = gs.load(state(0), path)["step"]
    accelerator.print(f"{ranks} ranks, {type(model).__name__}, from step {step}", flush=True)
    while step < arguments.steps:
        inputs, targets = samples(step, rank, ranks)
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        step += 1
        mean = float(accelerator.reduce(loss.detach(), "mean"))
        accelerator.print(f"step {step} loss {mean:.6f} {mean.hex()}", flush=True)
        if step % arguments.save_every == 0:
            gs.async_save(state(step), arguments.dir / f"step_{step:08d}").guard(optimizer)
    gs.finish_saves()
    accelerator.end_training()


if __name__ == "__main__":
    main()
