"""Every type that the object codec supports comes back as it was: its type, its order, every bit of it."""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import decimal
import io
import pathlib
import random
import struct
import types
import uuid
from typing import Any

import numpy as np
import pytest
import torch

from exactness import same
from giantstep.codecs import OBJECT_CODEC
from giantstep.errors import CorruptionError, UnsupportedTypeError
from giantstep.format.codec import MAGIC, TensorSlot


def bits(pattern: int) -> float:
    return float(struct.unpack("<d", struct.pack("<Q", pattern))[0])


def again(value: Any) -> Any:
    return OBJECT_CODEC.decode(OBJECT_CODEC.encode(value), "x")


NAN, SIGNALING = bits(0xFFF8_DEAD_BEEF_0001), bits(0x7FF0_0000_0000_0001)
FLOATS = [0.0, -0.0, 1.5, 5e-324, -2.2250738585072014e-308, 1.7976931348623157e308, float("inf"), -float("inf"), NAN, SIGNALING]
WEST = dt.timezone(dt.timedelta(hours=-7, minutes=-30, microseconds=-5))
VALUES: dict[str, list[Any]] = {
    "None": [None],
    "bool": [True, False],
    "int": [0, -1, 2**53, -(2**53), 2**53 + 1, -(2**53) - 1, 2**64, 10**400, -(10**6000), 1 << 200_000],
    "float": FLOATS,
    "complex": [complex(a, b) for a in FLOATS for b in FLOATS],
    "str": ["", "a\nb", "\x00", "é€𝄞", "\ud800 alone", "\udc00\ud800", "x\ud800\udc00𐀀", '"$"', "\u2028\ufeff"],
    "bytes": [b"", b"\x00\xff" * 10],
    "bytearray": [bytearray(), bytearray(b"ab\x00")],
    "list": [[], [[], [1, [2.5]]]],
    "tuple": [(), (1,), ((), [()])],
    "dict": [
        {},
        {"b": 1, "a": 2},
        {1: "int", "1": "str", (1, "x"): None, None: b"", False: {}, b"k": 2.5},
        {"$": "dict", "v": []},
    ],
    "set": [set(), {1, 2, (3, "x")}, {"a", b"a", None, 2.5, frozenset({1})}],
    "frozenset": [frozenset(), frozenset({frozenset({frozenset()}), 1})],
    "OrderedDict": [collections.OrderedDict(), collections.OrderedDict([("z", 1), ("a", collections.OrderedDict(x=1))])],
    "Counter": [
        collections.Counter(),
        collections.Counter("abca"),
        collections.Counter({"z": -1, (2, "x"): 2.5, None: 0, "a": 2**70}),
    ],
    "deque": [
        collections.deque(),
        collections.deque([1, [2], (3,)]),
        collections.deque([5, 6], maxlen=2),
        collections.deque(maxlen=0),
        collections.deque([1], maxlen=2**63 - 1),
    ],
    "Namespace": [argparse.Namespace(), argparse.Namespace(lr=0.1, layers=[1, 2], nested=argparse.Namespace(a=1))],
    "SimpleNamespace": [types.SimpleNamespace(a={"b": (1,)})],
    "range": [range(0), range(1, 10**30, 7), range(5, -5, -2)],
    "slice": [slice(None), slice(None, 3, (1, 2)), slice(-(10**20), None, 2)],
    "datetime": [
        dt.datetime.min,
        dt.datetime.max,
        dt.datetime(2026, 10, 25, 2, 30, fold=1),
        dt.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=WEST),
        dt.datetime(2026, 1, 2, tzinfo=dt.UTC),
        dt.datetime(2026, 1, 2, fold=1, tzinfo=dt.timezone(dt.timedelta(hours=1), "CET")),
    ],
    "time": [
        dt.time.min,
        dt.time.max,
        dt.time(2, 30, fold=1),
        dt.time(23, 59, 59, 999_999, tzinfo=WEST),
        dt.time(1, tzinfo=dt.timezone(dt.timedelta(hours=1), "CET")),
    ],
    "date": [dt.date.min, dt.date.max, dt.date(2026, 11, 23)],
    "timedelta": [dt.timedelta.min, dt.timedelta.max, dt.timedelta(-1, 5, 7)],
    "Path": [pathlib.Path("a/b"), pathlib.Path("/"), pathlib.Path(), pathlib.Path("//x/y"), pathlib.Path("\udcff")],
    "PurePosixPath": [pathlib.PurePosixPath("/x/../y"), pathlib.PurePosixPath()],
    "PureWindowsPath": [
        pathlib.PureWindowsPath("C:\\a b\\c"),
        pathlib.PureWindowsPath("//host/share/x"),
        pathlib.PureWindowsPath(),
    ],
    "UUID": [uuid.UUID(int=0), uuid.UUID(int=2**128 - 1), uuid.UUID("12345678-1234-5678-1234-567812345678")],
    "Decimal": [
        decimal.Decimal(text)
        for text in ("0", "-0.00", "1.10", "1E+3", "-1E-999999", "NaN123", "-sNaN7", "Infinity", "-Infinity", "9" * 5000)
    ],
    "BytesIO": [io.BytesIO(), io.BytesIO(b"\x00content")],
    "random.getstate()": [random.getstate()],
    "tensor slot": [[TensorSlot("a.b"), 1]],
    "ndarray": [
        np.array(3.5),
        np.zeros((0, 4), dtype=np.complex128),
        np.arange(6, dtype="<i4").reshape(2, 3).T,
        np.array([bits(0xFFF8_DEAD_BEEF_0001), -0.0, SIGNALING]),
        np.array([0x7FA0_0001, 0xFFC1_2345], dtype=np.uint32).view(np.float32),
        np.array([0x7D01, 0xFE01], dtype=np.uint16).view(np.float16),
        np.array([True, False]),
        np.array([complex(-0.0, NAN)]),
        np.arange(20, dtype=np.uint64)[::-3],
    ],
    "NumPy scalar": [
        *(kind(1) for kind in (np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32)),
        *(kind(-1.5) for kind in (np.float16, np.float32, np.float64, np.complex64, np.complex128)),
        np.uint64(2**64 - 1),
        np.array([0x7FA0_0001], dtype=np.uint32).view(np.float32)[0],
        np.float64(SIGNALING),
        np.complex128(complex(NAN, -0.0)),
    ],
    "np.random.get_state()": [np.random.RandomState(3).get_state(), np.random.RandomState(3).get_state(legacy=False)],
    "torch.dtype": [torch.bfloat16, torch.float8_e4m3fn, torch.bool],
    "torch.device": [torch.device("cpu"), torch.device("cuda"), torch.device("cuda:3"), torch.device("meta")],
    "torch.Size": [torch.Size([]), torch.Size([2, 0, 3])],
    "torch.Tensor": [
        torch.get_rng_state(),
        torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
        torch.tensor([NAN, -0.0, SIGNALING], dtype=torch.float64),
        torch.tensor(1 + 2j).conj(),
        torch.empty(0, 3),
        torch.tensor(7),
        torch.zeros(3, dtype=torch.float8_e5m2),
    ],
}


