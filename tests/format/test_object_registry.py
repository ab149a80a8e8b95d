"""The user's own types in objects: registered by class and name, made again by nothing but the registered class."""

from __future__ import annotations

import enum
import json
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict, namedtuple
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import giantstep as gs
from exactness import same
from giantstep.codecs import OBJECT_CODEC, register_type
from giantstep.errors import BadArgumentError, CorruptionError, GiantstepError, UnsupportedTypeError
from giantstep.format.codec import MAGIC, Codec, Unregistered
from giantstep.format.kinds import base_kinds
from giantstep.format.registry import TypeRegistry

MADE: list[Any] = []


@dataclass
class Schedule:
    warmup: int
    peak: float = 3e-4
    milestones: list[int] = field(default_factory=list)
    calls: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        MADE.append("Schedule")


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    epoch: int
    inner: Any = None
    total: int = field(init=False, default=0)


class Pair(NamedTuple):
    left: Any
    right: Any = 5


Point = namedtuple("Point", "x y")  # noqa: PYI024 - the older way to make one must work too


class Phase(enum.Enum):
    WARMUP = 1


class Tokenizer:
    def __init__(self, vocabulary: dict[str, int]) -> None:
        MADE.append("Tokenizer")
        self.vocabulary = vocabulary

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.vocabulary == other.vocabulary

    def __hash__(self) -> int:
        return len(self.vocabulary)


@pytest.fixture
def registry() -> TypeRegistry:
    return TypeRegistry()


@pytest.fixture
def codec(registry: TypeRegistry) -> Codec:
    return Codec(base_kinds(registry))


def encoded(json_value: Any) -> bytes:
    text = json.dumps(json_value).encode("ascii")
    return MAGIC + struct.pack("<Q", len(text)) + text


def encoded_text(text: bytes) -> bytes:
    return MAGIC + struct.pack("<Q", len(text)) + text


def again(codec: Codec, value: Any) -> Any:
    return codec.decode(codec.encode(value), "x")


def test_dataclasses_named_tuples_and_enums_need_only_be_registered(registry: TypeRegistry, codec: Codec) -> None:
    for cls in (Schedule, Position, Pair, Point, Phase):
        registry.register(cls, None, None, None)
    schedule = Schedule(5, -0.0, [1, 2])
    schedule.calls = 7
    position = Position(epoch=1, inner=(schedule, {Position(epoch=2)}))
    object.__setattr__(position, "total", 2**80)
    value = {"a": schedule, "b": [position, Pair(1, Pair(2)), Point(np.float32(1), b"y")], Phase.WARMUP: {Pair(1, 2)}}
    found = again(codec, value)
    assert found["a"] == schedule
    assert found["a"].calls == 7
    assert same(found["b"][0].total, 2**80)
    assert found["b"][0] == position
    assert same(found["b"][1:], value["b"][1:])
    assert list(found) == list(value)
    assert found[Phase.WARMUP] == {Pair(1, 2)}
    assert codec.encode(found) == codec.encode(value)


def test_fields_are_stored_by_name_under_the_registered_name(registry: TypeRegistry, codec: Codec) -> None:
    registry.register(Pair, "two of a kind", None, None)
    assert codec.encode(Pair(1, "x"))[15:] == (
        b'{"$":"registered","v":["two of a kind",{"$":"dict","v":[["left",1],["right","x"]]}]}'
    )


def test_other_types_take_two_functions(registry: TypeRegistry, codec: Codec) -> None:
    with pytest.raises(UnsupportedTypeError, match=r"giantstep\.register_type"):
        codec.encode(Tokenizer({}))
    registry.register(Tokenizer, None, lambda value: value.vocabulary, Tokenizer)
    assert again(codec, [Tokenizer({"a": 1})]) == [Tokenizer({"a": 1})]


def test_functions_may_replace_what_a_dataclass_would_do(registry: TypeRegistry, codec: Codec) -> None:
    registry.register(Schedule, None, lambda value: (value.warmup, value.peak), lambda plain: Schedule(*plain))
    assert again(codec, Schedule(3, 0.5)) == Schedule(3, 0.5)
    assert codec.encode(Schedule(3, 0.5)).endswith(b'["Schedule",{"$":"tuple","v":[3,0.5]}]}')


def stored(name: str, fields: dict[str, Any]) -> bytes:
    return encoded({"$": "registered", "v": [name, {"$": "dict", "v": [list(pair) for pair in fields.items()]}]})


