"""The kinds of the object codec that need nothing but Python and NumPy: one row of a table each.

Here: numbers, bytes, containers, and the list of all. The tags and payloads are part of the format (`docs/format.md`).
Called by `giantstep.codecs`.
"""

from __future__ import annotations

import argparse
import collections
import io
import struct
import sys
import types
from collections.abc import Collection, Iterable
from typing import Any

from giantstep.errors import UnsupportedTypeError
from giantstep.format.codec import Codec, Kind, Reader, TensorSlot, Writer
from giantstep.format.kinds_numpy import NUMPY_KINDS
from giantstep.format.kinds_text import TEXT_KINDS
from giantstep.format.kinds_user import user_kinds
from giantstep.format.object_text import Json, is_plain
from giantstep.format.payload import int_of, items_of, plain_text, same_text, text_of
from giantstep.format.registry import TypeRegistry
from giantstep.shards.paths import Path, dotted

# Numbers.


def _decode_int(payload: Json, _reader: Reader) -> int:
    found = int(text_of(payload), 16)
    same_text(hex(found), payload)
    return found


def _encode_float(value: float, _writer: Writer, _path: Path) -> Json:
    return struct.pack(">d", value).hex()


def _decode_float(payload: Json, _reader: Reader) -> float:
    data = bytes.fromhex(text_of(payload))
    same_text(data.hex(), payload)
    result: float = struct.unpack(">d", data)[0]
    return result


def _decode_complex(payload: Json, reader: Reader) -> complex:
    real, imaginary = (_decode_float(part, reader) for part in items_of(payload, 2))
    return complex(real, imaginary)


def _decode_range(payload: Json, reader: Reader) -> range:
    start, stop, step = (_decode_int(part, reader) for part in items_of(payload, 3))
    return range(start, stop, step)


# Texts and bytes.


def _decode_text(payload: Json, reader: Reader) -> str:
    found = bytes(reader.attachment(payload)).decode("utf-8", "surrogatepass")
    if is_plain(found):
        raise ValueError("a text that is to be a JSON string")
    return found


def _encode_file(value: io.BytesIO, writer: Writer, path: Path) -> Json:
    if value.closed:
        raise UnsupportedTypeError(f"file in memory at {dotted(path)!r} is closed: save it before it is closed")
    return writer.attach(value.getvalue())


# Containers.


# Keys of one hash that a dict or set may have: with more it takes quadratic time to build, which is how to attack it.
_MOST_ALIKE = 1000


def _check_spread(keys: Collection[Any]) -> None:
    """Raise ValueError if too many keys have the same hash."""
    if len(keys) > _MOST_ALIKE and max(collections.Counter(map(hash, keys)).values()) > _MOST_ALIKE:
        raise ValueError(f"more than {_MOST_ALIKE} keys have the same hash")


def _check_spread_at(path: Path, keys: Collection[Any]) -> None:
    """As `_check_spread`, for what is to be encoded."""
    try:
        _check_spread(keys)
    except ValueError as error:
        raise UnsupportedTypeError(f"object at {dotted(path)!r}: {error}. Store its items as a list.") from error


def _encode_pairs(value: dict[Any, Any], writer: Writer, path: Path) -> Json:
    _check_spread_at(path, value)
    found = []
    for key, item in value.items():
        # A loop: deep values must not need more of Python's stack than they do.
        found.append([writer.value(key, (*path, "<key>")), writer.value(item, (*path, key))])
    return found


def _encode_fields(value: Any, writer: Writer, path: Path) -> Json:
    names = [name for name in vars(value) if not isinstance(name, str)]
    if names:
        raise UnsupportedTypeError(f"object at {dotted(path)!r} has an attribute named {names[0]!r}, expected a str")
    return _encode_pairs(vars(value), writer, path)


def _read_pairs(payload: Json, reader: Reader) -> dict[Any, Any]:
    keys, values = [], []
    for pair in items_of(payload):
        key, item = items_of(pair, 2)
        keys.append(reader.value(key))
        values.append(reader.value(item))
    _check_spread(keys)
    found = dict(zip(keys, values, strict=True))
    if len(found) != len(payload):
        raise ValueError("a key appears twice")
    return found


