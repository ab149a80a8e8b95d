"""Queries, keys and values in one weight: any order and any number of ranks loads what another has saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import giantstep as gs
from giantstep.errors import BadArgumentError
from giantstep.fused import Heads, qkv
from giantstep.testing import check_coverage, round_trip
from unsharded import Attention, attentions, flat_cuts

ORDERS = st.sampled_from(["grouped", "blocks"])


def described(sizes: Attention, tensor: torch.Tensor, order: Any, rank: int, ranks: int, replica: int = 0) -> Any:
    heads = Heads(sizes.query, sizes.groups, sizes.size, sizes.value_size, order)
    return qkv("attention.qkv", tensor, heads, rank, ranks, replica_id=replica)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), sizes=attentions(), before=ORDERS, after=ORDERS, copies=st.integers(1, 2))
def test_heads_come_back_in_any_order_on_any_number_of_ranks(
    data: st.DataObject, sizes: Attention, before: str, after: str, copies: int
) -> None:
    saving, loading = (data.draw(st.sampled_from(sizes.rank_counts())) for _ in range(2))
    weight, moment = sizes.heads(1), sizes.heads(500)
    states = []
    for replica in range(copies):
        for rank in range(saving):
            first = described(sizes, sizes.local(weight, rank, saving, before), before, rank, saving, replica)
            moments = replace(first, key="exp_avg.qkv", data=sizes.local(moment, rank, saving, before))
            states.append({"w": first, "m": moments})
    targets = []
    for rank in range(loading):
        first = described(sizes, torch.zeros_like(sizes.local(weight, rank, loading, after)), after, rank, loading)
        targets.append({"w": first, "m": replace(first, key="exp_avg.qkv", data=torch.zeros_like(first.data))})
    for rank, loaded in enumerate(round_trip(states, targets)):
        assert torch.equal(loaded["w"], sizes.local(weight, rank, loading, after))
        assert torch.equal(loaded["m"], sizes.local(moment, rank, loading, after))
    # Models that do not fuse them load each by itself.
    apart = {name: torch.zeros_like(torch.cat(heads)) for name, heads in weight.items()}
    named = {name: gs.ShardedTensor.from_rank_offsets(f"attention.qkv.{name}", part) for name, part in apart.items()}
    round_trip(states, [named], strict=gs.StrictHandling.RAISE_UNEXPECTED)
    assert all(torch.equal(apart[name], torch.cat(heads)) for name, heads in weight.items())


@settings(max_examples=40, deadline=None)
@given(data=st.data(), sizes=attentions(), before=ORDERS, after=ORDERS)
def test_flat_ranges_of_heads_load_as_any_other_ranges(data: st.DataObject, sizes: Attention, before: str, after: str) -> None:
    saving, loading = (data.draw(st.sampled_from(sizes.rank_counts())) for _ in range(2))
    weight = sizes.heads()

    def states(ranks: int, order: str, *, zero: bool) -> list[dict[str, Any]]:
        found = []
        for rank in range(ranks):
            local = sizes.local(weight, rank, ranks, order)
            factory = described(sizes, local, order, rank, ranks)
            for flat in data.draw(flat_cuts(local.numel())):
                part = local.reshape(-1)[flat].clone()
                found.append({"w": replace(factory, data=part * 0 if zero else part, flattened_range=flat)})
        return found

    loaded = round_trip(states(saving, before, zero=False), states(loading, after, zero=True))
    expected = [sizes.local(weight, rank, loading, after).reshape(-1) for rank in range(loading)]
    assert torch.equal(torch.cat([state["w"] for state in loaded]), torch.cat(expected))


def test_copied_key_and_value_heads_are_stored_once() -> None:
    """4 query heads in 2 groups on 4 ranks: each key head is on two of them, of which the first is the main replica."""
    sizes = Attention(groups=2, queries_per_group=2, size=2, value_size=2, hidden=3)
    heads = sizes.heads()
    states = [{"w": described(sizes, sizes.local(heads, rank, 4, "grouped"), "grouped", rank, 4)} for rank in range(4)]
    found = check_coverage(states)
    assert (found.tensors, found.replicas, found.bytes) == (3, 4, (4 + 2 + 2) * 2 * 3 * 4)
    held = [states[rank]["w"].build() for rank in range(4)]
    assert [{shard.key[-1]: shard.replica_id for shard in shards.values()} for shards in held] == [
        {"q": 0, "k": 0, "v": 0},
        {"q": 0, "k": (0, 1), "v": (0, 1)},
    ] * 2


def test_each_projection_is_found_in_the_checkpoint(tmp_path: Path) -> None:
    sizes = Attention(groups=2, queries_per_group=3, size=2, value_size=2, hidden=4)
    heads = sizes.heads()
    gs.save({"w": described(sizes, sizes.local(heads, 0, 1, "grouped"), "grouped", 0, 1)}, tmp_path)
    checkpoint = gs.open_checkpoint(tmp_path)
    assert checkpoint.keys() == ["attention.qkv.k", "attention.qkv.q", "attention.qkv.v"]
    assert torch.equal(torch.from_numpy(checkpoint["attention.qkv.q"][6:10]), torch.cat(heads["q"][3:5]))


@pytest.mark.parametrize(
    ("heads", "length", "rank", "ranks", "message"),
    [
        ((8, 2, 4), 10, 0, 2, "have 24 elements each, but there are 10 locally"),
        ((8, 2, 4), 10, 0, 3, "8 query heads in 2 groups cannot be divided among 3 ranks"),
        ((12, 4, 1), 10, 0, 6, "12 query heads in 4 groups cannot be divided among 6 ranks"),
        ((8, 2, 4), 24, 2, 2, "index 2 must be from 0 to 1"),
    ],
)
def test_heads_that_do_not_fit_are_refused(
    heads: tuple[int, int, int], length: int, rank: int, ranks: int, message: str
) -> None:
    with pytest.raises(BadArgumentError, match=message):
        qkv("w", torch.zeros(length, 2), Heads(*heads), rank, ranks)


@pytest.mark.parametrize("arguments", [(8, 3, 4), (0, 1, 4), (8, 2, 0), (8, 2, 4, 0), (8, 2, 4, 4, "mixed")])
def test_heads_that_cannot_be_are_refused(arguments: Any) -> None:
    with pytest.raises(BadArgumentError, match="Heads"):
        Heads(*arguments)