def test_missing_fields_take_their_defaults(registry: TypeRegistry, codec: Codec) -> None:
    registry.register(Schedule, None, None, None)
    registry.register(Pair, None, None, None)
    assert codec.decode(stored("Schedule", {"warmup": 9}), "x") == Schedule(9)
    assert codec.decode(stored("Pair", {"left": 9}), "x") == Pair(9, 5)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("Schedule", {"peak": 0.5}, "field 'warmup' of class Schedule is not stored"),
        ("Schedule", {"warmup": 1, "speed": 2}, "class Schedule has no field 'speed'"),
        ("Pair", {"right": 1}, "field 'left' of class Pair is not stored"),
        ("Pair", {"left": 1, "middle": 1}, "class Pair has no field 'middle'"),
        ("Pair", {"left": 1, "__class__": 1}, "class Pair has no field '__class__'"),
    ],
)
def test_fields_that_do_not_fit_are_named(
    registry: TypeRegistry, codec: Codec, name: str, fields: dict[str, Any], message: str
) -> None:
    registry.register(Schedule, None, None, None)
    registry.register(Pair, None, None, None)
    MADE.clear()
    with pytest.raises(UnsupportedTypeError) as caught:
        codec.decode(stored(name, fields), "the object")
    assert message in str(caught.value)
    assert "object the object" in str(caught.value)
    assert MADE == []


@pytest.mark.parametrize("plain", [1, [], "x", None, {"$": "tuple", "v": []}, {"$": "dict", "v": [[1, 2]]}])
def test_plain_values_that_do_not_fit_are_errors_of_ours(registry: TypeRegistry, codec: Codec, plain: Any) -> None:
    registry.register(Schedule, None, None, None)
    registry.register(Phase, None, None, None)
    registry.register(Tokenizer, None, lambda value: value.vocabulary, lambda plain: 1 / 0)
    for name in ("Schedule", "Phase", "Tokenizer"):
        with pytest.raises(UnsupportedTypeError):
            codec.decode(encoded({"$": "registered", "v": [name, plain]}), "x")


@pytest.mark.parametrize(
    "payload", [[], ["x"], ["x", 1, 2], [1, 2], [None, 1], "x", None, [["x"], 1], ["x", {"$": "?", "v": 1}]]
)
def test_malformed_payloads_are_corruption(codec: Codec, payload: Any) -> None:
    with pytest.raises(CorruptionError):
        codec.decode(encoded({"$": "registered", "v": payload}), "x", unknown="keep")


def test_unregistered_names_are_errors_or_kept_and_make_nothing(registry: TypeRegistry, codec: Codec) -> None:
    registry.register(Schedule, None, None, None)
    registry.register(Tokenizer, "tok", lambda value: value.vocabulary, Tokenizer)
    key = Schedule(1)
    data = codec.encode({"a": [key, {"t": (Tokenizer({"x": 1}), 2)}]})
    other = Codec(base_kinds(TypeRegistry()))
    MADE.clear()
    with pytest.raises(UnsupportedTypeError) as caught:
        other.decode(data, "'common_state' in /ckpt")
    assert "object 'common_state' in /ckpt" in str(caught.value)
    assert "'Schedule'" in str(caught.value)
    assert "giantstep.register_type" in str(caught.value)
    found = other.decode(data, "x", unknown="keep")
    schedule, tokenizer = found["a"][0], found["a"][1]["t"][0]
    assert schedule.value == {"warmup": 1, "peak": 3e-4, "milestones": [], "calls": 0}
    assert (tokenizer.name, tokenizer.value, tokenizer.members) == ("tok", {"x": 1}, None)
    assert repr(tokenizer) == "<unregistered tok: {'x': 1}>"
    assert MADE == []


def test_kept_values_are_equal_to_themselves_alone_and_do_not_change(codec: Codec) -> None:
    one = {"$": "registered", "v": ["A", [1]]}
    found = codec.decode(encoded({"$": "dict", "v": [[one, one], [2, {"$": "set", "v": [one, one]}]]}), "x", unknown="keep")
    keys = list(found)
    assert found[keys[0]] != keys[0]
    assert len(found[2]) == 2
    with pytest.raises(AttributeError):
        keys[0].name = "B"


def test_decode_takes_two_ways_only(codec: Codec) -> None:
    with pytest.raises(BadArgumentError, match="expected 'raise' or 'keep'"):
        codec.decode(codec.encode(1), "x", unknown="ignore")  # type: ignore[arg-type]


# Registering.


class Plain:
    pass


class Custom(Plain):
    def __init__(self, *, size: int) -> None:
        self.size = size


@dataclass
class WithInitVar:
    a: int
    scale: InitVar[int]


@dataclass(init=False)
class WithInit:
    a: int

    def __init__(self, path: str) -> None:
        self.a = len(path)


