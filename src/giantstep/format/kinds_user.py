"""The kinds of the user's own types in the object codec: registered ones, and enums whether registered or not.

Nothing that is stored chooses what runs: a name leads to a class that was registered, or to an enum that is imported.
"""

from __future__ import annotations

import enum
from typing import Any

from giantstep.errors import GiantstepError, UnsupportedTypeError
from giantstep.format.codec import Kind, Reader, Unregistered, Writer
from giantstep.format.enums import class_name, find_class, find_member, is_enum, member_names
from giantstep.format.object_text import Json
from giantstep.format.payload import items_of, text_of
from giantstep.format.registry import TypeRegistry
from giantstep.shards.paths import Path, dotted

_REGISTER = "Register the class with giantstep.register_type"


def user_kinds(registry: TypeRegistry) -> tuple[Kind, ...]:
    """The kinds of what is in the registry, and of enums."""
    registered, enums = _Registered(registry), _Enums(registry)
    return (
        Kind("registered", None, registered.encode, registered.decode, registry.has_class),
        Kind("enum", None, enums.encode, enums.decode, is_enum),
    )


class _Registered:
    """Payload: [name, plain value]."""

    def __init__(self, registry: TypeRegistry) -> None:
        self._registry = registry

    def encode(self, value: Any, writer: Writer, path: Path) -> Json:
        found = self._registry.of_class(type(value))
        try:
            plain = found.encode(value)
        except GiantstepError:
            raise
        except Exception as error:
            raise UnsupportedTypeError(
                f"object at {dotted(path)!r} has the registered type {found.name!r}, whose values could not be taken "
                f"apart: {type(error).__name__}: {error}. Mend the object, or the encode of its type."
            ) from error
        return [found.name, writer.value(plain, path)]

    def decode(self, payload: Json, reader: Reader) -> Any:
        name, stored = items_of(payload, 2)
        plain = reader.value(stored)
        found = self._registry.of_name(text_of(name))
        if found is None:
            remedy = f"{_REGISTER} under the name {name!r:.200} before loading."
            return reader.unregistered(Unregistered(name, plain), remedy)
        try:
            return found.decode(plain)
        except (MemoryError, GiantstepError):
            raise
        except Exception as error:
            # The bytes are sound: the class is another one now, or its functions do not fit each other.
            raise reader.unusable(name, f"{type(error).__name__}: {error}") from error


class _Enums:
    """Payload: [module:QualName, name or list of names, value of the member]."""

    def __init__(self, registry: TypeRegistry) -> None:
        self._registry = registry

    def encode(self, value: enum.Enum, writer: Writer, path: Path) -> Json:
        name = class_name(type(value))
        try:
            names = member_names(value)
        except ValueError as error:
            raise UnsupportedTypeError(f"enum member at {dotted(path)!r}: {error}. Save its value instead.") from error
        if find_class(name) is not type(value):
            raise UnsupportedTypeError(
                f"enum member at {dotted(path)!r} is of {name}, and the class is not found under that name. "
                f"{_REGISTER}, or define it at the top of a module."
            )
        try:
            return [name, names, writer.value(value._value_, (*path, "value"))]
        except UnsupportedTypeError as error:
            raise UnsupportedTypeError(
                f"enum member at {dotted(path)!r} has a value that cannot be stored. {_REGISTER} {name}: members of "
                f"registered enums are stored by name alone. ({error.message})"
            ) from error

    def decode(self, payload: Json, reader: Reader) -> Any:
        name, names, stored = items_of(payload, 3)
        value = reader.value(stored)
        parts = tuple(map(text_of, names if isinstance(names, list) else [names]))
        registered = self._registry.of_name(text_of(name))
        cls: Any = registered.cls if registered is not None and is_enum(registered.cls) else find_class(name)
        # The name decides: a value may have been counted anew (`enum.auto`) since.
        member = None if cls is None else find_member(cls, names)
        if member is not None:
            return member
        remedy = "Import the module that defines it, or register its class under this name, before loading."
        if cls is not None:
            remedy = f"The class has no member {'|'.join(parts)!r:.200} now: give it such a member, or an alias."
        return reader.unregistered(Unregistered(name, value, parts), remedy)
