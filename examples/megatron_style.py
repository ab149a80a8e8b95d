"""Tensor x pipeline x data parallelism by hand, fused gate-and-up weights, and a ZeRO-1 optimizer.

Stop it whenever you like, and go on with any other --tp, --pp and number of processes:

    torchrun --nproc-per-node 8 examples/megatron_style.py --tp 2 --pp 2 --steps 4
    torchrun --nproc-per-node 2 examples/megatron_style.py --tp 1 --pp 1 --steps 8
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import giantstep as gs
from giantstep.fused import swiglu
from giantstep.zero import BucketRules, FlatParameter, empty_buffers, lay_out, reshardable_state

LAYERS, WIDTH, INNER, BATCH = 4, 32, 96, 24


class Block(torch.nn.Module):
    """x + down(silu(gate(n)) * up(n)) of normalised n: gate and up are one weight; tensor parallelism cuts both."""

    def __init__(self, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        inner = INNER // tp_group.size()
        self.tp_group = tp_group
        self.norm = torch.nn.Parameter(torch.ones(WIDTH))
        self.gate_up = torch.nn.Parameter(torch.empty(2 * inner, WIDTH))
        self.down = torch.nn.Parameter(torch.empty(WIDTH, inner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normal = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.norm
        gate, up = (Enter.apply(normal, self.tp_group) @ self.gate_up.T).chunk(2, dim=-1)
        return x + Leave.apply((torch.nn.functional.silu(gate) * up) @ self.down.T, self.tp_group)


class Enter(torch.autograd.Function):
    """Where tensor parallelism begins: the same values forward, the sum of gradients backward."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class Leave(torch.autograd.Function):
    """Where it ends: the other way round."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.contiguous()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Stage:
    """The layers of this pipeline rank, named by their global numbers."""

    def __init__(self, mesh: dist.DeviceMesh) -> None:
        self.pp, self.dp, self.tp = (mesh.get_group(name) for name in ("pp", "dp", "tp"))
        count = LAYERS // self.pp.size()
        self.blocks = {number: Block(self.tp) for number in range(self.pp.rank() * count, (self.pp.rank() + 1) * count)}
        self.parameters = {f"layers.{n}.{name}": p for n, block in self.blocks.items() for name, p in block.named_parameters()}
        self.fill()

    @torch.no_grad()
    def fill(self) -> None:
        """The same model whatever its layout: draw whole tensors, keep a part."""
        rank, size = self.tp.rank(), self.tp.size()
        for number, block in self.blocks.items():
            generator = torch.Generator().manual_seed(number)
            gate, up, down = (torch.randn(INNER, WIDTH, generator=generator) / 6 for _ in range(3))
            block.gate_up.copy_(torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]]))
            block.down.copy_(down.T.chunk(size, dim=1)[rank])

    def sharded_state(self) -> dict[str, gs.ShardedTensor | gs.ShardedTensorFactory]:
        """Where each parameter lies in the whole model. The last number of a replica id counts data-parallel copies."""
        rank, size, copy = self.tp.rank(), self.tp.size(), self.dp.rank()
        found = {}
        for key, parameter in self.parameters.items():
            if key.endswith("gate_up"):
                found[key] = swiglu(key, parameter, tp_rank=rank, tp_size=size, replica_id=(0, 0, copy))
            elif key.endswith("down"):
                found[key] = gs.ShardedTensor.from_rank_offsets(key, parameter, (1, rank, size), replica_id=(0, 0, copy))
            else:
                found[key] = gs.ShardedTensor.from_rank_offsets(key, parameter, replica_id=(0, rank, copy))
        return found

    def train(self, step: int) -> float:
        """Forward and backward through the pipeline; the loss of the whole batch."""
        inputs, targets = self.samples(step)
        first, last = self.pp.rank() == 0, self.pp.rank() == self.pp.size() - 1
        x = inputs if first else self.receive(inputs, -1)
        entered = x.requires_grad_(not first)
        for block in self.blocks.values():
            x = block(x)
        loss = torch.zeros(1)
        if last:
            loss = ((x - targets) ** 2).sum() / (BATCH * WIDTH)
            loss.backward()
        else:
            self.send(x, +1)
            x.backward(self.receive(x, +1))
        if not first:
            self.send(entered.grad, -1)
        total = loss.detach().reshape(1).clone()
        for group in (self.dp, self.pp):
            dist.all_reduce(total, group=group)
        return float(total)

    def samples(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This data-parallel rank's part of the batch of a step."""
        inputs = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1000 + step % 2))
        part = inputs.chunk(self.dp.size())[self.dp.rank()]
        return part, torch.roll(part, 1, dims=1).tanh()

    def send(self, x: torch.Tensor, to: int) -> None:
        dist.send(x.detach().contiguous(), group=self.pp, group_dst=self.pp.rank() + to)

    def receive(self, like: torch.Tensor, source: int) -> torch.Tensor:
        found = torch.empty(like.shape)
        dist.recv(found, group=self.pp, group_src=self.pp.rank() + source)
        return found