def _read_set(payload: Json, reader: Reader) -> set[Any]:
    items = reader.items(payload)
    _check_spread(items)
    found = set(items)
    if len(found) != len(payload):
        raise ValueError("an element appears twice")
    return found


def _namespace_kind(tag: str, cls: type[Any]) -> Kind:
    def decode(payload: Json, reader: Reader) -> Any:
        found = cls()
        for name, item in _read_pairs(payload, reader).items():
            vars(found)[text_of(name)] = item
        return found

    return Kind(tag, cls, _encode_fields, decode)


def _encode_deque(value: collections.deque[Any], writer: Writer, path: Path) -> Json:
    return [writer.value(value.maxlen, path), writer.items(value, path)]


def _decode_deque(payload: Json, reader: Reader) -> collections.deque[Any]:
    stored, items = items_of(payload, 2)
    maxlen = reader.value(stored)
    if maxlen is not None and len(items_of(items)) > int_of(maxlen, 0, sys.maxsize):
        raise ValueError("more items than the greatest length")
    return collections.deque(reader.items(items), maxlen)


_NUMBER_KINDS: tuple[Kind, ...] = (
    Kind("int", int, lambda v, w, p: hex(v), _decode_int),
    Kind("float", float, _encode_float, _decode_float),
    Kind("complex", complex, lambda v, w, p: [_encode_float(v.real, w, p), _encode_float(v.imag, w, p)], _decode_complex),
    Kind("range", range, lambda v, w, p: [hex(v.start), hex(v.stop), hex(v.step)], _decode_range),
    Kind("slice", slice, lambda v, w, p: w.items((v.start, v.stop, v.step), p), lambda j, r: slice(*r.items(items_of(j, 3)))),
)

_BYTES_KINDS: tuple[Kind, ...] = (
    Kind("str", str, lambda v, w, p: w.attach(v.encode("utf-8", "surrogatepass")), _decode_text),
    Kind("bytes", bytes, lambda v, w, p: w.attach(v), lambda j, r: bytes(r.attachment(j))),
    Kind("bytearray", bytearray, lambda v, w, p: w.attach(bytes(v)), lambda j, r: bytearray(r.attachment(j))),
    Kind("io.BytesIO", io.BytesIO, _encode_file, lambda j, r: io.BytesIO(bytes(r.attachment(j)))),
)

_CONTAINER_KINDS: tuple[Kind, ...] = (
    Kind("tuple", tuple, lambda v, w, p: w.items(v, p), lambda j, r: tuple(r.items(j))),
    Kind("set", set, lambda v, w, p: w.sorted_items(v, p), _read_set),
    Kind("frozenset", frozenset, lambda v, w, p: w.sorted_items(v, p), lambda j, r: frozenset(_read_set(j, r))),
    Kind("dict", dict, _encode_pairs, _read_pairs),
    Kind("ordered_dict", collections.OrderedDict, _encode_pairs, lambda j, r: collections.OrderedDict(_read_pairs(j, r))),
    Kind("deque", collections.deque, _encode_deque, _decode_deque),
    _namespace_kind("argparse.Namespace", argparse.Namespace),
    _namespace_kind("types.SimpleNamespace", types.SimpleNamespace),
    Kind("tensor_slot", TensorSlot, lambda v, w, p: plain_text(v.key, p), lambda j, r: TensorSlot(text_of(j))),
)


def base_kinds(registry: TypeRegistry) -> tuple[Kind, ...]:
    """All kinds that need nothing but Python and NumPy; the user's own types are those of the registry."""
    return (*_NUMBER_KINDS, *_BYTES_KINDS, *TEXT_KINDS, *_CONTAINER_KINDS, *NUMPY_KINDS, *user_kinds(registry))


def late_kinds() -> Iterable[Kind]:
    """Kinds whose import takes long, for a codec's `more`."""
    from giantstep.format.kinds_random import random_kinds  # noqa: PLC0415 - imports numpy.random

    return random_kinds()


BASE_CODEC = Codec(base_kinds(TypeRegistry()), late_kinds)
