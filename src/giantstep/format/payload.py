"""Checks of payloads: what the kinds of the object codec expect, or a ValueError that says what was found instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from giantstep.errors import UnsupportedTypeError
from giantstep.format.object_text import SAFE_INT, Json, is_plain
from giantstep.shards.paths import Path, dotted

# As many as a stored tensor may have; NumPy has no more either.
MAX_DIMS = 64


def text_of(payload: Json) -> str:
    """The payload, a string."""
    if not isinstance(payload, str):
        raise TypeError(f"expected a string, found {type(payload).__name__}")
    return payload


def items_of(payload: Json, count: int | None = None) -> list[Any]:
    """The payload, a list; of `count` items if a count is given."""
    if not isinstance(payload, list):
        raise TypeError(f"expected a list, found {type(payload).__name__}")
    if count is not None and len(payload) != count:
        raise ValueError(f"expected {count} items, found {len(payload)}")
    return payload


def int_of(payload: Any, low: int, high: int) -> int:
    """The payload, an int (no bool) from `low` to `high`."""
    if type(payload) is not int or not low <= payload <= high:
        raise ValueError(f"expected an integer from {low} to {high}, found {payload!r:.40}")
    return payload


def shape_of(payload: Json) -> list[int]:
    """The payload, a shape."""
    if len(items_of(payload)) > MAX_DIMS:
        raise ValueError(f"expected at most {MAX_DIMS} dimensions, found {len(payload)}")
    return [int_of(size, 0, SAFE_INT) for size in payload]


def same_text(written: str, payload: str) -> None:
    """Refuse a text that its value would not be written as, so that a value has one text only."""
    if written != payload:
        raise ValueError(f"expected {written!r:.60}, found {payload!r:.60}")


def plain_text(text: str, path: Path) -> str:
    """A text as a payload. Raises `UnsupportedTypeError` where JSON could not hold it exactly."""
    if not is_plain(text):
        raise UnsupportedTypeError(
            f"object at {dotted(path)!r} has a text with a pair of surrogates in it: expected valid Unicode. Save another text."
        )
    return text


def plain_ints(values: Iterable[int], path: Path) -> list[int]:
    """Sizes as a payload. Raises `UnsupportedTypeError` where JSON could not hold one exactly."""
    found: Sequence[int] = [int(value) for value in values]
    if any(abs(value) > SAFE_INT for value in found):
        raise UnsupportedTypeError(
            f"object at {dotted(path)!r} has the shape {tuple(found)}: expected sizes of at most 2^53. "
            "Save it in another shape."
        )
    return list(found)