@pytest.mark.parametrize(
    "value", [pytest.param(value, id=f"{name}-{n}") for name, values in VALUES.items() for n, value in enumerate(values)]
)
def test_every_type_comes_back_as_it_was(value: Any) -> None:
    assert same(again(value), value)
    assert same(again([{"k": (value, 1)}]), [{"k": (value, 1)}])
    assert OBJECT_CODEC.encode(again(value)) == OBJECT_CODEC.encode(value)


def test_comparing_notices_what_it_must() -> None:
    assert not same(0.0, -0.0)
    assert not same(NAN, SIGNALING)
    assert not same([1], [True])
    assert not same({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert not same(collections.deque([1], 2), collections.deque([1], 3))
    assert not same(torch.Generator().manual_seed(1), torch.Generator().manual_seed(2))


def test_a_file_in_memory_is_stored_whole_and_comes_back_at_its_beginning() -> None:
    file = io.BytesIO(b"0123456789")
    file.seek(4)
    found = again(file)
    assert (type(found), found.tell(), found.read()) == (io.BytesIO, 0, b"0123456789")
    assert file.tell() == 4
    file.close()
    with pytest.raises(UnsupportedTypeError, match="'a' is closed"):
        OBJECT_CODEC.encode({"a": file})


def test_decimals_do_not_depend_on_the_context() -> None:
    value = decimal.Decimal("-1.2345678901234567890123456789012345E+5000")
    plain = OBJECT_CODEC.encode(value)
    with decimal.localcontext(decimal.Context(prec=3, capitals=0, Emax=10, Emin=-10, traps=[])):
        assert OBJECT_CODEC.encode(value) == plain
        assert again(value).as_tuple() == value.as_tuple()
        text = b'{"$":"decimal","v":"none"}'
        with pytest.raises(CorruptionError):
            OBJECT_CODEC.decode(MAGIC + struct.pack("<Q", len(text)) + text, "x")
        assert not any(decimal.getcontext().flags.values())


BIT_GENERATORS = ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"]


@pytest.mark.parametrize("name", BIT_GENERATORS)
@pytest.mark.parametrize("seed", [5, [1, 2**70], np.array([3, 4], dtype=np.uint32), None])
def test_numpy_generators_go_on_where_they_were(name: str, seed: Any) -> None:
    generator = np.random.Generator(getattr(np.random, name)(seed))
    generator.standard_normal(7)
    generator.integers(0, 9, dtype=np.uint32)
    generator.spawn(2)
    found = again({"rng": generator})["rng"]
    assert type(found) is np.random.Generator
    assert type(found.bit_generator) is type(generator.bit_generator)
    assert found.random(1000).tobytes() == generator.random(1000).tobytes()
    assert found.integers(0, 9, 99, dtype=np.uint32).tolist() == generator.integers(0, 9, 99, dtype=np.uint32).tolist()
    children = zip(found.spawn(3), generator.spawn(3), strict=True)
    assert all(mine.random() == theirs.random() for mine, theirs in children)


@pytest.mark.parametrize("name", BIT_GENERATORS)
def test_numpy_random_states_go_on_where_they_were(name: str) -> None:
    state = np.random.RandomState(getattr(np.random, name)(5))
    state.standard_normal(3)
    found = again(state)
    assert same(found, state)
    assert found.standard_normal(700).tobytes() == state.standard_normal(700).tobytes()
    legacy = np.random.RandomState(5)
    assert again(legacy).random_sample(700).tobytes() == legacy.random_sample(700).tobytes()


def test_the_states_of_the_global_generators_can_be_set_again() -> None:
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        drawn = random.gauss(0, 1), np.random.rand(), torch.rand(1).item()
        python, numpy, of_torch = again(kept)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(of_torch)
        assert drawn == (random.gauss(0, 1), np.random.rand(), torch.rand(1).item())
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


@pytest.mark.parametrize("drawn", [0, 1, 623, 624, 625, 2000])
def test_torch_generators_go_on_where_they_were(drawn: int) -> None:
    generator = torch.Generator().manual_seed(11)
    torch.rand(drawn, generator=generator)
    torch.randn(3, generator=generator)
    found = again([generator])[0]
    assert type(found) is torch.Generator
    assert found.device == torch.device("cpu")
    assert torch.equal(torch.rand(999, generator=found), torch.rand(999, generator=generator))
    assert torch.equal(torch.randn(99, generator=found), torch.randn(99, generator=generator))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_generators_of_a_device_come_back_on_it() -> None:
    generator = torch.Generator("cuda").manual_seed(11)
    torch.rand(5, generator=generator, device="cuda")
    found = again([generator])[0]
    assert found.device.type == "cuda"
    assert torch.equal(torch.rand(99, generator=found, device="cuda"), torch.rand(99, generator=generator, device="cuda"))


class OtherSequence(np.random.SeedSequence):
    pass


class OtherGenerator(np.random.PCG64):
    pass


@pytest.mark.parametrize(
    "value",
    [
        dt.datetime(2026, 1, 1, tzinfo=type("Zone", (dt.tzinfo,), {"utcoffset": lambda *a: dt.timedelta(0)})()),
        np.random.Generator(np.random.PCG64(OtherSequence(5))),
        np.random.Generator(OtherGenerator(5)),
        np.random.Generator(np.random.PCG64(np.random.SeedSequence(5, pool_size=1000))),
        np.array([None]),
        np.array(["text"]),
        np.zeros(2, dtype=np.longdouble),
        np.zeros(2, dtype=[("a", "<f4")]),
        np.zeros((0, 2**60), dtype=np.int8),
        torch.Size([2**60]),
        torch.zeros(2, device="meta"),
        torch.zeros(2).to_sparse(),
        torch.zeros(0, 2**60),
        torch.quint8,
        type("SubCounter", (collections.Counter,), {})("aab"),
        collections.defaultdict(list),
        type("Sub", (dict,), {})(),
        np.longlong(3),
        memoryview(b"a"),
        pathlib.Path("\ud800\udc00"),
        TensorSlot("\ud800\udc00"),
        dt.time(1, tzinfo=dt.timezone(dt.timedelta(hours=1), "\ud800\udc00")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_not_come_back_as_it_was_is_refused_with_its_path(value: Any) -> None:
    with pytest.raises(UnsupportedTypeError, match=r"'a\.1'"):
        OBJECT_CODEC.encode({"a": [0, value]})