class Inherited(Schedule):
    pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Plain, None, None, None), "no dataclass, NamedTuple or Enum"),
        ((Inherited, None, None, None), "no dataclass, NamedTuple or Enum"),
        ((Plain, None, repr, None), "given encode but no decode"),
        ((Plain, None, None, repr), "given decode but no encode"),
        ((Plain, None, "encode", "decode"), "must be callables"),
        ((Plain(), None, repr, repr), "expected a class"),
        ((Schedule, "", None, None), "expected 1 to 200 characters"),
        ((Schedule, "x" * 201, None, None), "expected 1 to 200 characters"),
        ((Schedule, 5, None, None), "expected 1 to 200 characters"),
        ((WithInitVar, None, None, None), "differ in scale"),
        ((WithInit, None, None, None), "differ in a, path"),
    ],
)
def test_what_cannot_be_registered(registry: TypeRegistry, arguments: Any, message: str) -> None:
    with pytest.raises(BadArgumentError, match=message):
        registry.register(*arguments)


def test_a_class_and_a_name_belong_to_each_other(registry: TypeRegistry) -> None:
    registry.register(Schedule, "S", None, None)
    registry.register(Schedule, "S", None, None)
    with pytest.raises(BadArgumentError, match="registered already, as 'S'"):
        registry.register(Schedule, "T", None, None)
    with pytest.raises(BadArgumentError, match="registered already, as 'S'"):
        registry.register(Schedule, "S", repr, repr)
    with pytest.raises(BadArgumentError, match="Give another name="):
        registry.register(Position, "S", None, None)
    registry.register(Position, "T", None, None)
    assert registry.of_name("S").cls is Schedule  # type: ignore[union-attr]
    assert registry.of_name("T").cls is Position  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "cls", [int, dict, OrderedDict, type(Path()), np.ndarray, np.float32, np.random.Generator, torch.Tensor, torch.Size]
)
def test_types_that_are_stored_anyhow_cannot_be_registered(cls: type) -> None:
    with pytest.raises(BadArgumentError, match="can be stored as it is"):
        register_type(cls, encode=repr, decode=repr)


def test_register_type_gives_the_class_back_in_all_its_forms() -> None:
    @register_type
    @dataclass
    class First:
        a: int

    @register_type(name="tests.second")
    @dataclass
    class Second:
        a: int

    @dataclass
    class Third:
        a: Any

    assert register_type(Third, name="tests.third") is Third
    value = Third([First(1), Second(2)])
    assert again(OBJECT_CODEC, value) == value
    assert b"test_register_type_gives_the_class_back_in_all_its_forms.<locals>.First" in OBJECT_CODEC.encode(value)


WITHOUT_TORCH = """
import sys
from dataclasses import dataclass
import giantstep as gs
from giantstep.codecs import OBJECT_CODEC

@gs.register_type
@dataclass
class Config:
    lr: float

assert OBJECT_CODEC.decode(OBJECT_CODEC.encode([Config(0.5)]), "x") == [Config(0.5)]
assert "torch" not in sys.modules
"""


def test_registering_a_type_does_not_import_torch() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], check=True, timeout=120)


class SlowDict(dict[Any, Any]):
    """Other threads come between looking and adding."""

    def get(self, key: Any, default: Any = None) -> Any:
        found = super().get(key, default)
        time.sleep(0.001)
        return found


