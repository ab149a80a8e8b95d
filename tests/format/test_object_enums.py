"""Enums in objects: found by name among what is imported, never imported, never called."""

from __future__ import annotations

import enum
import importlib.util
import json
import signal
import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from exactness import same
from giantstep.codecs import OBJECT_CODEC
from giantstep.errors import CorruptionError, UnsupportedTypeError
from giantstep.format.codec import MAGIC, Codec, Unregistered
from giantstep.format.kinds import base_kinds
from giantstep.format.registry import TypeRegistry

CALLS: list[Any] = []


class Colour(enum.Enum):
    RED = 1
    GREEN = "two"
    CRIMSON = 1  # noqa: PIE796 - an alias of RED is wanted
    TUPLE = (1, b"x", None)

    @classmethod
    def _missing_(cls, value: object) -> Any:
        CALLS.append(value)
        return cls.RED


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2**70


class Mode(enum.StrEnum):
    TRAIN = enum.auto()


class Permission(enum.Flag):
    READ = 1
    WRITE = 2
    EXECUTE = 4
    ALL = 7

    @classmethod
    def _missing_(cls, value: object) -> Any:
        CALLS.append(value)
        return super()._missing_(value)


class Bits(enum.IntFlag):
    A = 1
    WIDE = 6  # bits without members of their own
    NONE = 0


class Outer:
    class Inner(enum.Enum):
        X = object

    class Plain(enum.Enum):
        X = 1.5


class Odd(enum.Enum):
    FUNCTION = (len,)


def encoded(*payload: Any) -> bytes:
    text = json.dumps({"$": "enum", "v": list(payload)}).encode("ascii")
    return MAGIC + struct.pack("<Q", len(text)) + text


MEMBERS = [
    *Colour,
    *Level,
    *Mode,
    *Permission,
    Permission(0),
    Permission.ALL,
    Permission.READ | Permission.EXECUTE,
    *Bits,
    Bits.A | Bits.WIDE,
    Bits.NONE,
    Outer.Plain.X,
    signal.SIGINT,
]


@pytest.mark.parametrize("member", MEMBERS, ids=repr)
def test_members_come_back_as_themselves(member: enum.Enum) -> None:
    CALLS.clear()
    found = OBJECT_CODEC.decode(OBJECT_CODEC.encode({member: [member]}), "x")
    ((key, (item,)),) = found.items()
    assert key is member
    assert item is member
    assert CALLS == []


def test_combinations_of_flags_that_never_were_come_back_without_missing() -> None:
    CALLS.clear()
    found = OBJECT_CODEC.decode(encoded(f"{__name__}:Permission", ["WRITE", "EXECUTE"], 6), "x")
    assert type(found) is Permission
    assert found._value_ == 6
    assert CALLS == []
    assert found is Permission.WRITE | Permission.EXECUTE
    assert OBJECT_CODEC.decode(encoded(f"{__name__}:Permission", [], 0), "x")._value_ == 0


def test_a_flag_is_stored_as_the_names_of_its_parts() -> None:
    assert b'["READ","EXECUTE"],5]' in OBJECT_CODEC.encode(Permission.READ | Permission.EXECUTE)
    assert b'["A","WIDE"],7]' in OBJECT_CODEC.encode(Bits.A | Bits.WIDE)
    assert f'["{__name__}:Colour","RED",1]'.encode() in OBJECT_CODEC.encode(Colour.CRIMSON)


def test_the_name_decides_and_not_the_value() -> None:
    assert OBJECT_CODEC.decode(encoded(f"{__name__}:Colour", "RED", 99), "x") is Colour.RED
    assert OBJECT_CODEC.decode(encoded(f"{__name__}:Colour", "CRIMSON", 1), "x") is Colour.RED


UNKNOWN = [
    ("no_such_module_at_all:Colour", "RED"),
    (f"{__name__}:Missing", "RED"),
    (f"{__name__}:Colour.Inner", "RED"),
    (f"{__name__}:CALLS", "RED"),
    (f"{__name__}:Outer", "X"),
    (f"{__name__}:json.loads", "X"),
    (f"{__name__}", "RED"),
    (f"{__name__}:", "RED"),
    (":Colour", "RED"),
    ("builtins:int", "real"),
    (f"{__name__}:Colour", "BLUE"),
    (f"{__name__}:Colour", "_missing_"),
    (f"{__name__}:Colour", "mro"),
    (f"{__name__}:Colour", ["RED"]),
    (f"{__name__}:Colour", []),
    (f"{__name__}:Permission", ["READ", "DELETE"]),
    ("antigravity:Colour", "RED"),
]


@pytest.mark.parametrize(("name", "members"), UNKNOWN)
def test_what_is_no_known_member_is_an_error_or_kept_as_it_is_stored(name: str, members: Any) -> None:
    CALLS.clear()
    modules = set(sys.modules)
    with pytest.raises(UnsupportedTypeError, match="object thing holds a value of the type") as caught:
        OBJECT_CODEC.decode(encoded(name, members, [1]), "thing")
    assert repr(name) in str(caught.value)
    found = OBJECT_CODEC.decode(encoded(name, members, [1]), "thing", unknown="keep")
    assert type(found) is Unregistered
    names = (members,) if isinstance(members, str) else tuple(members)
    assert (found.name, found.value, found.members) == (name, [1], names)
    assert repr(found) == f"<unregistered {name}.{'|'.join(names)}: [1]>"
    assert CALLS == []
    assert set(sys.modules) == modules


