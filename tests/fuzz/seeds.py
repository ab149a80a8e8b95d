"""The small valid checkpoint from which every mutant is made, and values of every kind that objects can hold.

The same bytes on every run. Called by `mutations`, `run_atheris` and the tests.
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import io
import itertools
import math
import pathlib
import re
import types
import uuid
from collections import OrderedDict, deque
from copy import deepcopy
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import torch

from giantstep.codecs import OBJECT_CODEC, register_type
from giantstep.format.codec import TensorSlot
from giantstep.shards.dtypes import BY_NAME
from giantstep.shards.region import Region

from .draft import SAVE_ID, Chunk, Draft, StoredObject, Tensor, container_header, encode_header
from .json_tree import plain
from .wrapper import DESCRIPTION, KEY


@dataclass(frozen=True)
class Schedule:
    """A type of a user's."""

    warmup: int
    peaks: tuple[int, float]


register_type(Schedule, name="fuzz.Schedule")

# Key, dtype, shape, and where it is cut along which axes.
TENSORS: tuple[tuple[str, str, list[int], list[list[int]]], ...] = (
    ("bf16", "BF16", [3, 2], [[0, 3], [0, 2]]),
    ("bool", "BOOL", [5], [[0, 5]]),
    ("c128", "C128", [2], [[0, 1, 2]]),
    ("c32", "C32", [2, 2], [[0, 2], [0, 2]]),
    ("cube", "F32", [2, 3, 4], [[0, 1, 2], [0, 3], [0, 1, 4]]),
    ("empty", "F32", [0, 3], []),
    ("f4", "F4X2", [4], [[0, 4]]),
    ("f8", "F8_E4M3", [4], [[0, 4]]),
    (f"{KEY}.data", "I8", [6, 4], [[0, 3, 6], [0, 4]]),
    (f"{KEY}.scale", "F32", [6, 1], [[0, 6], [0, 1]]),
    ("scalar", "F64", [], []),
    ("w", "I16", [6, 4], [[0, 2, 3, 6], [0, 4]]),
)
SMALL_KEYS = ("c128", "cube", "empty", "scalar", "tied", "w")
# A tensor that is stored as another one.
TIED = ("tied", "w")
KEYS = (*sorted((*(key for key, *_ in TENSORS), TIED[0])),)

PLAIN_VALUES: dict[str, Any] = {
    "plain": [None, True, -(2**53), 0.25, "text", "\ud800\udc00", [], {}],
    "numbers": [2**80, float("nan"), float("-inf"), complex(0.0, float("inf"))],
    "bytes": [b"attached", bytearray(b"too"), b"", io.BytesIO(b"file")],
    "containers": [(1, (2,)), deque([1, 2], 3), {3, 4}, frozenset({"a"}), {None: 1, (1, b"k"): 2}, OrderedDict(z=1, a=2)],
    "namespaces": [argparse.Namespace(lr=0.1), types.SimpleNamespace(a=[1])],
    "paths": [pathlib.Path("a/b"), pathlib.PurePosixPath("/c"), pathlib.PureWindowsPath("C:/d")],
    "texts": [uuid.UUID(int=7), Decimal("1.50"), Decimal("NaN"), uuid.SafeUUID.safe, re.RegexFlag.A | re.RegexFlag.I],
    "registered": [Schedule(3, (1, 2.5))],
    "times": [
        dt.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=dt.timezone(dt.timedelta(hours=-7))),
        dt.datetime(2026, 1, 2, tzinfo=dt.timezone(dt.timedelta(0), "Z")),
        dt.time(3, 4, fold=1),
        dt.date(2026, 1, 2),
        dt.timedelta(days=-1, microseconds=5),
    ],
    "ranges": [range(1, 10**30, 7), slice(None, 3, (1, 2))],
    "arrays": [np.arange(6, dtype="<i4").reshape(2, 3), np.zeros((0, 4), dtype=np.complex128), np.array(True)],
    "scalars": [
        kind(1)
        for kind in (
            *(np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
            *(np.float16, np.float32, np.float64, np.complex64, np.complex128),
        )
    ],
}
TORCH_VALUES: dict[str, Any] = {
    "torch": [torch.bfloat16, torch.device("cuda:3"), torch.Size([2, 3])],
    "tensors": [torch.arange(4, dtype=torch.bfloat16), torch.empty(0, 3), torch.tensor(1.5)],
    "generators": [np.random.Generator(np.random.Philox(1)), np.random.RandomState(1), torch.Generator().manual_seed(1)],
}
# Sharded objects, and the description of a wrapper tensor.
OBJECTS: dict[str, Any] = {
    "rng/shard_0_2": {"position": 0},
    "rng/shard_1_2": [b"position", 1],
    f"{KEY}/wrapper": DESCRIPTION,
}


