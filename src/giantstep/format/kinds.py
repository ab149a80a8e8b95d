"""The kinds of the object codec that need nothing but Python and NumPy: one row of a table each.

The tags and payloads are part of the format (`docs/format.md`).
"""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import math
import pathlib
import struct
import types
from collections.abc import Iterable
from typing import Any

import numpy as np

from giantstep.errors import UnsupportedTypeError
from giantstep.format.codec import Codec, Json, Kind, Reader, TensorSlot, Writer
from giantstep.shards.paths import Path, dotted


def _items(value: Iterable[Any], writer: Writer, path: Path) -> Json:
    return [writer.value(item, (*path, position)) for position, item in enumerate(value)]


def _pairs(value: dict[Any, Any], writer: Writer, path: Path) -> Json:
    return [[writer.value(key, (*path, "<key>")), writer.value(item, (*path, key))] for key, item in value.items()]


def _unordered(value: Iterable[Any], writer: Writer, path: Path) -> Json:
    # In the order of their own encodings, so that equal sets give equal bytes in every process.
    ordered = sorted((writer.encode_alone(item, (*path, "<item>")), n) for n, item in enumerate(value))
    items = list(value)
    return [writer.value(items[n], (*path, "<item>")) for _, n in ordered]


def _read_items(payload: Json, reader: Reader) -> list[Any]:
    if not isinstance(payload, list):
        raise TypeError("expected a list")
    return [reader.value(item) for item in payload]


def _read_pairs(payload: Json, reader: Reader) -> list[tuple[Any, Any]]:
    pairs = [(reader.value(key), reader.value(item)) for key, item in payload]
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key appears twice")
    return pairs


def _read_str(payload: Json) -> str:
    if not isinstance(payload, str):
        raise TypeError("expected a string")
    return payload


def _namespace(kind: type, payload: Json, reader: Reader) -> Any:
    result = kind()
    for name, item in _read_pairs(payload, reader):
        vars(result)[_read_str(name)] = item
    return result


_ARRAY_KINDS = "biufc"


def _encode_array(value: Any, writer: Writer, path: Path) -> Json:
    # Extended precision means different bytes on different machines.
    if value.dtype.kind not in _ARRAY_KINDS or value.dtype.itemsize > (16 if value.dtype.kind == "c" else 8):
        raise UnsupportedTypeError(
            f"array at {dotted(path)!r} has dtype {value.dtype}: expected bool, integer, float or complex numbers. "
            "Convert it before saving."
        )
    plain = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False)
    return [plain.dtype.str, list(value.shape), writer.attach(plain.tobytes())]


def _decode_array(payload: Json, reader: Reader) -> Any:
    name, shape, reference = payload
    dtype = np.dtype(_read_str(name))
    if dtype.kind not in _ARRAY_KINDS or dtype.fields is not None or dtype.subdtype is not None:
        raise ValueError(f"array dtype {name!r}")
    if not all(type(part) is int and part >= 0 for part in shape):
        raise ValueError(f"array shape {shape!r}")
    data = np.frombuffer(reader.attachment(reference), dtype=dtype)
    if math.prod(shape) != data.size:
        raise ValueError(f"array of shape {shape} has {data.size} values")
    return data.reshape(shape).copy()


def _encode_float(value: float, _writer: Writer, _path: Path) -> Json:
    return struct.pack(">d", value).hex()


def _decode_float(payload: Json, _reader: Reader) -> float:
    result: float = struct.unpack(">d", bytes.fromhex(_read_str(payload)))[0]
    return result


def _encode_datetime(value: dt.datetime, _writer: Writer, path: Path) -> Json:
    if value.tzinfo is not None and type(value.tzinfo) is not dt.timezone:
        raise UnsupportedTypeError(
            f"datetime at {dotted(path)!r} is in time zone {value.tzinfo}, whose rules cannot be stored. "
            "Convert it with astimezone(datetime.UTC) before saving."
        )
    return [value.isoformat(), value.fold]


def _encode_slot(value: TensorSlot, _writer: Writer, _path: Path) -> Json:
    return value.key


BASE_KINDS: tuple[Kind, ...] = (
    Kind("int", int, lambda v, w, p: hex(v), lambda j, r: int(_read_str(j), 16)),
    Kind("float", float, _encode_float, _decode_float),
    Kind(
        "complex",
        complex,
        lambda v, w, p: [_encode_float(v.real, w, p), _encode_float(v.imag, w, p)],
        lambda j, r: complex(_decode_float(j[0], r), _decode_float(j[1], r)),
    ),
    Kind("bytes", bytes, lambda v, w, p: w.attach(v), lambda j, r: r.attachment(j)),
    Kind("bytearray", bytearray, lambda v, w, p: w.attach(bytes(v)), lambda j, r: bytearray(r.attachment(j))),
    Kind("tuple", tuple, _items, lambda j, r: tuple(_read_items(j, r))),
    Kind("set", set, _unordered, lambda j, r: set(_read_items(j, r))),
    Kind("frozenset", frozenset, _unordered, lambda j, r: frozenset(_read_items(j, r))),
    Kind("dict", dict, _pairs, lambda j, r: dict(_read_pairs(j, r))),
    Kind("ordered_dict", collections.OrderedDict, _pairs, lambda j, r: collections.OrderedDict(_read_pairs(j, r))),
    Kind(
        "argparse.Namespace",
        argparse.Namespace,
        lambda v, w, p: _pairs(dict(vars(v)), w, p),
        lambda j, r: _namespace(argparse.Namespace, j, r),
    ),
    Kind(
        "types.SimpleNamespace",
        types.SimpleNamespace,
        lambda v, w, p: _pairs(dict(vars(v)), w, p),
        lambda j, r: _namespace(types.SimpleNamespace, j, r),
    ),
    Kind(
        "path",
        type(pathlib.Path()),
        lambda v, w, p: str(v),
        lambda j, r: pathlib.Path(_read_str(j)),
    ),
    Kind("pure_path", pathlib.PurePosixPath, lambda v, w, p: str(v), lambda j, r: pathlib.PurePosixPath(_read_str(j))),
    Kind(
        "datetime",
        dt.datetime,
        _encode_datetime,
        lambda j, r: dt.datetime.fromisoformat(_read_str(j[0])).replace(fold=j[1]),
    ),
    Kind("date", dt.date, lambda v, w, p: v.isoformat(), lambda j, r: dt.date.fromisoformat(_read_str(j))),
    Kind(
        "timedelta",
        dt.timedelta,
        lambda v, w, p: [v.days, v.seconds, v.microseconds],
        lambda j, r: dt.timedelta(j[0], j[1], j[2]),
    ),
    Kind(
        "range",
        range,
        lambda v, w, p: [hex(n) for n in (v.start, v.stop, v.step)],
        lambda j, r: range(*(int(_read_str(n), 16) for n in j)),
    ),
    Kind("slice", slice, lambda v, w, p: _items((v.start, v.stop, v.step), w, p), lambda j, r: slice(*_read_items(j, r))),
    Kind("ndarray", np.ndarray, _encode_array, _decode_array),
    *(
        Kind(f"numpy.{np.dtype(scalar).name}", scalar, _encode_array, lambda j, r: _decode_array(j, r)[()])
        for scalar in (
            *(np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
            *(np.float16, np.float32, np.float64, np.complex64, np.complex128),
        )
    ),
    Kind("tensor_slot", TensorSlot, _encode_slot, lambda j, r: TensorSlot(_read_str(j))),
)

BASE_CODEC = Codec(BASE_KINDS)