class ZeroAdamW:
    """AdamW over flat buckets: each data-parallel rank keeps the state of, and updates, its own range of each."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], dp: dist.ProcessGroup) -> None:
        self.parameters, self.dp, self.steps = parameters, dp, 0
        flat = [FlatParameter(key, tuple(p.shape), "float32") for key, p in reversed(parameters.items())]
        self.layout = lay_out(flat, dp.size(), BucketRules(max_elements=12_000))
        self.moments = {name: empty_buffers(self.layout, dp.rank(), torch.float32) for name in ("exp_avg", "exp_avg_sq")}

    @torch.no_grad()
    def step(self, lr: float = 3e-3) -> None:
        self.steps += 1
        for number, bucket in enumerate(self.layout.buckets):
            low, high = bucket.range_of(self.dp.rank())
            gradient, values = torch.zeros(bucket.elements), torch.zeros(bucket.elements)
            for parameter, start in zip(bucket.parameters, bucket.starts, strict=True):
                held, end = self.parameters[parameter.name], start + parameter.elements
                gradient[start:end], values[start:end] = held.grad.flatten(), held.flatten()
                held.grad = None
            dist.all_reduce(gradient, group=self.dp)
            first, second = (moments[number] for moments in self.moments.values())
            first.lerp_(gradient[low:high], 0.1)
            second.lerp_(gradient[low:high] ** 2, 0.05)
            mine = values[low:high].clone()
            root = (second / (1 - 0.95**self.steps)).sqrt() + 1e-8
            mine.addcdiv_(first, root, value=-lr / (1 - 0.9**self.steps))
            ranges = [bucket.range_of(rank) for rank in range(self.dp.size())]
            parts = [torch.empty(stop - start) for start, stop in ranges]
            dist.all_gather(parts, mine, group=self.dp)
            updated = torch.cat(parts)
            for parameter, start in zip(bucket.parameters, bucket.starts, strict=True):
                self.parameters[parameter.name].copy_(updated[start : start + parameter.elements].view(parameter.shape))


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
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel ranks")
    parser.add_argument("--pp", type=int, default=2, help="pipeline stages")
    parser.add_argument("--steps", type=int, default=8, help="train until this step")
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument("--dir", type=Path, default=Path("runs/megatron_style"))
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    shape = (arguments.pp, dist.get_world_size() // (arguments.pp * arguments.tp), arguments.tp)
    stage = Stage(init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp", "tp")))
    optimizer = ZeroAdamW(stage.parameters, stage.dp)

    def state(step: int) -> dict[str, object]:
        model = stage.sharded_state()
        moments = reshardable_state(optimizer.layout, stage.dp.rank(), optimizer.moments, model)
        return {"model": model, "optimizer": moments, "step": step}

    step, path = 0, newest(arguments.dir)
    if path is not None:
        # Fills parameters and moments where they lie.
        step = optimizer.steps = gs.load(state(0), path)["step"]
    if dist.get_rank() == 0:
        print(f"{shape[0]} stages x {shape[1]} data x {shape[2]} tensor ranks, from step {step}", flush=True)
    pending = None
    while step < arguments.steps:
        loss = stage.train(step)
        if pending is not None:
            # What is not copied yet must not change. (torch's optimizers wait by themselves, by `guard`.)
            pending.wait_staged()
        optimizer.step()
        step += 1
        if dist.get_rank() == 0:
            print(f"step {step} loss {loss:.6f} {loss.hex()}", flush=True)
        if step % arguments.save_every == 0:
            pending = gs.async_save(state(step), arguments.dir / f"step_{step:08d}")
    gs.finish_saves()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