def test_many_threads_registering_one_name_get_one_class(registry: TypeRegistry) -> None:
    registry._by_name = SlowDict()
    classes = [type("C", (), {}) for _ in range(8)]
    added: list[type] = []
    start = threading.Barrier(len(classes))

    def add(cls: type) -> None:
        start.wait()
        try:
            registry.register(cls, "C", repr, repr)
            added.append(cls)
        except BadArgumentError:
            pass

    threads = [threading.Thread(target=add, args=(cls,)) for cls in classes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(added) == 1
    assert [cls for cls in classes if registry.has_class(cls)] == added


# Failures of the user's functions.


def test_failures_of_encode_name_the_path(registry: TypeRegistry, codec: Codec) -> None:
    registry.register(Tokenizer, None, lambda value: value.nothing, Tokenizer)
    with pytest.raises(UnsupportedTypeError, match=r"object at 'a\.0' has the registered type 'Tokenizer'.*AttributeError"):
        codec.encode({"a": [Tokenizer({})]})


def test_what_encode_gives_must_be_storable(registry: TypeRegistry, codec: Codec) -> None:
    registry.register(Tokenizer, None, lambda value: {"f": value.vocabulary}, Tokenizer)
    with pytest.raises(UnsupportedTypeError, match=r"object at 'a\.f\.x' has type"):
        codec.encode({"a": Tokenizer({"x": Plain()})})  # type: ignore[dict-item]
    registry.register(Custom, None, lambda value: value, lambda plain: plain)
    with pytest.raises(BadArgumentError, match="contains itself"):
        codec.encode(Custom(size=1))


def test_a_dataclass_without_one_of_its_values_is_refused(registry: TypeRegistry, codec: Codec) -> None:
    registry.register(Schedule, None, None, None)
    broken = Schedule(1)
    del broken.milestones
    with pytest.raises(UnsupportedTypeError, match="milestones"):
        codec.encode(broken)


# Through a checkpoint.

WRITE = """
import enum, sys
from dataclasses import dataclass
import torch
import giantstep as gs
from giantstep.codecs import register_type

@register_type(name="job.Config")
@dataclass
class Config:
    lr: float

class Colour(enum.Enum):
    RED = 1

gs.save({"w": torch.zeros(2), "config": Config(0.5), "colour": [Colour.RED]}, sys.argv[1])
assert gs.load({"w": torch.ones(2)}, sys.argv[1])["config"] == Config(0.5)
"""


def test_a_checkpoint_of_unknown_types_can_be_looked_at_but_not_loaded(tmp_path: Path) -> None:
    program = tmp_path / "job.py"
    program.write_text(WRITE)
    subprocess.run([sys.executable, str(program), str(tmp_path / "c")], check=True, timeout=120)
    found = gs.open_checkpoint(tmp_path / "c")
    assert type(found.common["config"]) is Unregistered
    assert found.common["config"].value == {"lr": 0.5}
    assert repr(found.object("common_state")["colour"]) == "[<unregistered __main__:Colour.RED: 1>]"
    tensor = torch.ones(2)
    with pytest.raises(UnsupportedTypeError, match=r"'job\.Config'"):
        gs.load({"w": tensor}, tmp_path / "c")
    assert tensor.tolist() == [1, 1]
    shown = subprocess.run(
        [sys.executable, "-m", "giantstep.cli.main", "show", str(tmp_path / "c"), "common_state"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr
    assert "<unregistered job.Config: {'lr': 0.5}>" in shown.stdout
    assert "<unregistered __main__:Colour.RED: 1>" in shown.stdout


def test_generators_of_devices_that_are_not_here_are_kept_or_refused() -> None:
    state = OBJECT_CODEC.encode(torch.Generator())
    for device in (b"hpu", b"npu"):
        text = state.replace(b'["cpu"', b'["' + device + b'"')
        with pytest.raises(UnsupportedTypeError, match="on a machine with devices of the type"):
            OBJECT_CODEC.decode(text, "x")
        found = OBJECT_CODEC.decode(text, "x", unknown="keep")
        assert (found.name, found.value[0], found.value[1].shape) == ("torch.Generator", device.decode(), (5056,))


def test_errors_are_all_of_one_tree() -> None:
    assert issubclass(UnsupportedTypeError, GiantstepError)


def test_counters_are_registered_from_the_start_and_older_readers_are_told_the_name(codec: Codec) -> None:
    data = codec.encode(Counter("aab"))
    assert data == encoded_text(b'{"$":"registered","v":["collections.Counter",{"$":"dict","v":[["a",2],["b",1]]}]}')
    found = again(codec, [Counter("aab")])[0]
    assert type(found) is Counter
    assert list(found.elements()) == ["a", "a", "b"]
    # A reader that has not been told what a name means.
    unknown = data.replace(b"collections.Counter", b"collections.Xounter")
    with pytest.raises(UnsupportedTypeError, match=r"'collections\.Xounter', which is unknown here"):
        codec.decode(unknown, "x")
    assert codec.decode(unknown, "x", unknown="keep").value == {"a": 2, "b": 1}


@pytest.mark.parametrize("plain", [["a", "b"], "ab", 3, None])
def test_a_stored_counter_that_is_no_dict_is_refused(codec: Codec, plain: Any) -> None:
    with pytest.raises(UnsupportedTypeError, match=r"'collections\.Counter'.*expected a dict"):
        codec.decode(encoded({"$": "registered", "v": ["collections.Counter", plain]}), "x")


def test_counters_may_be_registered_otherwise_and_are_read_under_both_names(registry: TypeRegistry, codec: Codec) -> None:
    before = codec.encode(Counter("aab"))
    registry.register(Counter, "my.Counter", lambda value: list(value.elements()), Counter)
    after = codec.encode(Counter("aab"))
    assert b"my.Counter" in after
    assert codec.decode(before, "x") == codec.decode(after, "x") == Counter("aab")
    with pytest.raises(BadArgumentError, match="is registered already"):
        registry.register(Tokenizer, "collections.Counter", vars, Tokenizer)
