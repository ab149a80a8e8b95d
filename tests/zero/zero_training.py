"""A real, small training job with a ZeRO-1 optimizer, tensor and pipeline parallelism, over any group of giantstep's.

`ZeroAdamW` is the reference: parameters of any dtype, gradients that are reduced and scattered bucket by bucket, float32 main
parameters and moments of the rank's own range, updated by AdamW, and parameters that are gathered again. Collectives go
over `Group.exchange`, so ranks may be threads or processes; sums are made in the order of ranks, so that runs repeat to the
bit.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from zero_layouts import Place, Side, Spec

from giantstep.group.base import Group
from giantstep.zero import FlatLayout, empty_buffers, reshardable_state, same_layout_state

HIDDEN, INNER, BATCH, BLOCKS = 8, 24, 12, 4
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1

Gather = Callable[[torch.Tensor], list[torch.Tensor]]


class ZeroAdamW:
    """AdamW whose state is divided among data-parallel ranks.

    Args:
        parameters: by the names in the layout; changed in place by `step`.
        layout: the buckets.
        rank: of this process among the data-parallel ranks.
        gather: returns the float32 tensors that these ranks pass to it, in their order.
    """

    def __init__(self, parameters: dict[str, torch.Tensor], layout: FlatLayout, rank: int, gather: Gather) -> None:
        self.parameters, self.layout, self.rank, self._gather = parameters, layout, rank, gather
        self.steps = 0
        self.states = {name: empty_buffers(layout, rank, torch.float32) for name in ("exp_avg", "exp_avg_sq", "fp32_param")}
        for number, main in enumerate(self.states["fp32_param"]):
            low, high = layout.buckets[number].range_of(rank)
            main.copy_(self._flat(number, parameters)[low:high])

    def step(self, gradients: dict[str, torch.Tensor]) -> None:
        """Update the rank's own range with the sum of all ranks' gradients; gather the parameters."""
        self.steps += 1
        for number, bucket in enumerate(self.layout.buckets):
            low, high = bucket.range_of(self.rank)
            reduced = sum(part[low:high] for part in self._gather(self._flat(number, gradients)))
            self._update(number, reduced)
        self.gather_parameters()

    def _update(self, number: int, gradient: Any) -> None:
        main, average, squares = (self.states[name][number] for name in ("fp32_param", "exp_avg", "exp_avg_sq"))
        main.mul_(1 - LR * DECAY)
        average.lerp_(gradient, 1 - BETAS[0])
        squares.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        size = LR / (1 - BETAS[0] ** self.steps)
        main.addcdiv_(average, (squares.sqrt() / math.sqrt(1 - BETAS[1] ** self.steps)).add_(EPS), value=-size)

    def gather_parameters(self) -> None:
        """Make the parameters what the main parameters of all ranks say; also to be called after loading."""
        for bucket, main in zip(self.layout.buckets, self.states["fp32_param"], strict=True):
            whole = torch.cat(self._gather(main))
            for parameter, start in zip(bucket.parameters, bucket.starts, strict=True):
                target = self.parameters[parameter.name]
                target.copy_(whole[start : start + parameter.elements].view(parameter.shape))

    def _flat(self, number: int, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        bucket = self.layout.buckets[number]
        flat = torch.zeros(bucket.elements)
        for parameter, start in zip(bucket.parameters, bucket.starts, strict=True):
            flat[start : start + parameter.elements] = tensors[parameter.name].flatten()
        return flat


def model_specs(dtype: torch.dtype = torch.float32) -> list[Spec]:
    """The parameters of residual SwiGLU blocks; biases are float32 always."""
    return [
        spec
        for n in range(BLOCKS)
        for spec in (
            Spec(f"block{n}.mlp", (INNER, HIDDEN), 0, "glu", dtype),
            Spec(f"block{n}.down", (HIDDEN, INNER), 1, dtype=dtype),
            Spec(f"block{n}.bias", (HIDDEN,)),
        )
    ]


def initial(spec: Spec) -> list[torch.Tensor]:
    """The global tensors that a parameter begins with; two where it is fused."""
    generator = torch.Generator().manual_seed(zlib.crc32(spec.name.encode()))
    return [torch.randn(spec.shape, generator=generator) * 0.15 for _ in spec.halves()]


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a step, [BATCH, HIDDEN] each; there are two batches, which take turns."""
    generator = torch.Generator().manual_seed(1000 + step % 2)
    inputs = torch.randn(BATCH, HIDDEN, generator=generator)
    return inputs, torch.roll(inputs, 1, dims=1).tanh()


