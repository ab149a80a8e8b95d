"""Whether two values are the same in every way that a checkpoint must keep: type, order, every bit."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import io
import struct
import types
from argparse import Namespace
from typing import Any

import numpy as np
import torch


def same(a: Any, b: Any) -> bool:
    """Equal, of equal types throughout, floats to the bit, containers in the same order."""
    return type(a) is type(b) and _traits(a) == _traits(b)


def _traits(value: Any) -> Any:
    """A comparable form of a value, in which everything counts."""
    return (type(value), _content(value))


def _content(value: Any) -> Any:
    if (
        value is None
        or isinstance(value, bool | str | bytes | type)
        or (isinstance(value, int) and not isinstance(value, enum.Enum))
    ):
        return value
    if isinstance(value, enum.Enum):
        return id(value)
    if isinstance(value, float):
        return struct.pack("d", value)
    if isinstance(value, complex):
        return struct.pack("dd", value.real, value.imag)
    if isinstance(value, dict):
        return [(_traits(key), _traits(item)) for key, item in value.items()]
    if isinstance(value, collections.deque):
        return (value.maxlen, [_traits(item) for item in value])
    if isinstance(value, set | frozenset):
        return sorted(repr(_traits(item)) for item in value)
    if isinstance(value, list | tuple):
        return [_traits(item) for item in value]
    return _content_of_special(value)


def _content_of_special(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, torch.Tensor):
        plain = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return (value.dtype, value.shape, plain.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    if isinstance(value, torch.Generator):
        return (value.device.type, value.get_state().numpy().tobytes())
    if isinstance(value, np.random.Generator):
        return (_traits(value.bit_generator.state), _traits(value.bit_generator.seed_seq.state))
    if isinstance(value, np.random.RandomState):
        return _traits(value.get_state(legacy=False))
    return _content_of_object(value)


def _content_of_object(value: Any) -> Any:
    if isinstance(value, io.BytesIO):
        return (value.getvalue(), value.tell())
    if isinstance(value, decimal.Decimal):
        return value.as_tuple()
    if isinstance(value, dt.datetime | dt.time):
        return (value.isoformat(), value.fold, value.tzname())
    if isinstance(value, Namespace | types.SimpleNamespace):
        return _traits(vars(value))
    if isinstance(value, slice):
        return [_traits(part) for part in (value.start, value.stop, value.step)]
    if dataclasses.is_dataclass(value):
        return [(field.name, _traits(getattr(value, field.name))) for field in dataclasses.fields(value)]
    return bytes(value) if isinstance(value, bytearray) else value
