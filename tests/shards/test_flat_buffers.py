"""Which elements of which parameters each rank owns: counted one by one."""

from __future__ import annotations

import math
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from giantstep.errors import BadArgumentError
from giantstep.shards.bucketing import BucketRules, lay_out, lay_out_whole
from giantstep.shards.flat_buffers import Bucket, FlatLayout, FlatParameter


@st.composite
def parameters(draw: st.DrawFn) -> list[FlatParameter]:
    """Some, of two dtypes, 0-d and empty ones among them."""
    shapes = draw(st.lists(st.lists(st.integers(0, 6), max_size=3), max_size=9))
    dtypes = [draw(st.sampled_from(("float32", "bfloat16"))) for _ in shapes]
    return [FlatParameter(f"p{n}", tuple(shape), dtype) for n, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))]


@st.composite
def rules(draw: st.DrawFn) -> BucketRules:
    """Any."""
    return BucketRules(
        max_elements=draw(st.none() | st.integers(1, 60)),
        parameter_alignment=draw(st.integers(1, 9)),
        bucket_alignment=draw(st.integers(1, 9)),
        even=draw(st.booleans()),
    )


def check_ownership(layout: FlatLayout, given_parameters: list[FlatParameter]) -> None:
    assert sorted(layout.parameters, key=lambda one: one.name) == given_parameters
    owners: dict[tuple[str, int], int] = {}
    named = set()
    places = set()
    for rank in range(layout.ranks):
        for owned in layout.owned(rank):
            named.add(owned.parameter.name)
            bucket = layout.buckets[owned.bucket]
            begin = bucket.starts[bucket.parameters.index(owned.parameter)]
            low, high = bucket.range_of(rank)
            assert owned.start < owned.stop or not owned.parameter.elements
            for element in range(owned.start, owned.stop):
                assert owners.setdefault((owned.parameter.name, element), rank) == rank
                place = low + owned.at + element - owned.start
                assert place == begin + element
                assert low <= place < high
                assert (owned.bucket, place) not in places
                places.add((owned.bucket, place))
    assert len(owners) == sum(one.elements for one in given_parameters)
    assert named == {one.name for one in given_parameters}


@given(parameters(), rules(), st.integers(1, 7))
def test_each_element_is_owned_by_one_rank_and_lies_where_the_bucket_says(
    given_parameters: list[FlatParameter], bucket_rules: BucketRules, ranks: int
) -> None:
    layout = lay_out(given_parameters, ranks, bucket_rules)
    check_ownership(layout, given_parameters)
    for bucket in layout.buckets:
        lengths = [high - low for low, high in map(bucket.range_of, range(ranks))]
        assert max(lengths) - min(lengths) <= (0 if bucket_rules.even else 1)
        assert bucket.elements % bucket_rules.bucket_alignment == 0
        assert all(start % bucket_rules.parameter_alignment == 0 for start in bucket.starts)
        reached = bucket.starts[-1] + bucket.parameters[-1].elements
        assert len(bucket.parameters) == 1 or bucket_rules.max_elements is None or reached <= bucket_rules.max_elements
        step = math.lcm(ranks, bucket_rules.bucket_alignment) if bucket_rules.even else bucket_rules.bucket_alignment
        assert bucket.elements - reached < step


@given(parameters(), st.integers(1, 5), st.data())
def test_whole_parameters_have_the_owner_they_were_given(
    given_parameters: list[FlatParameter], ranks: int, data: st.DataObject
) -> None:
    owner = {one.name: data.draw(st.integers(0, ranks - 1)) for one in given_parameters}
    layout = lay_out_whole(given_parameters, ranks, owner)
    check_ownership(layout, given_parameters)
    for rank in range(ranks):
        for owned in layout.owned(rank):
            assert owned.stop - owned.start == owned.parameter.elements
            assert not owned.parameter.elements or owner[owned.parameter.name] == rank
    assert not any(bucket.padding for bucket in layout.buckets)


