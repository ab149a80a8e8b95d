"""How torch's own small values are stored in objects: dtype, device, Size, and tensors inside objects."""

from __future__ import annotations

import math

import torch

from giantstep.errors import UnsupportedTypeError
from giantstep.format.codec import Json, Kind, Reader, Writer
from giantstep.shards.dtypes import BY_TORCH_NAME, dtype_of_torch_name
from giantstep.shards.paths import Path, dotted
from giantstep.words import bytes_of, words_of


def _encode_tensor(value: torch.Tensor, writer: Writer, path: Path) -> Json:
    if value.layout != torch.strided:
        raise UnsupportedTypeError(f"tensor at {dotted(path)!r} has layout {value.layout}: expected a dense tensor")
    dtype = dtype_of_torch_name(str(value.dtype))
    plain = words_of(value.detach().resolve_conj().resolve_neg()).cpu().contiguous()
    data = bytes_of(plain).tobytes() if plain.numel() else b""
    return [dtype.torch_name, list(value.shape), writer.attach(data)]


def _decode_tensor(payload: Json, reader: Reader) -> torch.Tensor:
    name, shape, reference = payload
    dtype = BY_TORCH_NAME[name]
    if not all(type(part) is int and part >= 0 for part in shape):
        raise ValueError(f"tensor shape {shape!r}")
    data = bytearray(reader.attachment(reference))
    if math.prod(shape) * dtype.item_bytes != len(data):
        raise ValueError(f"tensor of shape {shape} in {len(data)} bytes")
    kind = getattr(torch, dtype.torch_name)
    if not data:
        return torch.empty(shape, dtype=kind, device="cpu")
    return torch.frombuffer(data, dtype=torch.uint8).view(kind).reshape(shape)


def _decode_dtype(payload: Json, _reader: Reader) -> torch.dtype:
    found: torch.dtype = getattr(torch, BY_TORCH_NAME[payload].torch_name)
    return found


def _size(payload: Json) -> torch.Size:
    if not all(type(part) is int for part in payload):
        raise ValueError(f"size {payload!r}")
    return torch.Size(payload)


def torch_kinds() -> list[Kind]:
    """Kinds of values that torch defines."""
    return [
        Kind("torch.dtype", torch.dtype, lambda v, w, p: dtype_of_torch_name(str(v)).torch_name, _decode_dtype),
        Kind("torch.device", torch.device, lambda v, w, p: str(v), lambda j, r: torch.device(j)),
        Kind("torch.Size", torch.Size, lambda v, w, p: list(v), lambda j, r: _size(j)),
        Kind("torch.Tensor", torch.Tensor, _encode_tensor, _decode_tensor),
    ]
