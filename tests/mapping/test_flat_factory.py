"""Ranges of flattened fused tensors: whatever a factory makes of the tensor, each part has its elements of the range."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import giantstep as gs
from giantstep.errors import BadArgumentError
from giantstep.mapping.flat_factory import FlatFactory
from giantstep.mapping.sharded_object import LocalNonpersistentObject
from giantstep.storage.memory import MemoryStore


def halves(key: str, data: torch.Tensor, replica_id: Any, _: Any) -> Any:
    return {n: gs.ShardedTensor.from_rank_offsets(f"{key}.{n}", part) for n, part in enumerate(data.chunk(2))}


def columns(key: str, data: torch.Tensor, replica_id: Any, _: Any) -> Any:
    return [gs.ShardedTensor.from_rank_offsets(f"{key}.{n}", part.t()) for n, part in enumerate(data.split([1, 3, 2], dim=1))]


def experts(key: str, data: torch.Tensor, replica_id: Any, _: Any) -> Any:
    """Stacked experts, each stored as one of a grid and turned; a factory in a factory."""

    def each(key: str, data: torch.Tensor, replica_id: Any, _: Any) -> Any:
        return [
            gs.ShardedTensor.from_rank_offsets(key, part.t(), (0, n, 2), prepend_axis_num=1)
            for n, part in enumerate(data.view(2, -1, 6))
        ]

    return gs.ShardedTensorFactory(key, data, each, lambda parts: parts)


def without_padding(key: str, data: torch.Tensor, replica_id: Any, _: Any) -> Any:
    return gs.ShardedTensor.from_rank_offsets(key, data[:3])


@pytest.mark.parametrize("build", [halves, columns, experts, without_padding])
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 24), max_size=4))
def test_ranges_of_a_fused_tensor_are_stored_as_the_whole_is(build: Any, cuts: list[int]) -> None:
    whole = torch.arange(24.0).view(4, 6)
    bounds = [0, *sorted(cuts), 24]
    ranges = [slice(low, high) for low, high in itertools.pairwise(bounds)]
    parts = [FlatFactory("w", whole.flatten()[flat].clone(), build, lambda tree: tree, 0, flat, (4, 6)) for flat in ranges]
    store, plain = MemoryStore("flat-factory"), MemoryStore("whole-factory")
    gs.save({"parts": parts}, store)
    gs.save({"whole": gs.ShardedTensorFactory("w", whole, build, lambda tree: tree)}, plain)
    found, expected = gs.open_checkpoint(store), gs.open_checkpoint(plain)
    assert found.keys() == expected.keys()
    assert all((found[key][...] == expected[key][...]).all() for key in expected.keys())  # noqa: SIM118 - it is no dict
    stored = whole.clone()
    if build is without_padding:
        stored[3:] = -1
    for meta in (False, True):
        device = "meta" if meta else "cpu"
        targets = [
            FlatFactory(
                "w", torch.full((flat.stop - flat.start,), -1.0, device=device), build, lambda tree: tree, 0, flat, (4, 6)
            )
            for flat in ranges
        ]
        loaded = gs.load({"parts": targets}, plain)["parts"]
        for flat, target, result in zip(ranges, targets, loaded, strict=True):
            kept = slice(flat.start, min(flat.stop, 18)) if build is without_padding and meta else flat
            count = max(0, kept.stop - kept.start)
            assert torch.equal(result[:count], stored.flatten()[flat][:count])
            assert meta or result is target.data
    store.clear()
    plain.clear()


def test_a_range_of_which_nothing_is_stored_leaves_no_trace() -> None:
    factory = FlatFactory("w", torch.zeros(6), without_padding, lambda tree: tree, 0, slice(18, 24), (4, 6))
    assert isinstance(factory.build(), LocalNonpersistentObject)


def copied(key: str, data: torch.Tensor, replica_id: Any, _: Any) -> Any:
    return gs.ShardedTensor.from_rank_offsets(key, data.clone())


def expanded(key: str, data: torch.Tensor, replica_id: Any, _: Any) -> Any:
    return gs.ShardedTensor.from_rank_offsets(key, data[:1].expand(4, 6))


def an_object(key: str, data: torch.Tensor, replica_id: Any, _: Any) -> Any:
    return {"shape": data.shape}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (copied, "made tensor 'w' of a copy"),
        (expanded, "elements that repeat"),
        (an_object, "returned a value of type Size"),
    ],
)
def test_what_is_no_view_cannot_be_cut_and_is_refused(build: Any, message: str) -> None:
    with pytest.raises(BadArgumentError, match=message):
        FlatFactory("w", torch.zeros(6), build, lambda tree: tree, 0, slice(0, 6), (4, 6)).build()


@pytest.mark.parametrize(
    ("data", "flat"),
    [
        (torch.zeros(6), None),
        (torch.zeros(6), slice(19, 25)),
        (torch.zeros(5), slice(0, 6)),
        (torch.zeros(12)[::2], slice(0, 6)),
        (torch.zeros(2, 3), slice(0, 6)),
    ],
)
def test_data_and_range_must_fit(data: torch.Tensor, flat: slice | None) -> None:
    with pytest.raises(BadArgumentError, match="factory 'w'"):
        FlatFactory("w", data, halves, lambda tree: tree, 0, flat, (4, 6))
