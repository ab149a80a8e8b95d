"""Dataclasses and NamedTuples as dicts of their fields, and back. Called by `format.registry`.

Going back calls a dataclass, and so runs its `__init__` and `__post_init__`; then every field is set as stored.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from giantstep.errors import BadArgumentError


def is_named_tuple(cls: type) -> bool:
    """Whether `typing.NamedTuple` or `collections.namedtuple` made the class, or one that it derives from."""
    return issubclass(cls, tuple) and hasattr(cls, "_fields") and hasattr(cls, "_field_defaults")


def check_dataclass(cls: type) -> None:
    """Raise `BadArgumentError` unless calling the class with its fields gives the object back."""
    parameters = inspect.signature(cls).parameters.values()
    fields = {field.name for field in dataclasses.fields(cls) if field.init}
    named = {
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    required = {part.name for part in parameters if part.default is part.empty and part.kind not in variadic}
    # A parameter that is no field is not stored, and would be lost.
    only_init = {part.name for part in parameters if part.kind not in variadic} - {f.name for f in dataclasses.fields(cls)}
    strange = only_init | (set() if takes_any else fields - named) | (required - fields)
    if strange:
        raise BadArgumentError(
            f"type {cls.__qualname__} cannot be registered by its fields: its parameters and its fields differ in "
            f"{', '.join(sorted(strange))}. Give encode and decode."
        )


def dataclass_to_plain(value: Any) -> dict[str, Any]:
    """All fields by name."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def dataclass_from_plain(cls: type, plain: Any) -> Any:
    """The inverse of `dataclass_to_plain`. Raises ValueError naming fields that are missing or unknown."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    required = {
        name
        for name, field in fields.items()
        if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    _check_fields(cls, plain, fields, required)
    result = cls(**{name: item for name, item in plain.items() if fields[name].init})
    for name, item in plain.items():
        # Whatever the class made of it when it was called; and the class may be frozen.
        object.__setattr__(result, name, item)
    return result


def named_tuple_to_plain(value: Any) -> dict[str, Any]:
    """All fields by name."""
    return dict(zip(type(value)._fields, value, strict=True))


def named_tuple_from_plain(cls: Any, plain: Any) -> Any:
    """The inverse of `named_tuple_to_plain`. Raises ValueError naming fields that are missing or unknown."""
    fields = dict.fromkeys(cls._fields)
    _check_fields(cls, plain, fields, fields.keys() - cls._field_defaults.keys())
    # Past a `__new__` of the class's own, which may change values.
    return tuple.__new__(cls, [plain[name] if name in plain else cls._field_defaults[name] for name in cls._fields])


def _check_fields(cls: type, plain: Any, fields: Mapping[str, Any], required: set[str]) -> None:
    if type(plain) is not dict:
        raise ValueError(f"expected a dict of the fields of {cls.__qualname__}, found {type(plain).__name__}")
    unknown, missing = [name for name in plain if name not in fields], sorted(required - plain.keys())
    if unknown:
        raise ValueError(
            f"class {cls.__qualname__} has no field {', '.join(map(repr, unknown[:5]))}, which is stored. "
            "Give the class such a field, or register it with a decode that takes care of it."
        )
    if missing:
        raise ValueError(
            f"field {', '.join(map(repr, missing[:5]))} of class {cls.__qualname__} is not stored, and has no default. "
            "Give it a default, or register the class with a decode that takes care of it."
        )
