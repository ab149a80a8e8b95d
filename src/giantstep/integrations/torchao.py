"""torchao's quantised tensors: saved as their parts, resharded between scale blocks, dequantised on load if asked.

Saving them and loading into tensors of the same kind works without this module; `register_torchao` adds dequantising.
Needs the extra `giantstep[torchao]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torchao.quantization import Float8Tensor, Int8Tensor

from giantstep.mapping.wrappers import register_wrapper

_INT8_PARTS = ("qdata", "scale", "zero_point", "act_quant_scale", "act_quant_zero_point", "act_pre_scale")
_FLOAT8_PARTS = ("qdata", "scale")


def register_torchao() -> None:
    """Register torchao's `Int8Tensor` and `Float8Tensor`, before saving and before loading with `dequantise=True`.

    Calling it again does nothing.
    """
    register_wrapper(Int8Tensor, name="torchao.Int8Tensor", take_apart=_take_int8, put_together=_put_int8)
    register_wrapper(Float8Tensor, name="torchao.Float8Tensor", take_apart=_take_float8, put_together=_put_float8)


def _taken(tensor: Any, names: tuple[str, ...]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    parts = {name: getattr(tensor, name, None) for name in names}
    kept = {name: _following(part, tensor.dim()) for name, part in parts.items() if part is not None}
    return kept, {"dtype": tensor.dtype}


def _following(part: torch.Tensor, dims: int) -> torch.Tensor:
    """The part with the tensor's number of dimensions, where it has but one element and fewer."""
    return part.view((1,) * dims) if part.numel() == 1 and part.dim() < dims else part


def _block_size(parts: Mapping[str, torch.Tensor]) -> list[int]:
    """Elements per scale along each axis, whatever cut of the tensor the parts are."""
    return [whole // max(1, count) for whole, count in zip(parts["qdata"].shape, parts["scale"].shape, strict=True)]


def _take_int8(tensor: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return _taken(tensor, _INT8_PARTS)


def _put_int8(parts: Mapping[str, torch.Tensor], attributes: dict[str, Any]) -> torch.Tensor:
    optional = {name: parts[name] for name in _INT8_PARTS[2:] if name in parts}
    result: torch.Tensor = Int8Tensor(parts["qdata"], parts["scale"], _block_size(parts), attributes["dtype"], **optional)
    return result


def _take_float8(tensor: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return _taken(tensor, _FLOAT8_PARTS)


def _put_float8(parts: Mapping[str, torch.Tensor], attributes: dict[str, Any]) -> torch.Tensor:
    result: torch.Tensor = Float8Tensor(
        parts["qdata"], parts["scale"], block_size=_block_size(parts), dtype=attributes["dtype"]
    )
    return result
