"""Names under which objects are stored: the common state, sharded objects, descriptions of wrapper tensors.

Part of the format (`docs/format.md`). Called by `mapping`, `planning` and `reading`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

COMMON_KEY = "common_state"
_WRAPPER = "/wrapper"
_UNIQUE = re.compile(r"(?P<key>.+)/shard_(?P<offset>[0-9.]*)_(?P<shape>[0-9.]*)", re.DOTALL | re.ASCII)
_NUMBERS = re.compile(r"(0|[1-9][0-9]{0,18})(\.(0|[1-9][0-9]{0,18}))*", re.ASCII)


@dataclass(frozen=True, slots=True)
class ObjectPosition:
    """One object of a grid of objects: the key of all of them, the shape of the grid, and where in it this one is."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    @property
    def unique_key(self) -> str:
        """`{key}/shard_{offset}_{shape}`, numbers joined by dots: the name under which the object is stored."""
        return f"{self.key}/shard_{'.'.join(map(str, self.offset))}_{'.'.join(map(str, self.shape))}"


def position_of(unique_key: str) -> ObjectPosition | None:
    """Inverse of `ObjectPosition.unique_key`; None for other names."""
    match = _UNIQUE.fullmatch(unique_key)
    if match is None:
        return None
    numbers = []
    for name in ("offset", "shape"):
        text = match[name]
        if text and not _NUMBERS.fullmatch(text):
            return None
        numbers.append(tuple(map(int, text.split("."))) if text else ())
    offset, shape = numbers
    if len(offset) != len(shape) or not all(place < count for place, count in zip(offset, shape, strict=True)):
        return None
    return ObjectPosition(match["key"], shape, offset)


def wrapper_key(tensor_key: str) -> str:
    """Name of the object that describes a wrapper tensor whose parts are stored as tensors."""
    return tensor_key + _WRAPPER


def wrapped_tensor(object_key: str) -> str | None:
    """Inverse of `wrapper_key`; None for other names."""
    return object_key.removesuffix(_WRAPPER) if object_key.endswith(_WRAPPER) else None
