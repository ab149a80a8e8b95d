r"""The object codec: Python values as bytes, closed and typed, so that decoding never runs anything stored.

An encoded object is `GSOBJ1\n`, the length of a JSON text (8 bytes, little endian), the JSON text, and binary
attachments that it refers to by offset. None, booleans, integers, finite floats, strings and lists are plain
JSON; every other value is `{"$": tag, "v": payload}` with a tag from the table below or one that the caller's
`Codec` was given. Not here: torch types (`mapping.torch_kinds`).
"""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import json
import math
import pathlib
import struct
import threading
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from giantstep.errors import BadArgumentError, CorruptionError, UnsupportedTypeError
from giantstep.shards.paths import Path, dotted

MAGIC = b"GSOBJ1\n"
MAX_DEPTH = 200
_PREFIX_BYTES = len(MAGIC) + 8
_SAFE_INT = 1 << 53

Json: TypeAlias = Any
Encode: TypeAlias = Callable[[Any, "Writer", Path], Json]
Decode: TypeAlias = Callable[[Json, "Reader"], Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """How values of exactly one type are stored.

    Attributes:
        tag: name on disk.
        type: values of exactly this type are encoded.
        encode: (value, writer, path) -> JSON payload; children go through `writer.value`.
        decode: (payload, reader) -> value; raises anything but MemoryError on a malformed payload.
    """

    tag: str
    type: type
    encode: Encode
    decode: Decode


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where a tensor stood in a list or tuple of the common state; `key` says which."""

    key: str


class Writer:
    """Collects attachments while values become JSON."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._depth = 0
        self.attachments: list[bytes] = []
        self._attached_bytes = 0

    def value(self, value: Any, path: Path) -> Json:
        """The value as JSON; raises `UnsupportedTypeError` naming `path`."""
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int and -_SAFE_INT <= value <= _SAFE_INT:
            return value
        if kind is float and math.isfinite(value):
            return value
        if self._depth >= MAX_DEPTH:
            raise BadArgumentError(
                f"object at {dotted(path)!r} is nested more than {MAX_DEPTH} levels deep (or contains itself)"
            )
        self._depth += 1
        try:
            if kind is list:
                return [self.value(item, (*path, position)) for position, item in enumerate(value)]
            found = self._codec.for_type(kind, path)
            return {"$": found.tag, "v": found.encode(value, self, path)}
        finally:
            self._depth -= 1

    def encode_alone(self, value: Any, path: Path) -> bytes:
        """The value as an encoded object of its own."""
        return self._codec.encode(value, path)

    def attach(self, data: bytes) -> list[int]:
        """Reference to bytes stored behind the JSON text."""
        reference = [self._attached_bytes, len(data)]
        self.attachments.append(data)
        self._attached_bytes += len(data)
        return reference


class Reader:
    """Turns JSON back into values, taking attachments from the bytes behind the text."""

    def __init__(self, codec: Codec, attachments: memoryview) -> None:
        self._codec = codec
        self._attachments = attachments
        self._taken = 0
        self._depth = 0

    def value(self, json_value: Json) -> Any:
        """Inverse of `Writer.value`."""
        if not isinstance(json_value, list | dict):
            return json_value
        if self._depth >= MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        self._depth += 1
        try:
            if isinstance(json_value, list):
                return [self.value(item) for item in json_value]
            if set(json_value) != {"$", "v"}:
                raise ValueError(f"expected the fields '$' and 'v', found {sorted(json_value)[:5]}")
            return self._codec.for_tag(json_value["$"]).decode(json_value["v"], self)
        finally:
            self._depth -= 1

    def attachment(self, reference: Json) -> bytes:
        """The bytes that `Writer.attach` stored."""
        start, size = reference
        self._taken += size
        # Each attachment is referred to once, so a small object cannot claim to hold much.
        if self._taken > len(self._attachments):
            raise ValueError("attachments are referred to more than once")
        if not (type(start) is int and type(size) is int and start >= 0 and 0 <= size <= len(self._attachments) - start):
            raise ValueError(f"attachment {reference} lies outside the {len(self._attachments)} bytes attached")
        return bytes(self._attachments[start : start + size])


class Codec:
    """A closed set of kinds.

    Args:
        kinds: what it knows.
        more: gives further kinds, called once and only when something else is met; so that kinds whose
            import is expensive cost nothing where they do not occur.
    """

    def __init__(self, kinds: Iterable[Kind], more: Callable[[], Iterable[Kind]] | None = None) -> None:
        self._by_type: dict[type, Kind] = {}
        self._by_tag: dict[str, Kind] = {}
        self._more = more
        self._lock = threading.Lock()
        self._add(kinds)

    def _add(self, kinds: Iterable[Kind]) -> None:
        for kind in kinds:
            if kind.type in self._by_type or kind.tag in self._by_tag:
                raise BadArgumentError(f"type {kind.type.__qualname__} or tag {kind.tag!r} is registered twice")
            self._by_type[kind.type] = kind
            self._by_tag[kind.tag] = kind

    def _add_more(self) -> None:
        # Whoever comes while the kinds are being fetched waits for them, and then finds them.
        with self._lock:
            more, self._more = self._more, None
            if more is not None:
                self._add(more())

    def for_type(self, kind: type, path: Path) -> Kind:
        """The kind that stores values of this type; `UnsupportedTypeError` if there is none."""
        found = self._by_type.get(kind)
        if found is None:
            self._add_more()
            found = self._by_type.get(kind)
        if found is None:
            raise UnsupportedTypeError(
                f"object at {dotted(path)!r} has type {kind.__module__}.{kind.__qualname__}, which cannot be stored "
                "without running code on load. Convert it to plain values (numbers, strings, lists, dicts, arrays, "
                "tensors) before saving and back after loading, or give it state_dict()/load_state_dict()."
            )
        return found

    def for_tag(self, tag: Json) -> Kind:
        """The kind of a stored tag; ValueError if it is unknown."""
        found = self._by_tag.get(tag) if isinstance(tag, str) else None
        if found is None and isinstance(tag, str):
            self._add_more()
            found = self._by_tag.get(tag)
        if found is None:
            raise ValueError(f"unknown type tag {tag!r:.100}")
        return found

    def encode(self, value: Any, path: Path = ()) -> bytes:
        """The value as bytes.

        Raises:
            UnsupportedTypeError: a value inside has no kind; names its path and the remedy.
        """
        writer = Writer(self)
        text = json.dumps(writer.value(value, path), separators=(",", ":"), allow_nan=False).encode("ascii")
        return b"".join((MAGIC, struct.pack("<Q", len(text)), text, *writer.attachments))

    def decode(self, data: bytes | memoryview, what: str) -> Any:
        """Inverse of `encode`; `what` names the object in errors.

        Raises:
            CorruptionError: the bytes are not what `encode` writes, or use a tag this codec does not know.
        """
        view = memoryview(data)
        text_bytes = struct.unpack("<Q", view[len(MAGIC) : _PREFIX_BYTES])[0] if len(view) >= _PREFIX_BYTES else -1
        if view[: len(MAGIC)] != MAGIC or not 0 <= text_bytes <= len(view) - _PREFIX_BYTES:
            raise CorruptionError(f"object {what} does not begin like an encoded object")
        text, attachments = view[_PREFIX_BYTES : _PREFIX_BYTES + text_bytes], view[_PREFIX_BYTES + text_bytes :]
        try:
            return Reader(self, attachments).value(json.loads(bytes(text)))
        except MemoryError:
            raise
        except Exception as error:
            # Whatever a constructor says to a hostile value.
            raise CorruptionError(f"object {what} cannot be decoded: {error}") from error


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
