"""Mixture of experts: expert parallelism with any number of experts per rank, data parallelism for everything else.

torchrun --nproc-per-node 4 examples/moe.py --experts-per-rank 3 1 3 1 --steps 4
torchrun --nproc-per-node 2 examples/moe.py --experts-per-rank 4 4 --steps 8
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import giantstep as gs
from giantstep.experts import Inner, LocalExperts, grouped
from giantstep.fused import Gated
from giantstep.optimizer import OptimizerState

WIDTH, INNER, BATCH = 32, 48, 24


class Everybody(torch.autograd.Function):
    """The samples of all ranks; backward, each rank gets the sum of the gradients of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Gather."""
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """Sum, and keep a part."""
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


class Mine(torch.autograd.Function):
    """What all ranks' experts made of this rank's samples."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Sum, and keep a part."""
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """Gather."""
        parts = [torch.empty_like(gradients[0]) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, gradients[0].contiguous())
        return torch.cat(parts)


class Layer(torch.nn.Module):
    """Every sample goes to the two experts that its router likes best; gate and up of an expert are one weight."""

    def __init__(self, experts: LocalExperts) -> None:
        super().__init__()
        self.experts = experts
        held = len(experts.ids)
        self.router = torch.nn.Parameter(torch.empty(experts.total, WIDTH))
        self.gate_up = torch.nn.Parameter(torch.empty(held, 2 * INNER, WIDTH))
        self.down = torch.nn.Parameter(torch.empty(held, WIDTH, INNER))

    @torch.no_grad()
    def fill(self) -> None:
        """The same model whatever its layout: draw whole tensors, keep a part."""
        generator = torch.Generator().manual_seed(0)
        ids = list(self.experts.ids)
        self.router.copy_(torch.randn(self.router.shape, generator=generator) / 6)
        self.gate_up.copy_((torch.randn(self.experts.total, 2 * INNER, WIDTH, generator=generator) / 6)[ids])
        self.down.copy_((torch.randn(self.experts.total, WIDTH, INNER, generator=generator) / 6)[ids])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One layer."""
        best, chosen = torch.softmax(x @ self.router.T, dim=-1).topk(2)
        weights = Everybody.apply(torch.zeros_like(x[:, :1]).expand(-1, self.experts.total).scatter(1, chosen, best))
        everybody = Everybody.apply(x)
        # Not plain zeros: a rank without experts takes part in the backward pass, too.
        mixed = 0 * weights[:, :1] * everybody
        for number, expert in enumerate(self.experts.ids):
            gate, up = (everybody @ self.gate_up[number].T).chunk(2, dim=-1)
            mixed = mixed + weights[:, expert, None] * ((torch.nn.functional.silu(gate) * up) @ self.down[number].T)
        return x + Mine.apply(mixed)

    def sharded_state(self) -> dict[str, gs.ShardedTensor | gs.ShardedTensorFactory]:
        """Experts by their global numbers; the router is the same on all ranks."""
        gated = Inner({0: Gated(0, 1)})
        return {
            "router": gs.ShardedTensor.from_rank_offsets("router", self.router, replica_id=dist.get_rank()),
            "gate_up": grouped("experts.gate_up", self.gate_up, self.experts, inner=gated),
            "down": grouped("experts.down", self.down, self.experts),
        }


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
        except (gs.errors.IncompleteError, gs.errors.NotACheckpointError):
            continue
        return path
    return None


def main() -> None:
    """Train, from the newest checkpoint on if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts-per-rank", type=int, nargs="+", default=[3, 1, 3, 1])
    parser.add_argument("--steps", type=int, default=8, help="train until this step")
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument("--dir", type=Path, default=Path("runs/moe"))
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    layer = Layer(LocalExperts.uneven(arguments.experts_per_rank, rank))
    layer.fill()
    # Two optimizers, of which a rank may have nothing in one.
    optimizers = {
        "router": torch.optim.SGD([layer.router], lr=0.1, momentum=0.9),
        "experts": torch.optim.AdamW([layer.gate_up, layer.down], lr=3e-3),
    }

    def state(step: int) -> dict[str, Any]:
        model = layer.sharded_state()
        return {"model": model, "optimizer": OptimizerState(optimizers, model), "step": step}

    step, path = 0, newest(arguments.dir)
    if path is not None:
        step = gs.load(state(0), path)["step"]
    if rank == 0:
        print(f"{arguments.experts_per_rank} experts, from step {step}", flush=True)
    while step < arguments.steps:
        inputs, targets = samples(step, rank, ranks)
        loss = ((layer(inputs) - targets) ** 2).sum() / (BATCH * WIDTH)
        layer.zero_grad()
        loss.backward()
        # Experts have seen the samples of all ranks already.
        dist.all_reduce(layer.router.grad)
        for optimizer in optimizers.values():
            optimizer.step()
        step += 1
        total = loss.detach().clone()
        dist.all_reduce(total)
        if rank == 0:
            print(f"step {step} loss {float(total):.6f} {float(total).hex()}", flush=True)
        if step % arguments.save_every == 0:
            gs.async_save(state(step), arguments.dir / f"step_{step:08d}").guard(*optimizers.values())
    gs.finish_saves()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
