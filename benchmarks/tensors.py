"""The tensors of transformers, as names, shapes and dtypes: what layouts divide over ranks. No memory, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.shards.dtypes import ITEM_BYTES

BF16, F32 = 11, 12
_LAYER_TENSORS = 9


@dataclass(frozen=True, slots=True)
class Tensors:
    """Some global tensors.

    Attributes:
        keys: their names.
        shapes: their global shapes.
        dtype: [tensors] codes of their dtypes.
    """

    keys: list[str]
    shapes: list[tuple[int, ...]]
    dtype: NDArray[np.uint8]

    @classmethod
    def of(cls, named: Iterable[tuple[str, tuple[int, ...]]], dtype: int) -> Tensors:
        """From names and shapes, all of one dtype."""
        pairs = list(named)
        return cls([key for key, _ in pairs], [shape for _, shape in pairs], np.full(len(pairs), dtype, dtype=np.uint8))

    @property
    def bytes(self) -> int:
        """Size of all of them."""
        return sum(math.prod(shape) * ITEM_BYTES[code] for shape, code in zip(self.shapes, self.dtype, strict=True))

    def where(self, wanted: Callable[[str], bool]) -> Tensors:
        """Those whose name is wanted."""
        rows = [row for row, key in enumerate(self.keys) if wanted(key)]
        return Tensors([self.keys[row] for row in rows], [self.shapes[row] for row in rows], self.dtype[rows])

    def moments(self) -> Tensors:
        """Adam's two moments and a float32 copy of each of them."""
        pairs = list(zip(self.keys, self.shapes, strict=True))
        kinds = ("exp_avg", "exp_avg_sq", "param")
        return Tensors.of(((f"optimizer.{kind}.{key}", shape) for kind in kinds for key, shape in pairs), F32)


def _layer(name: str, hidden: int, key_values: int, inner: int) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (f"{name}.input_layernorm.weight", (hidden,)),
        (f"{name}.self_attn.q_proj.weight", (hidden, hidden)),
        (f"{name}.self_attn.k_proj.weight", (key_values, hidden)),
        (f"{name}.self_attn.v_proj.weight", (key_values, hidden)),
        (f"{name}.self_attn.o_proj.weight", (hidden, hidden)),
        (f"{name}.post_attention_layernorm.weight", (hidden,)),
        (f"{name}.mlp.gate_proj.weight", (inner, hidden)),
        (f"{name}.mlp.up_proj.weight", (inner, hidden)),
        (f"{name}.mlp.down_proj.weight", (hidden, inner)),
    ]


def large_transformer(tensors: int) -> Tensors:
    """So many tensors of a transformer as wide as Llama 70B: embedding, layers, and scalars for the rest."""
    layers = (tensors - 3) // _LAYER_TENSORS
    named: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (128_256, 8192))]
    for number in range(layers):
        named += _layer(f"model.layers.{number:03d}", 8192, 1024, 28_672)
    named += [("model.norm.weight", (8192,)), ("lm_head.weight", (128_256, 8192))]
    named += [(f"optimizer.step.{number}", ()) for number in range(tensors - len(named))]
    return Tensors.of(named, BF16)


def small_transformer() -> Tensors:
    """The parameters of Llama 3.2 1B; embedding and output layer are one tensor."""
    named: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (128_256, 2048))]
    for number in range(16):
        named += _layer(f"model.layers.{number:02d}", 2048, 512, 8192)
    return Tensors.of([*named, ("model.norm.weight", (2048,))], BF16)


def embedding_dominated() -> Tensors:
    """A model of which one tensor, the embedding, makes up 60 % of the bytes."""
    layers = [item for number in range(12) for item in _layer(f"model.layers.{number:02d}", 768, 768, 3072)]
    rest = sum(math.prod(shape) for _, shape in layers)
    return Tensors.of([("model.embed_tokens.weight", (round(1.5 * rest / 768), 768)), *layers], F32)


def experts(count: int) -> Tensors:
    """Eight layers with so many experts each, the experts as tensors of their own."""
    return Tensors.of(
        (
            (f"model.layers.{layer}.experts.{expert:03d}.{name}", shape)
            for layer in range(8)
            for expert in range(count)
            for name, shape in (("w1", (4096, 2048)), ("w2", (2048, 4096)), ("w3", (4096, 2048)))
        ),
        BF16,
    )
