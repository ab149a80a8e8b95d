"""The object codec: what goes in comes out, nothing else ever does."""

from __future__ import annotations

import argparse
import datetime as dt
import pathlib
import struct
import types
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from giantstep.codecs import OBJECT_CODEC
from giantstep.errors import BadArgumentError, CorruptionError, GiantstepError, UnsupportedTypeError
from giantstep.format.codec import MAGIC, Codec, Kind
from giantstep.format.kinds import BASE_CODEC


def same(a: Any, b: Any) -> bool:
    """Equal, of equal types, floats to the bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(k, j) and same(v, w) for (k, v), (j, w) in zip(a.items(), b.items(), strict=True))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return bool(a == b)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(allow_nan=False),
    st.text(),
    st.binary(),
    st.datetimes(),
    st.dates(),
    st.timedeltas(),
)
KEYS = st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.binary(), st.tuples(st.integers(), st.text()))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4).map(OrderedDict),
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(VALUES)
def test_values_come_back_equal_with_their_types(value: Any) -> None:
    assert same(BASE_CODEC.decode(BASE_CODEC.encode(value), "x"), value)


@pytest.mark.parametrize(
    "value",
    [
        10**400,
        -(2**53) - 1,
        float("inf"),
        -0.0,
        5e-324,
        bytearray(b"ab"),
        {1, 2, (3, "x")},
        frozenset({"a"}),
        pathlib.Path("a/b"),
        pathlib.PurePosixPath("/x"),
        range(1, 10**30, 7),
        slice(None, 3, (1, 2)),
        np.float32(1.5),
        np.bool_(True),
        np.uint64(2**64 - 1),
        np.arange(6, dtype=">i4").reshape(2, 3).T.astype("<i4"),
        np.array(3.5),
        np.zeros((0, 4), dtype=np.complex128),
        dt.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=dt.timezone(dt.timedelta(hours=-7))),
        "lone surrogate \ud800",
        {"$": "dict", "v": []},
        argparse.Namespace(lr=0.1, layers=[1, 2]),
        types.SimpleNamespace(a={"b": (1,)}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_particular_values(value: Any) -> None:
    assert same(BASE_CODEC.decode(BASE_CODEC.encode(value), "x"), value)


def test_nan_keeps_its_payload() -> None:
    odd = struct.unpack("<d", struct.pack("<Q", 0x7FF8DEADBEEF0001))[0]
    assert same(BASE_CODEC.decode(BASE_CODEC.encode([odd, complex(odd, 1)]), "x")[0], odd)


@pytest.mark.parametrize(
    "value",
    [
        torch.bfloat16,
        torch.device("cuda:3"),
        torch.Size([2, 3]),
        {"rng": torch.get_rng_state()},
        {"t": torch.arange(4, dtype=torch.bfloat16)},
        torch.empty(0, 3),
    ],
)
def test_values_of_torch(value: Any) -> None:
    found = OBJECT_CODEC.decode(OBJECT_CODEC.encode({"v": value}), "x")["v"]
    if isinstance(value, dict):
        (key,) = value
        assert torch.equal(found[key], value[key])
        assert found[key].dtype == value[key].dtype
    elif isinstance(value, torch.Tensor):
        assert found.shape == value.shape
    else:
        assert type(found) is type(value)
        assert found == value


def test_equal_sets_have_equal_bytes() -> None:
    assert BASE_CODEC.encode({"b", "a", "c"}) == BASE_CODEC.encode({"c", "b", "a"})


@pytest.mark.parametrize(
    "data",
    [
        MAGIC + struct.pack("<Q", len(text)) + text
        for text in (
            b'{"$":"torch.device","v":"bogus"}',
            b'{"$":"torch.dtype","v":"int9"}',
            b'{"$":"torch.Size","v":["x"]}',
            b'{"$":"torch.Tensor","v":["float32",[0,4611686018427387904,4611686018427387904],[0,0]]}',
        )
    ],
)
def test_hostile_values_of_torch_are_corruption(data: bytes) -> None:
    with pytest.raises(CorruptionError):
        OBJECT_CODEC.decode(data, "x")


def test_threads_that_meet_new_kinds_at_once_all_find_them() -> None:
    import threading
    import time

    def more() -> list[Kind]:
        time.sleep(0.1)
        return [Kind("custom", Custom, lambda v, w, p: None, lambda j, r: Custom())]

    codec = Codec([], more)
    failures: list[Exception] = []

    def encode() -> None:
        try:
            codec.encode(Custom())
        except UnsupportedTypeError as error:
            failures.append(error)

    threads = [threading.Thread(target=encode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


class Custom:
    pass


class MyInt(int):
    pass


@pytest.mark.parametrize("value", [Custom(), Custom, MyInt(3), len, np.array([None]), np.dtype("f4"), st])
def test_unknown_types_fail_with_path_type_and_remedy(value: Any) -> None:
    with pytest.raises(UnsupportedTypeError, match=r"at 'a\.1\.b' has"):
        BASE_CODEC.encode({"a": [0, {"b": value}]})


def test_too_deep_and_circular_values_fail() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(BadArgumentError, match="contains itself"):
        BASE_CODEC.encode(value)


def test_a_kind_can_be_added_once() -> None:
    kind = Kind("custom", Custom, lambda v, w, p: None, lambda j, r: Custom())
    codec = Codec([kind])
    assert isinstance(codec.decode(codec.encode(Custom()), "x"), Custom)
    with pytest.raises(BadArgumentError, match="registered twice"):
        Codec([kind, kind])


def encoded(text: bytes, attachments: bytes = b"", size: int | None = None) -> bytes:
    return MAGIC + struct.pack("<Q", len(text) if size is None else size) + text + attachments


@pytest.mark.parametrize(
    "data",
    [
        b"",
        MAGIC,
        b"x" * 40,
        encoded(b"1", size=2**63),
        encoded(b"{"),
        encoded(b"[1,"),
        encoded(b'{"a":1}'),
        encoded(b'{"$":"os.system","v":"true"}'),
        encoded(b'{"$":["list"],"v":1}'),
        encoded(b'{"$":"bytes","v":[0,5]}', b"abc"),
        encoded(b'{"$":"bytes","v":[-1,1]}', b"abc"),
        encoded(b'{"$":"bytes","v":[0,true]}', b"abc"),
        encoded(b'{"$":"bytes","v":null}'),
        encoded(b'{"$":"int","v":"zz"}'),
        encoded(b'{"$":"int","v":3}'),
        encoded(b'{"$":"float","v":"00"}'),
        encoded(b'{"$":"dict","v":[[1,2],[1,3]]}'),
        encoded(b'{"$":"dict","v":[[[],2]]}'),
        encoded(b'{"$":"dict","v":[[1]]}'),
        encoded(b'{"$":"ndarray","v":["O",[1],[0,8]]}', b"12345678"),
        encoded(b'{"$":"ndarray","v":["<f8",[1099511627776],[0,8]]}', b"12345678"),
        encoded(b'{"$":"ndarray","v":["(9,)f8",[1],[0,72]]}', b"1" * 72),
        encoded(b'{"$":"ndarray","v":["<f8",[-1,-1],[0,8]]}', b"12345678"),
        encoded(b'{"$":"datetime","v":"yesterday"}'),
        encoded(b'{"$":"timedelta","v":[1e999,0,0]}'),
        encoded(b'{"$":"set","v":[[1]]}'),
        encoded(b'{"$":"range","v":["0x0","0x1","0x0"]}'),
        encoded(b"[" * 100_000 + b"]" * 100_000),
        encoded(b'{"$":"tuple","v":[' * 300 + b"]}" * 300),
        encoded(b'"\xff"'),
        encoded(b'{"$":"ndarray","v":["(1,,)f8",[1],[0,8]]}', b"12345678"),
        encoded(b'[{"$":"bytes","v":[0,3]},{"$":"bytes","v":[0,3]}]', b"abc"),
    ],
    ids=lambda data: repr(data[:60]),
)
def test_hostile_bytes_are_corruption_and_nothing_else(data: bytes) -> None:
    with pytest.raises(CorruptionError):
        BASE_CODEC.decode(data, "x")


@settings(max_examples=500)
@given(VALUES, st.integers(0, 10_000), st.integers(0, 255))
def test_changed_bytes_decode_to_a_value_or_raise_corruption(value: Any, position: int, byte: int) -> None:
    data = bytearray(BASE_CODEC.encode(value))
    data[position % len(data)] = byte
    try:
        BASE_CODEC.decode(bytes(data), "x")
    except GiantstepError as error:
        assert isinstance(error, CorruptionError)  # noqa: PT017
