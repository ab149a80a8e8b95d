"""A quantised wrapper tensor of the tests' own: int8 rows with a scale each, two 4-bit values per byte on request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch

BLOCK = 4


class RowScaled(torch.Tensor):
    """`data * scale`, one scale per `BLOCK` rows; presents itself as float32 of the data's shape."""

    data8: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, data8: torch.Tensor, scale: torch.Tensor) -> Self:
        self = torch.Tensor._make_wrapper_subclass(cls, data8.shape, dtype=torch.float32, device=data8.device)  # type: ignore[attr-defined]
        self.data8, self.scale = data8, scale
        return self  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:
        return f"RowScaled({tuple(self.shape)})"

    @classmethod
    def quantised(cls, plain: torch.Tensor) -> RowScaled:
        blocks = plain.reshape(-1, BLOCK, *plain.shape[1:])
        scale = blocks.abs().amax(dim=tuple(range(1, blocks.dim()))) / 127
        data = (plain / scale.repeat_interleave(BLOCK).view(-1, *(1,) * (plain.dim() - 1))).round().to(torch.int8)
        return cls(data, scale)

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        rows = self.scale.repeat_interleave(self.data8.shape[0] // self.scale.shape[0])
        return self.data8.float() * rows.view(-1, *(1,) * (self.dim() - 1))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return type(args[0])(args[0].data8.detach(), args[0].scale.detach())
        if func is torch.ops.aten.view.default and tuple(args[1]) == tuple(args[0].shape):
            return type(args[0])(args[0].data8, args[0].scale)
        raise NotImplementedError(f"RowScaled has no {func}")


def take_apart(tensor: RowScaled) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return {"data8": tensor.data8, "scale": tensor.scale.view(-1, *(1,) * (tensor.dim() - 1))}, {"kind": "rows"}


def put_together(parts: Mapping[str, torch.Tensor], attributes: dict[str, Any]) -> RowScaled:
    if attributes != {"kind": "rows"}:
        raise ValueError(f"attributes {attributes}")
    return RowScaled(parts["data8"], parts["scale"].reshape(-1))


class Flattening(RowScaled):
    """The same, with torch's own protocol for wrapper subclasses instead of a registration."""

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["data8", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], _context: Any, _size: Any, _stride: Any) -> Flattening:
        return cls(inner["data8"], inner["scale"])  # type: ignore[return-value]


class Opaque(RowScaled):
    """The same, with nothing that says where its values are."""
