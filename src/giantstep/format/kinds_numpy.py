"""The kinds of the object codec for NumPy's arrays and scalars of numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import UnsupportedTypeError
from giantstep.format.codec import Kind, Reader, Writer
from giantstep.format.object_text import Json
from giantstep.format.payload import items_of, plain_ints, shape_of, text_of
from giantstep.shards.paths import Path, dotted

# A closed list: extended precision means different bytes on different machines, and NumPy's own texts say much more.
_SCALARS: tuple[Any, ...] = (
    *(np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
    *(np.float16, np.float32, np.float64, np.complex64, np.complex128),
)
_DTYPES: dict[str, np.dtype[Any]] = {dtype.str: dtype for dtype in (np.dtype(kind).newbyteorder("<") for kind in _SCALARS)}


def _encode_array(value: Any, writer: Writer, path: Path) -> Json:
    dtype = value.dtype.newbyteorder("<")
    if dtype.str not in _DTYPES:
        raise UnsupportedTypeError(
            f"array at {dotted(path)!r} has dtype {value.dtype}: expected bool, integer, float or complex numbers. "
            "Convert it before saving."
        )
    plain = np.ascontiguousarray(value).astype(dtype, copy=False)
    return [dtype.str, plain_ints(value.shape, path), writer.attach(plain.tobytes())]


def _decode_array(payload: Json, reader: Reader) -> NDArray[Any]:
    name, shape, reference = items_of(payload, 3)
    dtype = _DTYPES.get(text_of(name))
    if dtype is None:
        raise ValueError(f"array dtype {name!r:.40}")
    sizes, data = shape_of(shape), reader.attachment(reference)
    if math.prod(sizes) * dtype.itemsize != len(data):
        raise ValueError(f"array of shape {sizes} and dtype {name} in {len(data)} bytes")
    return np.frombuffer(data, dtype=dtype).reshape(sizes).copy()


def _scalar_kind(scalar: Any) -> Kind:
    def decode(payload: Json, reader: Reader) -> Any:
        found = _decode_array(payload, reader)[()]
        if type(found) is not scalar:
            raise ValueError(f"expected one {scalar.__name__}, found {type(found).__name__}")
        return found

    return Kind(f"numpy.{np.dtype(scalar).name}", scalar, _encode_array, decode)


NUMPY_KINDS: tuple[Kind, ...] = (
    Kind("ndarray", np.ndarray, _encode_array, _decode_array),
    *map(_scalar_kind, _SCALARS),
)
