"""Any value goes into an object and comes out as it was; any bytes give a value or an error of ours, and run nothing."""

from __future__ import annotations

import collections
import datetime as dt
import decimal
import enum
import json
import pathlib
import struct
import sys
import types
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exactness import same
from giantstep.codecs import OBJECT_CODEC, register_type
from giantstep.errors import CorruptionError, UnsupportedTypeError
from giantstep.format.codec import MAGIC

RAN: list[Any] = []


class Colour(enum.Enum):
    RED = 1

    @classmethod
    def _missing_(cls, value: object) -> Any:
        RAN.append(value)


class Access(enum.Flag):
    READ = 1
    WRITE = 2


@register_type(name="properties.Node")
@dataclass
class Node:
    child: Any
    name: str = ""


def encoded(text: bytes, attachments: bytes = b"") -> bytes:
    return MAGIC + struct.pack("<Q", len(text)) + text + attachments


ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**600), 2**600),
    st.floats(),
    st.integers(0, 2**64 - 1).map(lambda pattern: struct.unpack("<d", struct.pack("<Q", pattern))[0]),
    st.complex_numbers(),
    st.text(),
    st.text(st.characters(categories=["Cs", "Lu"])),
    st.binary(),
    st.datetimes(timezones=st.sampled_from([dt.UTC, dt.timezone(dt.timedelta(hours=3, microseconds=7))])),
    st.times(),
    st.dates(),
    st.timedeltas(),
    st.uuids(),
    st.decimals(),
    st.sampled_from([Colour.RED, Access.READ, Access.READ | Access.WRITE, Access(0)]),
    st.builds(range, st.integers(), st.integers(), st.integers(min_value=1)),
    st.text("abc/.", max_size=6).map(pathlib.PurePosixPath),
    st.integers(0, 2**64 - 1).map(np.uint64),
    st.floats(width=32).map(np.float32),
)
# Decimals that signal cannot be hashed.
HASHABLE = ATOMS.filter(lambda value: not (isinstance(value, decimal.Decimal) and value.is_snan()))
KEYS = st.one_of(HASHABLE, st.tuples(HASHABLE, HASHABLE), st.frozensets(st.integers(), max_size=3))


def grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    some = st.lists(inner, max_size=4)
    return st.one_of(
        some,
        some.map(tuple),
        some.map(collections.deque),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4).map(collections.OrderedDict),
        st.sets(KEYS, max_size=4),
        st.dictionaries(st.text(max_size=4), inner, max_size=4).map(lambda fields: types.SimpleNamespace(**fields)),
        st.builds(Node, inner, st.text(max_size=3)),
        st.binary().map(bytearray),
        st.binary(max_size=64).map(lambda data: np.frombuffer(data[: len(data) // 4 * 4], dtype=np.float32)),
        st.binary(min_size=1, max_size=64).map(lambda data: torch.frombuffer(bytearray(data), dtype=torch.uint8)),
    )


VALUES = st.recursive(ATOMS, grown, max_leaves=12)


@settings(max_examples=400, deadline=None)
@given(VALUES)
def test_all_values_come_back_as_they_were(value: Any) -> None:
    data = OBJECT_CODEC.encode(value)
    found = OBJECT_CODEC.decode(data, "x")
    assert same(found, value)
    assert OBJECT_CODEC.encode(found) == data


def try_to_decode(data: bytes) -> None:
    """Decode, or fail as is allowed; without importing anything or making what is not registered."""
    modules = len(sys.modules)
    RAN.clear()
    for unknown in ("raise", "keep"):
        try:
            OBJECT_CODEC.decode(data, "x", unknown=unknown)  # type: ignore[arg-type]
        except (CorruptionError, UnsupportedTypeError):
            continue
    assert len(sys.modules) == modules
    assert RAN == []


@settings(max_examples=400, deadline=None)
@given(VALUES, st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=4))
def test_changed_bytes_give_a_value_or_an_error_of_ours(value: Any, edits: list[tuple[int, bytes, int]]) -> None:
    data = bytearray(OBJECT_CODEC.encode(value))
    for position, new, removed in edits:
        at = position % (len(data) + 1)
        data[at : at + removed] = new
    try_to_decode(bytes(data))


def fields(payload: Any) -> Any:
    return {"$": "dict", "v": [["child", payload]]}


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 2**54), st.floats(), st.text("0x:az-", max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.builds(lambda tag, payload: {"$": tag, "v": payload}, st.sampled_from(sorted(OBJECT_CODEC.tags())), inner),
        st.builds(lambda name, value: {"$": "enum", "v": [f"{__name__}:Colour", name, value]}, inner, inner),
        st.builds(lambda payload: {"$": "registered", "v": ["properties.Node", fields(payload)]}, inner),
    ),
    max_leaves=10,
)


@settings(max_examples=600, deadline=None)
@given(JSON, st.binary(max_size=40))
def test_any_json_under_the_tags_gives_a_value_or_an_error_of_ours(json_value: Any, attachments: bytes) -> None:
    try_to_decode(encoded(json.dumps(json_value).encode("ascii"), attachments))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_give_a_value_or_an_error_of_ours(data: bytes) -> None:
    try_to_decode(data)
    try_to_decode(encoded(data))
