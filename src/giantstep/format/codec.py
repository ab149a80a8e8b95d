r"""The object codec: Python values as bytes, closed and typed, so that decoding never runs anything stored.

An encoded object is `GSOBJ1\n`, the length of a JSON text (8 bytes, little endian), the JSON text, and binary
attachments that it refers to by offset. None, booleans, integers, finite floats, strings and lists are plain
JSON; every other value is `{"$": tag, "v": payload}` with a tag of one of the kinds that the
`Codec` was given (`format.kinds` has the basic ones). Not here: torch types (`mapping.torch_kinds`).
"""

from __future__ import annotations

import json
import math
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

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