@given(parameters(), rules(), st.integers(1, 5))
def test_a_packed_layout_is_unpacked(given_parameters: list[FlatParameter], bucket_rules: BucketRules, ranks: int) -> None:
    layout = lay_out(given_parameters, ranks, bucket_rules)
    assert FlatLayout.unpacked(layout.packed) == layout


@pytest.mark.parametrize("data", [b"", b"no", zlib.compress(b"[1, [[2]]]"), zlib.compress(b"[" * 100_000), zlib.compress(b'"')])
def test_data_that_are_no_layout_are_an_error_of_value_or_type(data: bytes) -> None:
    with pytest.raises((ValueError, TypeError)):
        FlatLayout.unpacked(data)


def test_parameters_of_one_dtype_keep_their_order_and_those_alone_get_a_bucket() -> None:
    listed = [FlatParameter(name, (4,), dtype) for name, dtype in zip("abcde", ("float32", "bfloat16") * 3, strict=False)]
    layout = lay_out(listed, 2, BucketRules(alone=frozenset({"c"})))
    assert [[one.name for one in bucket.parameters] for bucket in layout.buckets] == [["a"], ["c"], ["e"], ["b", "d"]]


W, B = FlatParameter("w", (4, 3), "float32"), FlatParameter("b", (3,), "float32")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FlatParameter("", (1,), "float32"), "name ''"),
        (lambda: FlatParameter("w", (-1,), "float32"), "parameter 'w'"),
        (lambda: FlatParameter("w", (1,), "torch.float32"), r"dtype 'torch.float32' .*removeprefix"),
        (lambda: Bucket((), (), 0, (0, 0)), "needs parameters"),
        (lambda: Bucket((W, B), (0, 11), 20, (0, 20)), "parameter 'b' begins at element 11, before the one before it ends"),
        (lambda: Bucket((W, B), (0,), 20, (0, 20)), "2 parameters have 1 starts"),
        (lambda: Bucket((W, B), (0, 12), 14, (0, 14)), "has 14 elements, its parameters reach to 15"),
        (lambda: Bucket((W,), (0,), 12, (0, 7, 5, 12)), "must rise from 0 to the 12 elements"),
        (lambda: Bucket((W,), (0,), 12, (0, 11)), "must rise from 0 to the 12 elements"),
        (lambda: Bucket((W, FlatParameter("h", (1,), "float16")), (0, 12), 13, (0, 13)), "dtypes float32 and float16"),
        (lambda: FlatLayout((Bucket((W,), (0,), 12, (0, 12)),), 2), "is cut for 1 ranks, the layout is of 2"),
        (lambda: FlatLayout((Bucket((W,), (0,), 12, (0, 12)),) * 2, 1), "'w' lies twice"),
        (lambda: lay_out([W], 0), "ranks 0"),
        (lambda: lay_out(["w"], 1), "must be FlatParameters, not str"),  # type: ignore[list-item]
        (lambda: lay_out([W], 1, {}), "must be BucketRules, not dict"),  # type: ignore[arg-type]
        (lambda: lay_out([W, W], 1), "'w' lies twice"),
        (lambda: lay_out([W], 1, BucketRules(alone=frozenset({"v"}))), "alone names 'v'"),
        (lambda: BucketRules(max_elements=0), "max_elements 0"),
        (lambda: BucketRules(parameter_alignment=0), "parameter_alignment 0"),
        (lambda: BucketRules(alone="w"), "frozenset of names"),  # type: ignore[arg-type]
        (lambda: lay_out_whole([W], 2, {}), "parameter 'w': owner None"),
        (lambda: lay_out_whole([W], 2, {"w": 2}), "parameter 'w': owner 2"),
        (lambda: lay_out([W], 2).owned(2), "rank 2 must be an int from 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused_and_named(call: Any, message: str) -> None:
    with pytest.raises(BadArgumentError, match=message):
        call()
