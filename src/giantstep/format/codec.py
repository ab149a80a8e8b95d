r"""The object codec: Python values as bytes, closed and typed, so that decoding never runs anything stored.

An encoded object is `GSOBJ1\n`, the length of a JSON text (8 bytes, little endian), the JSON text, and binary
attachments that it refers to by offset. None, booleans, integers, finite floats, strings and lists are plain
JSON; every other value is `{"$": tag, "v": payload}` with a tag of one of the kinds that the `Codec` was given.
Not here: the kinds themselves (`format.kinds` lists the basic ones, `mapping.torch_kinds` torch's).
Called by `saving`, `mapping.common_state` and `reading.checkpoint`, with the codec of `giantstep.codecs`.
"""

from __future__ import annotations

import math
import struct
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from giantstep.errors import BadArgumentError, CorruptionError, UnsupportedTypeError
from giantstep.format.object_text import SAFE_INT, Json, is_plain, parse_text, write_text
from giantstep.format.payload import int_of, items_of
from giantstep.shards.paths import Path, dotted

MAGIC = b"GSOBJ1\n"
MAX_DEPTH = 200
_PREFIX_BYTES = len(MAGIC) + 8

Encode: TypeAlias = Callable[[Any, "Writer", Path], Json]
Decode: TypeAlias = Callable[[Json, "Reader"], Any]
Accepts: TypeAlias = Callable[[type], bool]
Unknown: TypeAlias = Literal["raise", "keep"]


