"""A transformers model: trained, saved, and continued. The model is made from a configuration; nothing is downloaded.

python examples/huggingface.py --steps 4
torchrun --nproc-per-node 2 examples/huggingface.py --steps 8      # goes on, cut over 2 processes by FSDP2
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

import giantstep as gs
from giantstep.optimizer import OptimizerState

BATCH, LENGTH = 8, 16
CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    # Input and output embedding are one parameter, which is stored once.
    tie_word_embeddings=True,
)


def samples(step: int, rank: int, ranks: int) -> torch.Tensor:
    """This rank's part of the batch of a step: counting from somewhere, which can be learned."""
    starts = torch.randint(0, 96, (BATCH, 1), generator=torch.Generator().manual_seed(1000 + step))
    return ((starts + torch.arange(LENGTH)) % 96).chunk(ranks)[rank]


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
    parser.add_argument("--dir", type=Path, default=Path("runs/huggingface"))
    arguments = parser.parse_args()
    launched = "RANK" in os.environ
    if launched:
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if launched else (0, 1)

    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=100)

    def state(step: int) -> dict[str, Any]:
        return {"model": model, "optimizer": OptimizerState(optimizer, {"model": model}), "schedule": schedule, "step": step}

    step, path = 0, newest(arguments.dir)
    if path is not None:
        step = gs.load(state(0), path)["step"]
    if rank == 0:
        print(f"{ranks} ranks, from step {step}", flush=True)
    while step < arguments.steps:
        tokens = samples(step, rank, ranks)
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        step += 1
        mean = loss.detach() / ranks
        if ranks > 1:
            dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step} loss {float(mean):.6f} {float(mean).hex()}", flush=True)
        if step % arguments.save_every == 0:
            gs.async_save(state(step), arguments.dir / f"step_{step:08d}").guard(optimizer)
    gs.finish_saves()
    if launched:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
