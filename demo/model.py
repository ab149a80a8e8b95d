"""A small byte-level GPT, and how it is cut over processes with PyTorch's own tools.

Nothing here knows of giantstep. The same seed gives the same weights in every layout, because every process
builds the whole model on the CPU before it is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional

DP, TP = "dp", "tp"


@dataclass(frozen=True, kw_only=True)
class GptShape:
    """Sizes of the model, in elements; `context` in bytes of text."""

    vocabulary: int = 256
    context: int = 128
    width: int = 256
    heads: int = 8
    layers: int = 4

    @property
    def hidden(self) -> int:
        """Width of the MLP."""
        return 4 * self.width


class Attention(nn.Module):
    """Causal self-attention over the heads that this process holds."""

    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.head_width = shape.width // shape.heads
        self.query = nn.Linear(shape.width, shape.width, bias=False)
        self.key = nn.Linear(shape.width, shape.width, bias=False)
        self.value = nn.Linear(shape.width, shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, context, width) to the same."""
        query, key, value = (
            part(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, context, width) to the same."""
        out: Tensor = self.down(functional.gelu(self.up(x)))
        return out


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.mlp_norm = nn.LayerNorm(shape.width)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, context, width) to the same."""
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Gpt(nn.Module):
    """Bytes to logits of the next byte."""

    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.token = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, context) bytes to (batch, context, vocabulary) logits."""
        positions = torch.arange(tokens.shape[1]).unsqueeze(0)
        x = self.token(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def build(shape: GptShape, seed: int) -> Gpt:
    """The whole model on the CPU, with weights that depend on the seed alone."""
    torch.manual_seed(seed)
    model = Gpt(shape)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return model


def cut_tensor_parallel(model: Gpt, mesh: DeviceMesh) -> None:
    """Tensor parallel with sequence parallel norms: activations between layers are cut along the context."""
    parallelize_module(
        model,
        mesh,
        {
            "token": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "position": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        },
    )
    for block in model.blocks:
        parallelize_module(
            block,
            mesh,
            {
                "attention_norm": SequenceParallel(),
                "attention": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
                "attention.query": ColwiseParallel(),
                "attention.key": ColwiseParallel(),
                "attention.value": ColwiseParallel(),
                "attention.out": RowwiseParallel(output_layouts=Shard(1)),
                "mlp_norm": SequenceParallel(),
                "mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
                "mlp.up": ColwiseParallel(),
                "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
            },
        )


def cut(model: Gpt, mesh: DeviceMesh) -> None:
    """Cut the model over a mesh with dimension "dp" (FSDP2) and, where it is larger than 1, "tp" (tensor parallel)."""
    if TP in (mesh.mesh_dim_names or ()):
        cut_tensor_parallel(model, mesh[TP])
    for block in model.blocks:
        fully_shard(block, mesh=mesh[DP])
    fully_shard(model, mesh=mesh[DP])
