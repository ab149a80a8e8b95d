"""A small transformer under every parallel layout that torch has, and what is asked of each: train, save, load, compare."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import giantstep as gs

# 13 rows are cut unevenly by 4 ranks, and by 2.
VOCABULARY, WIDTH, HEADS, HIDDEN, CONTEXT, SEQUENCES = 13, 8, 4, 12, 5, 4

SINGLE = "single process"
# Of 4 processes.
LAYOUTS = ("DDP", "FSDP2", "HSDP", "TP", "FSDP2 x TP", "FSDP1", "FSDP1 flat", "FSDP1 hybrid")
FSDP1_LAYOUTS = tuple(layout for layout in LAYOUTS if layout.startswith("FSDP1"))
# FSDP1 has no optimizer state dict of its own that could be loaded under another layout.
PLAIN_LAYOUTS = tuple(layout for layout in LAYOUTS if layout not in FSDP1_LAYOUTS)
FLATTENED = StateDictOptions(flatten_optimizer_state_dict=True, cpu_offload=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(x)
        query, key, value = (
            part(seen).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def cut_tensor_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    """Norms and the embedding stay plain tensors, equal on all ranks."""
    for block in model.blocks:
        plan = dict.fromkeys(("query", "key", "value", "up"), ColwiseParallel()) | dict.fromkeys(
            ("out", "down"), RowwiseParallel()
        )
        parallelize_module(block, mesh, plan)
    parallelize_module(model, mesh, {"head": ColwiseParallel(output_layouts=Replicate())})


def cut_fsdp1(model: Transformer, **settings: Any) -> nn.Module:
    settings["device_id"] = torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, block in enumerate(model.blocks):
            model.blocks[number] = FullyShardedDataParallel(block, **settings)
        return FullyShardedDataParallel(model, **settings)


@dataclass
class Cut:
    """A model under a layout, and which part of a batch this rank takes."""

    model: nn.Module
    dp: int = 1
    part: int = 0


def cut(layout: str, model: Transformer) -> Cut:
    """Put the model, which is whole and the same on all ranks, under a layout."""
    if layout == SINGLE:
        return Cut(model)
    rank, size = dist.get_rank(), dist.get_world_size()
    if layout == "TP":
        cut_tensor_parallel(model, init_device_mesh("cpu", (size,)))
        return Cut(model)
    if layout == "FSDP2 x TP":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        cut_tensor_parallel(model, mesh["tp"])
        return _fully_sharded(model, mesh["dp"], mesh["dp"].size(), mesh["dp"].get_local_rank())
    if layout == "FSDP2":
        return _fully_sharded(model, init_device_mesh("cpu", (size,)), size, rank)
    if layout == "HSDP":
        return _fully_sharded(model, init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("copies", "shards")), size, rank)
    if layout == "DDP":
        return Cut(DistributedDataParallel(model), size, rank)
    if layout == "FSDP1 hybrid":
        # The old way, by process groups instead of a mesh: two copies, cut over two ranks each.
        shards = [dist.new_group([2 * number, 2 * number + 1]) for number in range(size // 2)][rank // 2]
        copies = [dist.new_group([number, number + 2]) for number in range(2)][rank % 2]
        strategy = ShardingStrategy.HYBRID_SHARD
        wrapped = cut_fsdp1(model, process_group=(shards, copies), sharding_strategy=strategy, use_orig_params=True)
        return Cut(wrapped, size, rank)
    return Cut(cut_fsdp1(model, use_orig_params=layout == "FSDP1"), size, rank)


def _fully_sharded(model: Transformer, mesh: DeviceMesh, dp: int, part: int) -> Cut:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return Cut(model, dp, part)


class Trainer:
    """A model in training under a layout, on this rank."""

    def __init__(self, layout: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.layout = layout
        self.cut = cut(layout, Transformer())
        self.model = self.cut.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)

    def train(self, step: int) -> float:
        """One step on the batch of its number; the mean loss of all ranks."""
        tokens = torch.randint(VOCABULARY, (SEQUENCES, CONTEXT + 1), generator=torch.Generator().manual_seed(step))
        mine = tokens.chunk(self.cut.dp)[self.cut.part]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = functional.cross_entropy(self.model(mine[:, :-1]).flatten(0, 1), mine[:, 1:].flatten())
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        total = loss.detach().double()
        if self.cut.dp > 1:
            groups = dist.get_world_size() // self.cut.dp
            dist.all_reduce(total)
            total /= self.cut.dp * groups
        return float(total)

    def scramble(self) -> None:
        """Overwrite everything that a load is to fill."""
        with torch.no_grad():
            states = [value for state in self.optimizer.state.values() for value in state.values()]
            for tensor in [*self.model.parameters(), *states]:
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(3.0)

    # State, as users write it.

    def named(self, options: StateDictOptions | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        with warnings.catch_warnings():
            # Torch's FSDP1 uses what torch has deprecated.
            warnings.simplefilter("ignore")
            return get_state_dict(self.model, self.optimizer, options=options)

    def save(self, form: str, path: str) -> None:
        gs.save(self._state(form), path)

    def load(self, form: str, path: str) -> None:
        if form == "plain" and not self.optimizer.state:
            # Makes the state that a new optimizer has not got yet.
            self.named()
        loaded = gs.load(self._state(form), path)
        if form == "plain":
            return
        options = FLATTENED if form == "flattened" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=loaded["model"],
                optim_state_dict=loaded["optimizer"],
                options=options,
            )

    def _state(self, form: str) -> dict[str, Any]:
        if form == "plain":
            model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
            return {"model": model, "optimizer": self.optimizer}
        model_state, optimizer_state = self.named(FLATTENED if form == "flattened" else None)
        return {"model": model_state, "optimizer": optimizer_state}

    def digests(self) -> dict[str, str]:
        """Digest of every whole tensor, which torch gathers, not giantstep. Collective."""
        model_state, optimizer_state = self.named(StateDictOptions(full_state_dict=True))
        tensors = {f"model.{key}": tensor for key, tensor in model_state.items()}
        for name, state in optimizer_state["state"].items():
            tensors |= {f"optimizer.{name}.{kind}": tensor for kind, tensor in state.items()}
        return {key: xxhash.xxh3_64_hexdigest(tensor.detach().contiguous().numpy()) for key, tensor in tensors.items()}
