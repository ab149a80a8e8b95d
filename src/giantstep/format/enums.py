"""Enum members by name: their names, and the way back, which imports nothing and calls nothing that was stored.

Called by the object codec's kinds of the user's types (`format.kinds_user`) and by `format.registry`.
"""

from __future__ import annotations

import enum
import sys
import types
from typing import Any


def is_enum(cls: type) -> bool:
    """Whether the class is an enum. Asks no hook of the class."""
    return issubclass(type(cls), enum.EnumMeta)


def class_name(cls: type) -> str:
    """`module:QualName`, under which `find_class` looks."""
    return f"{cls.__module__}:{cls.__qualname__}"


def find_class(name: str) -> type[enum.Enum] | None:
    """The enum of this `class_name` in a module that is imported already; None if there is none.

    Looks into the dicts of the module and of classes alone: a lazy module's hooks would import or run something.
    """
    module_name, _, qualified = name.partition(":")
    found: Any = sys.modules.get(module_name)
    if not issubclass(type(found), types.ModuleType):
        return None
    names: Any = object.__getattribute__(found, "__dict__")
    for step in qualified.split("."):
        found = names.get(step)
        if not issubclass(type(found), type):
            return None
        names = type.__getattribute__(found, "__dict__")
    return found if is_enum(found) else None


def member_names(member: enum.Enum) -> str | list[str]:
    """The member's name; of a flag, the names of the members that it consists of.

    Raises:
        ValueError: its class does not list it, or a flag has bits without a name.
    """
    cls = type(member)
    # A combination of flags, or a member that `_missing_` made up, has a name that is not listed, or none.
    name: Any = member._name_
    listed = cls.__members__.get(name) is member
    if not isinstance(member, enum.Flag):
        if not listed:
            raise ValueError(f"{member!r} is no named member of {cls.__qualname__}")
        return str(name)
    if listed:
        return [name]
    # Single bits come first, so that members of several bits are used only for bits that have no member of their own.
    parts: dict[str, Any] = {str(part._name_): part._value_ for part in cls}
    parts.update((name, part._value_) for name, part in cls.__members__.items() if name == part._name_)
    names, bits = [], 0
    for name, part_bits in parts.items():
        if part_bits & member._value_ == part_bits and part_bits & ~bits:
            names.append(name)
            bits |= part_bits
    if bits != member._value_:
        raise ValueError(f"{member!r} has bits without a name in {cls.__qualname__}")
    return names


def find_member(cls: type[enum.Enum], names: str | list[str]) -> enum.Enum | None:
    """The member of these `member_names`; None if the class has no such member.

    The class is not called, so that no `_missing_` or `__new__` of it runs.
    """
    members = cls.__members__
    if isinstance(names, str):
        return members.get(names)
    if not issubclass(cls, enum.Flag) or any(name not in members for name in names):
        return None
    if len(names) == 1:
        return members[names[0]]
    bits = 0
    for name in names:
        bits |= members[name]._value_
    found = cls._value2member_map_.get(bits)
    if found is None:
        # What combines flags in the standard library, and not what the class may have put in its place.
        found = vars(enum.Flag)["_missing_"].__func__(cls, bits)
    return found if isinstance(found, cls) else None
