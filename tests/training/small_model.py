"""A small language model, cut by hand over tensor, pipeline, data, expert and fully sharded parallel ranks that are threads.

It computes the same function under every layout, up to the order of additions, so that loss curves can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from thread_comm import Comm, Hall, enter, leave

import giantstep as gs

VOCABULARY, WIDTH, HIDDEN, LAYERS, EXPERTS = 24, 16, 48, 4, 4
BATCH, LENGTH = 12, 4


@dataclass(frozen=True)
class Layout:
    """How many ranks each kind of parallelism has; ranks are numbered (stage, data, tensor), tensor fastest.

    Attributes:
        expert: ranks that share the experts: consecutive data ranks.
        sharded: data ranks each keep a part of every parameter's rows (uneven, maybe empty) and of the optimizer's state.
    """

    tensor: int = 1
    stages: int = 1
    data: int = 1
    expert: int = 1
    sharded: bool = False

    @property
    def ranks(self) -> int:
        return self.tensor * self.stages * self.data


@dataclass
class Place:
    """One rank in a layout, and whom it talks to."""

    layout: Layout
    rank: int
    tensor: Comm = field(repr=False)
    stage: Comm = field(repr=False)
    data: Comm = field(repr=False)
    expert: Comm = field(repr=False)
    expert_data: Comm = field(repr=False)
    world: Comm = field(repr=False)

    @classmethod
    def of(cls, layout: Layout, rank: int, hall: Hall) -> Place:
        grid = torch.arange(layout.ranks).reshape(layout.stages, layout.data, layout.tensor)
        s, d, t = (int(x) for x in (grid == rank).nonzero()[0])
        blocks = grid[s, :, t].reshape(-1, layout.expert)
        block, within = divmod(d, layout.expert)

        def comm(members: torch.Tensor) -> Comm:
            return Comm(hall, members.tolist(), rank)

        return cls(
            layout,
            rank,
            tensor=comm(grid[s, d]),
            stage=comm(grid[:, d, t]),
            data=comm(grid[s, :, t]),
            expert=comm(blocks[block]),
            expert_data=comm(blocks[:, within]),
            world=comm(grid.flatten()),
        )


class Weight:
    """One parameter as this rank holds it.

    Args:
        key: name of the global tensor.
        whole: its shape.
        axis: which axis tensor parallelism cuts; None: none.
        of_experts: the first axis counts experts, which are divided over expert ranks.
    """

    def __init__(self, place: Place, key: str, whole: tuple[int, ...], axis: int | None, *, of_experts: bool = False) -> None:
        self.key, self.whole, self.place = key, whole, place
        self.replicas = place.expert_data if of_experts else place.data
        begin, end = [0] * len(whole), list(whole)
        cuts = [(axis, place.tensor)] if axis is not None else []
        cuts += [(0, place.expert)] if of_experts else []
        for cut, comm in cuts:
            step = whole[cut] // comm.size
            begin[cut], end[cut] = comm.rank * step, (comm.rank + 1) * step
        self._cuts = cuts
        self.held = [slice(low, high) for low, high in zip(begin, end, strict=True)]
        self.rows = end[0] - begin[0]
        if place.layout.sharded:
            # As torch.chunk does: the last ones may have fewer rows, or none.
            step = -(-self.rows // self.replicas.size)
            first = min(self.rows, self.replicas.rank * step)
            last = min(self.rows, first + step)
            self.part = slice(first, last)
        else:
            self.part = slice(0, self.rows)
        data = torch.full((self.part.stop - self.part.start, *[cut.stop - cut.start for cut in self.held[1:]]), torch.nan)
        self.param = torch.nn.Parameter(data)

    def fill(self, whole: torch.Tensor) -> None:
        """Set this rank's part of given values of the whole tensor."""
        with torch.no_grad():
            self.param.copy_(whole[tuple(self.held)][self.part])

    def full(self) -> torch.Tensor:
        """What the model computes with: rows gathered where they are sharded; gradients go to `grad_of_full`."""
        if not self.place.layout.sharded:
            return self.param
        with torch.no_grad():
            self._gathered = torch.cat(self.replicas.gather(self.param.detach().clone())).requires_grad_()
        return self._gathered

    def reduce(self) -> None:
        """Average gradients over the ranks that have other samples; keep this rank's part."""
        source = self._gathered if self.place.layout.sharded else self.param
        gradient = torch.zeros_like(source) if source.grad is None else source.grad
        total = self.replicas.sum(gradient)
        self.param.grad = total[self.part].clone() if self.place.layout.sharded else total

    def whole_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor like the parameter, of all ranks together."""
        parts = self.replicas.gather(tensor.clone()) if self.place.layout.sharded else [tensor]
        found = torch.cat(parts)
        for axis, comm in self._cuts:
            found = torch.cat(comm.gather(found.clone()), dim=axis)
        return found

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """The inverse of `whole_of`."""
        return whole[tuple(self.held)][self.part]

    def sharded(self) -> gs.ShardedTensor:
        """What giantstep is told."""
        offset = [cut.start for cut in self.held]
        offset[0] += self.part.start
        copies = 0 if self.place.layout.sharded else self.replicas.rank
        is_cut = any(comm is self.place.tensor for _, comm in self._cuts)
        tensor_copy = 0 if is_cut else self.place.tensor.rank
        return gs.ShardedTensor(
            key=self.key,
            data=self.param,
            dtype=self.param.dtype,
            local_shape=tuple(self.param.shape),
            global_shape=self.whole,
            global_offset=tuple(offset),
            axis_fragmentations=None,
            replica_id=(0, tensor_copy, copies),
        )


class Model:
    """This rank's part: the layers of its stage, cut over tensor and expert ranks."""

    def __init__(self, place: Place, *, experts: bool) -> None:
        self.place = place
        self.weights: list[Weight] = []
        per_stage = LAYERS // place.layout.stages
        self.layers = range(place.stage.rank * per_stage, (place.stage.rank + 1) * per_stage)
        self.is_first, self.is_last = place.stage.rank == 0, place.stage.rank == place.stage.size - 1
        self.experts = experts
        if self.is_first:
            self.embedding = self._weight("embedding.weight", (VOCABULARY, WIDTH), None)
        self.blocks = [self._block(number) for number in self.layers]
        if self.is_last:
            self.head = self._weight("head.weight", (VOCABULARY, WIDTH), 0)

    def _weight(self, key: str, shape: tuple[int, ...], axis: int | None, *, of_experts: bool = False) -> Weight:
        self.weights.append(Weight(self.place, key, shape, axis, of_experts=of_experts))
        return self.weights[-1]

    def _block(self, number: int) -> dict[str, Weight]:
        prefix = f"layers.{number}"
        found = {
            "norm": self._weight(f"{prefix}.norm.weight", (WIDTH,), None),
            "up": self._weight(f"{prefix}.up.weight", (HIDDEN, WIDTH), 0),
            "down": self._weight(f"{prefix}.down.weight", (WIDTH, HIDDEN), 1),
        }
        if self.experts:
            found["router"] = self._weight(f"{prefix}.router.weight", (EXPERTS, WIDTH), None)
            found["expert_up"] = self._weight(f"{prefix}.experts.up", (EXPERTS, HIDDEN, WIDTH), None, of_experts=True)
            found["expert_down"] = self._weight(f"{prefix}.experts.down", (EXPERTS, WIDTH, HIDDEN), None, of_experts=True)
        return found

    def fill(self, seed: int) -> None:
        """The same global values under every layout."""
        for weight in self.weights:
            generator = torch.Generator().manual_seed(seed + sum(map(ord, weight.key)) * 7919)
            scale = 1.0 if weight.key.endswith("norm.weight") else 0.2
            weight.fill(torch.randn(weight.whole, generator=generator) * scale)

    def sharded_state(self) -> dict[str, gs.ShardedTensor]:
        """For `save` and `load`."""
        return {weight.key: weight.sharded() for weight in self.weights}

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return (weight.param for weight in self.weights)

    # One step.

    def loss(self, tokens: torch.Tensor) -> float:
        """Forward and backward over this data rank's samples; gradients are averaged over all. Returns the mean loss."""
        for weight in self.weights:
            weight.param.grad = None
        if self.is_first:
            hidden = self.embedding.full()[tokens[:, :-1]]
        else:
            hidden = self.place.stage.receive(self.place.stage.rank - 1, "forward").requires_grad_()
        entered = hidden
        for block in self.blocks:
            hidden = self._through(block, hidden)
        if self.is_last:
            value = self._cross_entropy(hidden, tokens[:, 1:])
            value.backward()
        else:
            self.place.stage.send(hidden, self.place.stage.rank + 1, "forward")
            hidden.backward(self.place.stage.receive(self.place.stage.rank + 1, "backward"))
        if not self.is_first:
            self.place.stage.send(entered.grad, self.place.stage.rank - 1, "backward")
        for weight in self.weights:
            weight.reduce()
        mean = float(self.place.data.sum(value)) if self.is_last else 0.0
        return float(sum(self.place.stage.gather(mean)))

    def _through(self, block: dict[str, Weight], hidden: torch.Tensor) -> torch.Tensor:
        normal = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6) * block["norm"].full()
        inner = torch.tanh(enter(normal, self.place.tensor) @ block["up"].full().T)
        result = hidden + leave(inner @ block["down"].full().T, self.place.tensor)
        if self.experts:
            result = result + self._experts(block, normal)
        return result

    def _experts(self, block: dict[str, Weight], normal: torch.Tensor) -> torch.Tensor:
        """Every sample goes to all experts, weighted; each expert rank has all samples of its peers, and adds its share."""
        comm = self.place.expert
        weights = torch.softmax(normal @ block["router"].full().T, dim=-1)
        everybody = _Everybody.apply(normal, comm)
        shares = _Everybody.apply(weights, comm)
        up, down = block["expert_up"].full(), block["expert_down"].full()
        first = block["expert_up"].held[0].start
        total = torch.zeros_like(everybody)
        for number in range(up.shape[0]):
            found = torch.tanh(everybody @ up[number].T) @ down[number].T
            total = total + shares[..., first + number : first + number + 1] * found
        mixed: torch.Tensor = _Mine.apply(total, comm)
        return mixed

    def _cross_entropy(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        local = enter(hidden, self.place.tensor) @ self.head.full().T
        first = self.head.held[0].start
        largest = torch.stack(self.place.tensor.gather(local.detach().amax(-1))).amax(0)
        total = leave(torch.exp(local - largest[..., None]).sum(-1), self.place.tensor)
        mine = (labels >= first) & (labels < first + local.shape[-1])
        picked = local.gather(-1, torch.where(mine, labels - first, 0)[..., None])[..., 0] - largest
        chosen = leave(torch.where(mine, picked, torch.zeros_like(picked)), self.place.tensor)
        # Of the mean over the whole batch, this data rank's share.
        return (torch.log(total) - chosen).sum() / (BATCH * (LENGTH - 1))


class _Everybody(torch.autograd.Function):
    """Samples of all expert ranks, one after another; on the way back each gets the sum of what all computed for its own."""

    @staticmethod
    def forward(ctx: object, tensor: torch.Tensor, comm: Comm) -> torch.Tensor:
        ctx.comm, ctx.rows = comm, tensor.shape[0]  # type: ignore[attr-defined]
        return torch.cat(comm.gather(tensor.detach().clone()))

    @staticmethod
    def backward(ctx: object, *gradients: torch.Tensor) -> object:
        comm, rows = ctx.comm, ctx.rows  # type: ignore[attr-defined]
        return comm.sum(gradients[0])[comm.rank * rows : (comm.rank + 1) * rows], None


class _Mine(torch.autograd.Function):
    """The sum of what all expert ranks computed, for this rank's samples."""

    @staticmethod
    def forward(ctx: object, tensor: torch.Tensor, comm: Comm) -> torch.Tensor:
        rows = tensor.shape[0] // comm.size
        ctx.comm = comm  # type: ignore[attr-defined]
        return comm.sum(tensor)[comm.rank * rows : (comm.rank + 1) * rows]

    @staticmethod
    def backward(ctx: object, *gradients: torch.Tensor) -> object:
        return torch.cat(ctx.comm.gather(gradients[0].detach().clone())), None  # type: ignore[attr-defined]


def batch(step: int, place: Place) -> torch.Tensor:
    """This data rank's samples of a step: the global batch is the same under every layout."""
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1000 + step))
    share = BATCH // place.data.size
    return tokens[place.data.rank * share : (place.data.rank + 1) * share]