@pytest.mark.parametrize(
    "payload",
    [
        (),
        ("a:B", "X"),
        ("a:B", "X", 1, 2),
        (1, "X", 1),
        ("a:B", 1, 1),
        ("a:B", [1], 1),
        ("a:B", None, 1),
        (f"{__name__}:Colour", "RED", {"$": "enum", "v": []}),
    ],
)
def test_malformed_enums_are_corruption(payload: tuple[Any, ...]) -> None:
    for unknown in ("raise", "keep"):
        with pytest.raises(CorruptionError):
            OBJECT_CODEC.decode(encoded(*payload), "x", unknown=unknown)  # type: ignore[arg-type]


def test_lazy_modules_stay_unloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazy_enum_module.py").write_text("import enum\nclass E(enum.Enum):\n    A = 1\nraise SystemExit('loaded')\n")
    spec = importlib.util.spec_from_file_location("lazy_enum_module", tmp_path / "lazy_enum_module.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lazy_enum_module", module)
    spec.loader.exec_module(module)
    with pytest.raises(UnsupportedTypeError):
        OBJECT_CODEC.decode(encoded("lazy_enum_module:E", "A", 1), "x")


def test_hooks_of_modules_and_classes_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Meta(type):
        def __getattribute__(cls, name: str) -> Any:
            CALLS.append(name)
            return type.__getattribute__(cls, name)

    class Holder(metaclass=Meta):
        Colour = Colour

    class Strange:
        def __getattribute__(self, name: str) -> Any:
            CALLS.append(name)
            raise SystemExit

    module = types.ModuleType("hooked_module")
    vars(module).update(Holder=Holder, instance=Strange(), __getattr__=CALLS.append)
    monkeypatch.setitem(sys.modules, "hooked_module", module)
    monkeypatch.setitem(sys.modules, "strange_module", Strange())  # type: ignore[arg-type]
    CALLS.clear()
    assert OBJECT_CODEC.decode(encoded("hooked_module:Holder.Colour", "RED", 1), "x") is Colour.RED
    for name in ("hooked_module:Absent", "hooked_module:instance.A", "strange_module:A", "strange_module:"):
        with pytest.raises(UnsupportedTypeError):
            OBJECT_CODEC.decode(encoded(name, "RED", 1), "x")
    assert CALLS == []


def local_enum() -> Any:
    class Local(enum.Enum):
        X = 1

    return Local.X


def made_up_member() -> Any:
    class Open(enum.Enum):
        KNOWN = 1

        @classmethod
        def _missing_(cls, value: object) -> Any:
            member = object.__new__(cls)
            member._name_, member._value_ = "MADE_UP", value
            return member

    return Open(5)


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (local_enum(), "define it at the top of a module"),
        (made_up_member(), "no named member"),
        (Bits(64), "bits without a name"),
        (Odd.FUNCTION, "stored by name alone"),
        (Outer.Inner.X, "stored by name alone"),
    ],
)
def test_members_that_would_not_come_back_are_refused_at_save(member: enum.Enum, reason: str) -> None:
    with pytest.raises(UnsupportedTypeError, match=r"'a\.b'") as caught:
        OBJECT_CODEC.encode({"a": {"b": member}})
    assert reason in str(caught.value)


def test_a_class_registered_under_the_stored_name_comes_first() -> None:
    types_ = TypeRegistry()
    codec = Codec(base_kinds(types_))
    data = encoded("job.old_place:Colour", "RED", 1)
    with pytest.raises(UnsupportedTypeError, match="register its class under this name"):
        codec.decode(data, "x")
    types_.register(Colour, "job.old_place:Colour", None, None)
    assert codec.decode(data, "x") is Colour.RED


def test_registered_enums_are_stored_by_name_alone() -> None:
    types_ = TypeRegistry()
    codec = Codec(base_kinds(types_))
    local = type(local_enum())
    for cls, name in ((Odd, "Odd"), (local, "Local"), (Permission, "Permission")):
        types_.register(cls, name, None, None)
    for member in (Odd.FUNCTION, local.X, Permission.READ, Permission.READ | Permission.WRITE):
        assert codec.decode(codec.encode(member), "x") is member
    assert codec.encode(Odd.FUNCTION).endswith(b'{"$":"registered","v":["Odd","FUNCTION"]}')
    data = codec.encode(Odd.FUNCTION).replace(b"FUNCTION", b"FUNKTION")
    with pytest.raises(UnsupportedTypeError, match="enum Odd has no member 'FUNKTION'"):
        codec.decode(data, "x")


def test_members_are_kept_as_keys_and_elements() -> None:
    data = OBJECT_CODEC.encode({"k": {Colour.RED: 1, Colour.GREEN: 2}, "s": {Colour.RED, Level.LOW}})
    data = data.replace(b":Colour", b":Colors")
    found = OBJECT_CODEC.decode(data, "x", unknown="keep")
    assert [repr(key) for key in found["k"]] == [
        f"<unregistered {__name__}:Colors.{end}>" for end in ("RED: 1", "GREEN: 'two'")
    ]
    assert len(found["s"]) == 2
    with pytest.raises(UnsupportedTypeError, match="read without its type"):
        OBJECT_CODEC.encode(found)


def test_comparing_enums_compares_members() -> None:
    assert same(Level.LOW, Level.LOW)
    assert not same(Level.LOW, 1)
