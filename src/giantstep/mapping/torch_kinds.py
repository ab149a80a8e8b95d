"""How torch's own small values are stored in objects: dtype, device, Size, Generator, and tensors inside objects.

Called by `giantstep.codecs` once something of torch's is met.
"""

from __future__ import annotations

import math
import re
import struct
from typing import Any

import torch

from giantstep.errors import BadArgumentError, UnsupportedTypeError
from giantstep.format.codec import Kind, Reader, Unregistered, Writer
from giantstep.format.object_text import Json
from giantstep.format.payload import int_of, items_of, plain_ints, same_text, shape_of, text_of
from giantstep.shards.dtypes import BY_TORCH_NAME, dtype_of_torch_name
from giantstep.shards.paths import Path, dotted
from giantstep.words import bytes_of, words_of

# Of the state of a CPU generator (ATen's legacy layout): its size; seed, left, seeded, next at its beginning; then the table,
# of which each word has 8 bytes.
_CPU_STATE_BYTES = 5056
CPU_STATE = struct.Struct("<QiiQ")
CPU_WORDS = 624


def _dtype_name(dtype: torch.dtype, path: Path) -> str:
    try:
        return dtype_of_torch_name(str(dtype)).torch_name
    except BadArgumentError as error:
        raise UnsupportedTypeError(f"object at {dotted(path)!r}: {error.message}") from error


def _dtype_of(name: Json, reader: Reader) -> torch.dtype:
    if text_of(name) not in BY_TORCH_NAME:
        raise ValueError(f"torch dtype {name!r:.40}")
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise reader.unusable(f"torch.{name}", f"torch {torch.__version__} does not have it. Use a newer torch")
    return found


def _encode_tensor(value: torch.Tensor, writer: Writer, path: Path) -> Json:
    if value.layout != torch.strided or value.device.type == "meta":
        raise UnsupportedTypeError(
            f"tensor at {dotted(path)!r} has layout {value.layout} on {value.device}: expected a dense tensor with values"
        )
    name = _dtype_name(value.dtype, path)
    plain = words_of(value.detach().resolve_conj().resolve_neg()).cpu().contiguous()
    data = bytes_of(plain).tobytes() if plain.numel() else b""
    return [name, plain_ints(value.shape, path), writer.attach(data)]


def _decode_tensor(payload: Json, reader: Reader) -> torch.Tensor:
    name, shape, reference = items_of(payload, 3)
    dtype, sizes = _dtype_of(name, reader), shape_of(shape)
    data = bytearray(reader.attachment(reference))
    if math.prod(sizes) * BY_TORCH_NAME[name].item_bytes != len(data):
        raise ValueError(f"tensor of shape {sizes} and dtype {name} in {len(data)} bytes")
    if not data:
        return torch.empty(sizes, dtype=dtype, device="cpu")
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(sizes)


def _decode_device(payload: Json, _reader: Reader) -> torch.device:
    found = torch.device(text_of(payload))
    same_text(str(found), payload)
    return found


def _encode_generator(value: torch.Generator, writer: Writer, path: Path) -> Json:
    return [value.device.type, writer.value(value.get_state(), path)]


def _decode_generator(payload: Json, reader: Reader) -> Any:
    device, stored = items_of(payload, 2)
    state = reader.value(stored)
    if type(state) is not torch.Tensor or state.dtype != torch.uint8 or state.dim() != 1:
        raise ValueError("expected the state of a generator: a tensor of bytes")
    if not re.fullmatch("[a-z0-9_]{1,40}", text_of(device)):
        raise ValueError(f"device type {device!r:.40}")
    try:
        found = torch.Generator(device)
    except (RuntimeError, AssertionError):
        # What torch raises where it was built without the device, or there is none.
        remedy = f"Load it on a machine with devices of the type {device!r}."
        return reader.unregistered(Unregistered("torch.Generator", [device, state]), remedy)
    if device == "cpu":
        check_cpu_state(state)
    found.set_state(state)
    return found


def check_cpu_state(state: torch.Tensor) -> None:
    """Refuse a state with which torch would read past the end of its table; torch takes some of these."""
    data = state.numpy().tobytes()
    if len(data) != _CPU_STATE_BYTES:
        raise ValueError(f"expected {_CPU_STATE_BYTES} bytes of state, found {len(data)}")
    _, left, seeded, following = CPU_STATE.unpack_from(data)
    fresh = (left, following) == (1, 0)
    if seeded != 1 or not (fresh or (1 <= left <= CPU_WORDS and left + following == CPU_WORDS + 1)):
        raise ValueError(f"state of a generator with {left} words left after {following}")


def torch_kinds() -> list[Kind]:
    """Kinds of values that torch defines."""
    sizes = {"low": -(2**53), "high": 2**53}
    return [
        Kind("torch.dtype", torch.dtype, lambda v, w, p: _dtype_name(v, p), _dtype_of),
        Kind("torch.device", torch.device, lambda v, w, p: str(v), _decode_device),
        Kind(
            "torch.Size",
            torch.Size,
            lambda v, w, p: plain_ints(v, p),
            lambda j, r: torch.Size([int_of(size, **sizes) for size in items_of(j)]),
        ),
        Kind("torch.Tensor", torch.Tensor, _encode_tensor, _decode_tensor),
        Kind("torch.Generator", torch.Generator, _encode_generator, _decode_generator),
    ]
