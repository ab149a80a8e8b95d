"""`TypeRegistry`: the types that a user has told the object codec about, by class and by the name that is stored.

Not here: how their values are written (`format.kinds_user`), and the registry of this process (`giantstep.codecs`).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from giantstep.errors import BadArgumentError
from giantstep.format.enums import find_member, is_enum, member_names
from giantstep.format.field_types import (
    check_dataclass,
    dataclass_from_plain,
    dataclass_to_plain,
    is_named_tuple,
    named_tuple_from_plain,
    named_tuple_to_plain,
)
from giantstep.format.object_text import is_plain

_MAX_NAME = 200


@dataclass(frozen=True, slots=True)
class Registration:
    """One registered type.

    Attributes:
        cls: values of exactly this class.
        name: what is stored to name it.
        encode: value -> plain value, of types that the codec knows.
        decode: plain value -> value; raises anything on a plain value that it does not take.
        given: the arguments that it was registered with.
    """

    cls: type
    name: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    given: tuple[Any, ...]


def _counter_from_plain(plain: Any) -> Counter[Any]:
    if type(plain) is not dict:
        raise TypeError(f"expected a dict, found a {type(plain).__name__}")
    return Counter(plain)


# Types of Python's that are registered from the start: readers from before they were say that they do not know the name.
FROM_THE_START = (Registration(Counter, "collections.Counter", dict, _counter_from_plain, ("collections.Counter",)),)


class TypeRegistry:
    """Registered types. May be used from several threads at once.

    Those of `FROM_THE_START` may be registered otherwise, which decides how they are saved; under their own names they are
    read either way.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_class: dict[type, Registration] = {}
        self._by_name: dict[str, Registration] = {}
        self._first_by_class: dict[type, Registration] = {found.cls: found for found in FROM_THE_START}
        self._first_by_name = {found.name: found for found in FROM_THE_START}

    def has_class(self, cls: type) -> bool:
        """Whether exactly this class is registered."""
        return cls in self._by_class or cls in self._first_by_class

    def of_class(self, cls: type) -> Registration:
        """The registration of exactly this class, which there is."""
        return self._by_class.get(cls) or self._first_by_class[cls]

    def of_name(self, name: str) -> Registration | None:
        """The registration under this name, or None."""
        return self._by_name.get(name) or self._first_by_name.get(name)

    def register(
        self,
        cls: type,
        name: str | None,
        encode: Callable[[Any], Any] | None,
        decode: Callable[[Any], Any] | None,
    ) -> None:
        """Add a type; see `giantstep.register_type`. Adding it again with the same arguments changes nothing.

        Raises:
            BadArgumentError: it cannot be registered so, or class or name are registered otherwise.
        """
        if not isinstance(cls, type):
            raise BadArgumentError(f"register_type was given {cls!r:.100}: expected a class")
        name = cls.__qualname__ if name is None else name
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not is_plain(name):
            raise BadArgumentError(f"name={name!r:.100} of type {cls.__qualname__}: expected 1 to {_MAX_NAME} characters")
        functions = _functions(cls, encode, decode)
        added = Registration(cls, name, *functions, given=(name, encode, decode))
        with self._lock:
            same_class, same_name = self._by_class.get(cls), self.of_name(name)
            if same_class is not None and same_class.given != added.given:
                raise BadArgumentError(
                    f"type {cls.__qualname__} is registered already, as {same_class.name!r} and with other arguments. "
                    "Register it once."
                )
            if same_name is not None and same_name.cls is not cls:
                raise BadArgumentError(
                    f"name {name!r} of type {cls.__module__}.{cls.__qualname__} is registered already, for "
                    f"{same_name.cls.__module__}.{same_name.cls.__qualname__}. Give another name=."
                )
            self._by_class[cls] = added
            self._by_name[name] = added


def _functions(
    cls: Any, encode: Callable[[Any], Any] | None, decode: Callable[[Any], Any] | None
) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """To a plain value and back: as given, or what the class allows for."""
    if encode is not None and decode is not None:
        if not callable(encode) or not callable(decode):
            raise BadArgumentError(f"encode and decode of type {cls.__qualname__} must be callables")
        return encode, decode
    if encode is not None or decode is not None:
        given, absent = ("encode", "decode") if decode is None else ("decode", "encode")
        raise BadArgumentError(f"type {cls.__qualname__} was given {given} but no {absent}: give both, or neither")
    if is_enum(cls):
        return member_names, partial(_member, cls)
    # A class that only inherits the fields of a dataclass may have more to it.
    if "__dataclass_fields__" in vars(cls):
        check_dataclass(cls)
        return dataclass_to_plain, partial(dataclass_from_plain, cls)
    if is_named_tuple(cls):
        return named_tuple_to_plain, partial(named_tuple_from_plain, cls)
    raise BadArgumentError(
        f"type {cls.__qualname__} is no dataclass, NamedTuple or Enum: give encode, a function from a value to plain "
        "values, and decode, its inverse"
    )


def _member(cls: type, plain: Any) -> Any:
    found = find_member(cls, plain)
    if found is None:
        raise ValueError(f"enum {cls.__qualname__} has no member {plain!r:.200}. Give it such a member, or an alias")
    return found