@dataclass(frozen=True, slots=True)
class Kind:
    """How values of one type are stored.

    Attributes:
        tag: name on disk.
        type: values of exactly this type are encoded; None for a kind of many types, see `accepts`.
        encode: (value, writer, path) -> JSON payload; children go through `writer.value`.
        decode: (payload, reader) -> value; raises anything but MemoryError on a malformed payload. Children go
            through `reader.value`. `UnsupportedTypeError` says that the payload is well formed, but of no use here.
        accepts: whether values of a type that no other kind has are of this kind.
    """

    tag: str
    type: type | None
    encode: Encode
    decode: Decode
    accepts: Accepts | None = None


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where a tensor stood in a list or tuple of the common state; `key` says which."""

    key: str


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Unregistered:
    """A stored value of a type that is unknown here, kept as it is stored. Equal only to itself.

    Attributes:
        name: of the type: as registered, or `module:QualName` of an enum.
        value: what is stored of it, in types that are known.
        members: for an enum, names of the members that the value consists of.
    """

    name: str
    value: Any
    members: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        if self.members is None:
            return f"<unregistered {self.name}: {self.value!r}>"
        return f"<unregistered {self.name}.{'|'.join(self.members)}: {self.value!r}>"


class Writer:
    """Collects attachments while values become JSON."""

    __slots__ = ("_attached_bytes", "_attachments", "_codec", "_depth", "_references")

    def __init__(self, codec: Codec, depth: int = 0) -> None:
        self._codec = codec
        self._depth = depth
        self._attachments: list[bytes] = []
        self._references: list[list[int]] = []
        self._attached_bytes = 0

    def value(self, value: Any, path: Path) -> Json:
        """The value as JSON; raises `UnsupportedTypeError` naming `path`."""
        kind = type(value)
        if value is None or kind is bool or (kind is str and is_plain(value)):
            return value
        if kind is int and -SAFE_INT <= value <= SAFE_INT:
            return value
        if kind is float and math.isfinite(value):
            return value
        if self._depth >= MAX_DEPTH:
            raise BadArgumentError(
                f"object at {dotted(path)[:200]!r} is nested more than {MAX_DEPTH} levels deep (or contains itself)"
            )
        self._depth += 1
        try:
            if kind is list:
                return self.items(value, path)
            found = self._codec.for_type(kind, path)
            return {"$": found.tag, "v": found.encode(value, self, path)}
        finally:
            self._depth -= 1

    def items(self, values: Iterable[Any], path: Path) -> list[Json]:
        """The values of a sequence as JSON."""
        found = []
        for position, item in enumerate(values):
            # A loop: deep values must not need more of Python's stack than they do.
            found.append(self.value(item, (*path, position)))
        return found

    def sorted_items(self, values: Iterable[Any], path: Path) -> list[Json]:
        """The values of a set as JSON, in the order of their own encodings: the same in every process."""
        parts = []
        for item in values:
            part = Writer(self._codec, self._depth)
            json_value = part.value(item, (*path, "<item>"))
            parts.append((part.encoded(json_value), part, json_value))
        parts.sort(key=lambda entry: entry[0])
        for _, part, _ in parts:
            # What each item attached follows what is attached already.
            for reference in part._references:
                reference[0] += self._attached_bytes
            self._references += part._references
            self._attachments += part._attachments
            self._attached_bytes += part._attached_bytes
        return [json_value for _, _, json_value in parts]

    def attach(self, data: bytes) -> list[int]:
        """Reference to bytes stored behind the JSON text; part of the JSON as it is."""
        reference = [self._attached_bytes, len(data)]
        self._attachments.append(data)
        self._references.append(reference)
        self._attached_bytes += len(data)
        return reference

    def encoded(self, json_value: Json) -> bytes:
        """The encoded object of what `value` gave."""
        text = write_text(json_value)
        return b"".join((MAGIC, struct.pack("<Q", len(text)), text, *self._attachments))


class Reader:
    """Turns JSON back into values, taking attachments from the bytes behind the text."""

    def __init__(self, codec: Codec, attachments: memoryview, what: str, unknown: Unknown) -> None:
        self._codec = codec
        self._attachments = attachments
        self._what = what
        self._unknown = unknown
        self._taken = 0
        self._depth = 0

    def value(self, json_value: Json) -> Any:
        """Inverse of `Writer.value`. Lists are changed in place, so that only one copy of them exists."""
        if not isinstance(json_value, list | dict):
            return json_value
        if self._depth >= MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        self._depth += 1
        try:
            if isinstance(json_value, list):
                return self.items(json_value)
            return self._codec.for_tag(json_value["$"]).decode(json_value["v"], self)
        finally:
            self._depth -= 1

    def items(self, payload: Json) -> list[Any]:
        """Inverse of `Writer.items`, in place."""
        found = items_of(payload)
        for position, item in enumerate(found):
            if isinstance(item, list | dict):
                found[position] = self.value(item)
        return found

    def attachment(self, reference: Json) -> memoryview:
        """The bytes that `Writer.attach` stored; valid until decoding ends, so to be copied."""
        total = len(self._attachments)
        start, size = (int_of(part, 0, total) for part in items_of(reference, 2))
        # Each attachment is referred to once, so a small object cannot claim to hold much.
        self._taken += size
        if self._taken > total:
            raise ValueError("attachments are referred to more than once")
        if start + size > total:
            raise ValueError(f"attachment {reference} lies outside the {total} bytes attached")
        return self._attachments[start : start + size]

    def unregistered(self, found: Unregistered, remedy: str) -> Unregistered:
        """The value as it is stored, where the caller of `decode` keeps those; `UnsupportedTypeError` elsewhere."""
        if self._unknown == "keep":
            return found
        raise UnsupportedTypeError(
            f"object {self._what} holds a value of the type {found.name!r:.200}, which is unknown here. {remedy} "
            "giantstep.open_checkpoint shows it as it is stored."
        )

    def unusable(self, name: str, reason: str) -> UnsupportedTypeError:
        """The error that a well-formed value of the type `name` cannot be had here."""
        return UnsupportedTypeError(f"object {self._what} holds a value of the type {name!r:.200}: {reason}")


class Codec:
    """A closed set of kinds.

    Args:
        kinds: what it knows.
        more: each gives further kinds, called once and only when something is met that those before do not know;
            so that kinds whose import is expensive cost nothing where they do not occur.
    """

    def __init__(self, kinds: Iterable[Kind], *more: Callable[[], Iterable[Kind]]) -> None:
        self._by_type: dict[type, Kind] = {}
        self._by_tag: dict[str, Kind] = {}
        self._open_kinds: list[Kind] = []
        self._more = list(more)
        self._lock = threading.Lock()
        self._add(kinds)

    def _add(self, kinds: Iterable[Kind]) -> None:
        for kind in kinds:
            if kind.tag in self._by_tag or kind.type in self._by_type:
                name = kind.type.__qualname__ if kind.type else "(any)"
                raise BadArgumentError(f"type {name} or tag {kind.tag!r} is registered twice")
            self._by_tag[kind.tag] = kind
            if kind.type is not None:
                self._by_type[kind.type] = kind
            if kind.accepts is not None:
                self._open_kinds.append(kind)

    def _find(self, look_up: Callable[[], Kind | None]) -> Kind | None:
        """What the look-up finds, once all kinds are there that it needs."""
        found = look_up()
        while found is None and self._more:
            # Whoever comes while the kinds are being fetched waits for them, and then finds them.
            with self._lock:
                if self._more:
                    self._add(self._more[0]())
                    del self._more[0]
            found = look_up()
        return found or look_up()

    def tags(self) -> set[str]:
        """All tags on disk; fetches all kinds."""
        self._find(lambda: None)
        return set(self._by_tag)

    def _of_type(self, kind: type) -> Kind | None:
        found = self._by_type.get(kind)
        if found is None:
            found = next((other for other in self._open_kinds if other.accepts is not None and other.accepts(kind)), None)
        return found

    def has_kind_for(self, kind: type, *, fetch: bool) -> bool:
        """Whether a kind stores values of exactly this type; of all kinds, or of those that are fetched already."""
        found = self._find(lambda: self._by_type.get(kind)) if fetch else self._by_type.get(kind)
        return found is not None

    def for_type(self, kind: type, path: Path) -> Kind:
        """The kind that stores values of this type; `UnsupportedTypeError` if there is none."""
        found = self._find(lambda: self._of_type(kind))
        if found is None and kind is Unregistered:
            raise UnsupportedTypeError(
                f"object at {dotted(path)!r} was read without its type. Load it with its type registered "
                "(giantstep.register_type), and save that."
            )
        if found is None:
            raise UnsupportedTypeError(
                f"object at {dotted(path)!r} has type {kind.__module__}.{kind.__qualname__}, which cannot be stored "
                "without running code on load. Register the type with giantstep.register_type, convert the object to "
                "plain values (numbers, strings, lists, dicts, arrays, tensors) before saving and back after loading, "
                "or give it state_dict()/load_state_dict()."
            )
        return found

    def for_tag(self, tag: Json) -> Kind:
        """The kind of a stored tag; ValueError if it is unknown."""
        found = self._find(lambda: self._by_tag.get(tag)) if isinstance(tag, str) else None
        if found is None:
            raise ValueError(f"unknown type tag {tag!r:.100}")
        return found

    def encode(self, value: Any, path: Path = ()) -> bytes:
        """The value as bytes.

        Raises:
            UnsupportedTypeError: a value inside has no kind; names its path and the remedy.
            BadArgumentError: it is nested too deep, or contains itself.
        """
        writer = Writer(self)
        try:
            return writer.encoded(writer.value(value, path))
        except RecursionError as error:
            raise BadArgumentError(
                f"object at {dotted(path)!r} is nested too deep to be saved from here: Python's stack ends at "
                f"{sys.getrecursionlimit()} calls. Save from a less nested call, or see sys.setrecursionlimit."
            ) from error

    def decode(self, data: bytes | memoryview, what: str, *, unknown: Unknown = "raise") -> Any:
        """Inverse of `encode`; `what` names the object in errors.

        Args:
            data: an encoded object.
            what: its name.
            unknown: what becomes of well-formed values that only a type unknown here could hold: "raise", or "keep"
                them as `Unregistered`.

        Raises:
            CorruptionError: the bytes are not what `encode` writes, or use a tag this codec does not know.
            UnsupportedTypeError: see `unknown`; or a registered type does not take what is stored.
        """
        if unknown not in ("raise", "keep"):
            raise BadArgumentError(f"unknown={unknown!r} cannot be: expected 'raise' or 'keep'")
        view = memoryview(data)
        text_bytes = struct.unpack("<Q", view[len(MAGIC) : _PREFIX_BYTES])[0] if len(view) >= _PREFIX_BYTES else -1
        if view[: len(MAGIC)] != MAGIC or not 0 <= text_bytes <= len(view) - _PREFIX_BYTES:
            raise CorruptionError(f"object {what} does not begin like an encoded object")
        text, attachments = view[_PREFIX_BYTES : _PREFIX_BYTES + text_bytes], view[_PREFIX_BYTES + text_bytes :]
        try:
            return Reader(self, attachments, what, unknown).value(parse_text(text))
        except (MemoryError, UnsupportedTypeError):
            raise
        except Exception as error:
            # Whatever a constructor says to a hostile value.
            raise CorruptionError(f"object {what} cannot be decoded: {error!s:.500}") from error
