"""Columns of numbers and texts as bytes, narrow and without a header: what ranks tell each other in plans.

Called by the descriptions, reports and parts of plans that travel between ranks of one call. What is stored has a
format of its own (`format`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import PeerFailureError
from giantstep.format.index import decode_texts, encode_texts
from giantstep.shards.region import Int64s

# The first byte of a column says which of these its numbers are.
_KINDS = tuple(np.dtype(name) for name in ("<u1", "<u2", "<u4", "<i8", "<u8"))
_SIGNED, _WIDEST = 3, 4
_HEADS = tuple(bytes([kind]) for kind in range(len(_KINDS)))


def pack_column(values: NDArray[Any]) -> bytes:
    """Integers, in row-major order, in the fewest bytes each that hold all of them."""
    if not values.size:
        return _HEADS[0]
    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    low, high = int(values.min()), int(values.max())
    fitting = (kind for kind in range(_SIGNED) if high < 1 << 8 * _KINDS[kind].itemsize)
    kind = _SIGNED if low < 0 else next(fitting, _WIDEST)
    return _HEADS[kind] + values.astype(_KINDS[kind]).tobytes()


def unpack_column(data: bytes, dtype: type[np.generic] = np.int64, width: int = 1) -> NDArray[Any]:
    """Inverse of `pack_column`, as a table of `width` columns if that is more than 1."""
    if not data or data[0] >= len(_KINDS) or (len(data) - 1) % _KINDS[data[0]].itemsize:
        raise PeerFailureError(f"a rank sent a column of {len(data)} bytes that cannot be read")
    values = np.frombuffer(data, _KINDS[data[0]], offset=1).astype(dtype)
    if len(values) % width:
        raise PeerFailureError(f"a rank sent a column of {len(values)} numbers, expected rows of {width}")
    return values.reshape(-1, width) if width > 1 else values


def pack_texts(texts: Sequence[str]) -> tuple[bytes, bytes]:
    """Texts as two parts: where each ends, and all of them one after another."""
    ends, data = encode_texts([text.encode("utf-8") for text in texts])
    return pack_column(ends), data.tobytes()


def unpack_texts(ends: bytes, data: bytes) -> list[str]:
    """Inverse of `pack_texts`."""
    found: Int64s = unpack_column(ends)
    fits = len(found) and found[0] == 0 and found[-1] == len(data) and bool((np.diff(found) >= 0).all())
    try:
        if fits:
            return decode_texts(found, np.frombuffer(data, dtype=np.uint8))
    except UnicodeDecodeError as error:
        raise PeerFailureError(f"a rank sent texts that cannot be read: {error}") from error
    raise PeerFailureError(f"a rank sent {len(data)} bytes of texts whose ends do not fit them")