def common_state() -> dict[str, Any]:
    """A common state with a value of every kind."""
    return {**PLAIN_VALUES, **TORCH_VALUES, "layers": [TensorSlot("layers.0"), 3], "step": 7}


@functools.cache
def encoded_objects() -> dict[str, bytes]:
    """Encoded objects by key: the common state, and each group of values on its own."""
    groups = {key: {key: values} for key, values in (*PLAIN_VALUES.items(), *TORCH_VALUES.items())}
    values = {**groups, **OBJECTS, "common_state": common_state()}
    return {key: OBJECT_CODEC.encode(value) for key, value in sorted(values.items())}


def _regions(shape: list[int], cuts: list[list[int]]) -> list[Region]:
    """The grid that the cuts make; one region for a tensor without dimensions, none for an empty one."""
    if not all(shape):
        return []
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for axis in cuts:
        spans = [(low, high - low) for low, high in itertools.pairwise(axis)]
        boxes = [((*offset, low), (*size, count)) for offset, size in boxes for low, count in spans]
    return [Region(offset, size) for offset, size in boxes]


def _pattern(count: int, seed: int) -> bytes:
    return bytes((place * 37 + seed * 11) % 256 for place in range(count))


@functools.cache
def _built() -> Draft:
    draft = Draft([], [], [], content_metadata=plain({"é": [None, 1.5], "tokens": 10}))
    entries: list[list[tuple[str, str, list[int], bytes]]] = [[], []]
    places: list[tuple[int, int, Any]] = []
    for number, (key, name, shape, cuts) in enumerate(TENSORS):
        dtype, row = BY_NAME[name], Tensor(key.encode(), BY_NAME[name].code, list(shape), [])
        draft.tensors.append(row)
        for turn, region in enumerate(_regions(shape, cuts)):
            count = math.prod(region.size) * dtype.item_bytes
            data = bytes(count) if name == "BOOL" else _pattern(count, number + turn)
            chunk = Chunk((number + turn) % 2, 0, count, list(region.offset), list(region.size))
            row.chunks.append(chunk)
            places.append((chunk.file, len(entries[chunk.file]), chunk))
            stored = list(dtype.container_shape(region.size))
            entries[chunk.file].append((f"{key}{region}", dtype.container, stored, data))
    home = next(row for row in draft.tensors if row.key == TIED[1].encode())
    draft.tensors.append(Tensor(TIED[0].encode(), home.dtype, home.shape, home.chunks))
    draft.tensors.sort(key=lambda row: row.key)
    for key, data in encoded_objects().items():
        held = StoredObject(key.encode(), 0, 0, len(data))
        draft.objects.append(held)
        places.append((0, len(entries[0]), held))
        entries[0].append((f"{{{key}}}", "U8", [len(data)], data))
    for file, group in enumerate(entries):
        metadata = {"format": "giantstep", "save_id": SAVE_ID, "rank": str(file)}
        tree = container_header([(name, kind, shape, len(data)) for name, kind, shape, data in group], metadata)
        content = bytearray(encode_header(tree[0]))
        starts = []
        for *_, data in group:
            starts.append(len(content))
            content += data
        draft.files.append(content)
        for place, position, row_of in places:
            if place == file:
                row_of.start = starts[position]
    return draft


def seed_draft() -> Draft:
    """A new copy of the valid checkpoint."""
    return deepcopy(_built())


def small_draft() -> Draft:
    """A new copy of less of it, which is read faster."""
    draft = seed_draft()
    draft.tensors = [row for row in draft.tensors if row.key.decode() in SMALL_KEYS]
    draft.objects = [row for row in draft.objects if row.key in (b"bytes", b"containers", b"rng/shard_0_2", b"rng/shard_1_2")]
    draft.objects[1].key = b"common_state"
    return draft