def block(inputs: torch.Tensor, mlp: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """What one tensor-parallel rank adds to the inputs."""
    gate, up = torch.chunk(inputs @ mlp.t(), 2, dim=1)
    return (torch.nn.functional.silu(gate) * up) @ down.t()


class Job:
    """One rank of a training job.

    All ranks of all axes call the same exchanges in the same order, and take of each what concerns them.
    """

    def __init__(self, group: Group, side: Side, dtype: torch.dtype = torch.float32) -> None:
        self.group, self.side, self.place = group, side, side.places[group.rank]
        specs = model_specs(dtype)
        held = side.held(specs, self.place)
        self.specs = {spec.name: spec for spec in held}
        self.parameters = {spec.name: self._local(spec) for spec in held}
        self.optimizer = ZeroAdamW(self.parameters, side.layout(specs, self.place), self.place.dp, self._among_data_parallel)

    def _local(self, spec: Spec) -> torch.Tensor:
        parts = initial(spec)
        if spec.axis is not None:
            parts = [part.chunk(self.side.tp, dim=spec.axis)[self.place.tp] for part in parts]
        return torch.cat(parts, dim=spec.axis or 0).to(spec.dtype)

    # Collectives.

    def _exchange(self, tensor: torch.Tensor | None) -> dict[Place, torch.Tensor]:
        """What every rank gave, by its place; of those that gave nothing, an empty tensor."""
        report = b"" if tensor is None else tensor.detach().contiguous().numpy().tobytes()
        answers = self.group.exchange((report,), lambda reports: [tuple(one[0] for one in reports)] * len(reports), "train", 60)
        shapes = {} if tensor is None else {"shape": tensor.shape}
        found = {}
        for place, data in zip(self.side.places, answers, strict=True):
            flat = torch.from_numpy(np.frombuffer(data, dtype=np.float32).copy())
            found[place] = flat.view(shapes["shape"]) if shapes and flat.numel() == shapes["shape"].numel() else flat
        return found

    def _among_data_parallel(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        found, here = self._exchange(tensor), self.place
        return [found[Place(0, here.pp, here.tp, dp)].flatten() for dp in range(self.side.dp)]

    def _sum_of_tensor_parallel(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        found, here = self._exchange(tensor), self.place
        return None if tensor is None else sum(found[Place(0, here.pp, tp, here.dp)] for tp in range(self.side.tp))

    def _from_stage(self, tensor: torch.Tensor | None, stage: int) -> torch.Tensor:
        found = self._exchange(tensor if self.place.pp == stage else None)
        return found[Place(0, stage, self.place.tp, self.place.dp)].view(-1, HIDDEN)

    # One step.

    def train(self, step: int) -> float:
        """Train one step; the loss before it."""
        share = BATCH // self.side.dp
        inputs, targets = (part[self.place.dp * share :][:share] for part in batch(step))
        kept: dict[int, tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]] = {}
        hidden = inputs
        for stage in range(self.side.pp):
            for number in self._blocks(stage):
                hidden = self._forward(hidden, number, kept, active=stage == self.place.pp)
            hidden = self._from_stage(hidden, stage)
        losses = self._exchange(((hidden - targets) ** 2).sum().view(1))
        gradient = 2 * (hidden - targets) / (BATCH * HIDDEN)
        gradients: dict[str, torch.Tensor] = {}
        for stage in reversed(range(self.side.pp)):
            for number in reversed(self._blocks(stage)):
                gradient = self._backward(gradient, number, kept, gradients)
            gradient = self._from_stage(gradient, stage)
        self.optimizer.step(gradients)
        of_data_parallel = [losses[Place(0, self.side.pp - 1, 0, dp)] for dp in range(self.side.dp)]
        return float(sum(of_data_parallel)) / (BATCH * HIDDEN)

    def _blocks(self, stage: int) -> list[int]:
        return [n for n in range(BLOCKS) if n * self.side.pp // BLOCKS == stage]

    def _forward(self, hidden: torch.Tensor, number: int, kept: Any, *, active: bool) -> torch.Tensor:
        if not active:
            self._sum_of_tensor_parallel(None)
            return hidden
        inputs = hidden.detach().requires_grad_()
        weights = [self.parameters[f"block{number}.{name}"].float().detach().requires_grad_() for name in ("mlp", "down")]
        partial = block(inputs, *weights)
        kept[number] = (inputs, weights, partial)
        added = self._sum_of_tensor_parallel(partial)
        return hidden + added + self.parameters[f"block{number}.bias"]

    def _backward(self, gradient: torch.Tensor, number: int, kept: Any, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        if number not in kept:
            self._sum_of_tensor_parallel(None)
            return gradient
        inputs, weights, partial = kept[number]
        partial.backward(gradient)
        for name, weight in zip(("mlp", "down"), weights, strict=True):
            gradients[f"block{number}.{name}"] = weight.grad
        gradients[f"block{number}.bias"] = gradient.sum(0)
        return gradient + self._sum_of_tensor_parallel(inputs.grad)

    # State.

    def state(self, form: str) -> dict[str, Any]:
        """What is saved and loaded: model, optimizer in one of two forms, and the number of steps."""
        optimizer, place = self.optimizer, self.place
        model = {name: spec.described(place, self.side.tp, self.parameters[name]) for name, spec in self.specs.items()}
        if form == "reshardable":
            held = reshardable_state(optimizer.layout, place.dp, optimizer.states, model)
        else:
            held = same_layout_state(optimizer.layout, place.dp, optimizer.states, position=self.side.position(place))
        return {"model": model, "optimizer": {form: held, "step": optimizer.steps}}

    def restore(self, loaded: dict[str, Any]) -> None:
        """After `gs.load` has filled the buffers."""
        self.optimizer.steps = loaded["optimizer"]["step"]
        self.optimizer.gather_parameters()
