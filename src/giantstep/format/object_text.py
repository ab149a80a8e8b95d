"""The JSON text inside an encoded object, read as strictly as it is written. Called by the object codec alone.

Whatever two readers could understand differently is refused: fields that appear twice, numbers that overflow, literals
that JSON does not have. Not here: what the values mean.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, TypeAlias

Json: TypeAlias = Any

# Integers beyond it are not exact in every JSON reader; they have a kind of their own.
SAFE_INT = 1 << 53
_INT_DIGITS = len(str(-SAFE_INT))
# Python writes a float with at most 24 characters.
_FLOAT_DIGITS = 40
# Two code points to Python, but JSON's escapes of the one character that they stand for in UTF-16 are the same.
_PAIR = re.compile(r"[\ud800-\udbff][\udc00-\udfff]")


def _tagged(fields: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(fields)
    if len(fields) != 2 or found.keys() != {"$", "v"}:
        names = [name[:20] for name, _ in fields[:5]]
        raise ValueError(f"expected an object with the fields '$' and 'v', found {len(fields)} fields {names}")
    return found


def _int(digits: str) -> int:
    # Measured before it is read: reading many digits takes long.
    if len(digits) > _INT_DIGITS or abs(int(digits)) > SAFE_INT:
        raise ValueError(f"integer {digits[:20]}... is beyond 2^53")
    return int(digits)


def _float(digits: str) -> float:
    if len(digits) > _FLOAT_DIGITS or not math.isfinite(float(digits)):
        raise ValueError(f"number {digits[:20]}... is no float")
    return float(digits)


def _literal(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_tagged, parse_int=_int, parse_float=_float, parse_constant=_literal)


def is_plain(text: str) -> bool:
    """Whether a JSON string gives the text back."""
    return text.isascii() or _PAIR.search(text) is None


def parse_text(text: memoryview) -> Json:
    """The JSON value of ASCII bytes; every object in it has exactly the fields `$` and `v`.

    Raises:
        ValueError, RecursionError: it is none.
    """
    return _DECODER.decode(str(text, "ascii"))


def write_text(value: Json) -> bytes:
    """The JSON value as ASCII bytes, without spaces."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False, check_circular=False).encode("ascii")
