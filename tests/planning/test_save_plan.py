"""Who writes what: once, balanced, whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from giantstep.planning.balance import Regions, _quotas, balance
from giantstep.planning.description import COPY, IMPLICIT, MAIN, Description, decode_descriptions
from giantstep.planning.reuse import all_as_before, fingerprint, token
from giantstep.planning.save_plan import SavePlan, plan_save
from giantstep.planning.shard_table import tabulate
from giantstep.planning.write_part import WritePart, cut_regions
from giantstep.shards.region import Region

F32 = 12


def description(shards: Sequence[tuple[str, tuple[int, ...], Region, int]]) -> Description:
    """One rank's description from (key, global shape, region, role)."""
    keys = list(dict.fromkeys(key for key, *_ in shards))
    shapes = {key: shape for key, shape, *_ in shards}
    return Description(
        keys=keys,
        dtype=np.full(len(keys), F32, dtype=np.uint8),
        dims_ends=np.cumsum([0, *(len(shapes[key]) for key in keys)]),
        dims=np.array([size for key in keys for size in shapes[key]], dtype=np.int64),
        shard_tensor=np.array([keys.index(key) for key, *_ in shards], dtype=np.int64),
        shard_role=np.array([role for *_, role in shards], dtype=np.uint8),
        shard_mesh=np.ones(len(shards), dtype=np.int64),
        shard_offset=np.array([n for _, _, region, _ in shards for n in region.offset], dtype=np.int64),
        shard_size=np.array([n for _, _, region, _ in shards for n in region.size], dtype=np.int64),
        shard_digest=np.zeros((len(shards), 2), dtype=np.uint64),
        tied=np.arange(len(keys)),
        object_keys=[],
        object_role=np.zeros(0, dtype=np.uint8),
        object_digest=np.zeros((0, 2), dtype=np.uint64),
        object_bytes=np.zeros(0, dtype=np.int64),
    )


def as_gathered(descriptions: Sequence[Description]) -> list[Description]:
    """What rank 0 decodes from everybody's messages, in which equal parts are one object."""
    kept: dict[bytes, bytes] = {}
    return decode_descriptions([tuple(kept.setdefault(part, part) for part in found.encode()) for found in descriptions])


def plan(descriptions: Sequence[Description], split_bytes: int = 1 << 20, max_chunk_bytes: int = 1 << 60) -> SavePlan:
    decoded = as_gathered(descriptions)
    return plan_save(decoded, split_bytes=split_bytes, max_chunk_bytes=max_chunk_bytes)


def bytes_per_rank(found: SavePlan, ranks: int) -> list[int]:
    return np.bincount(found.writer, weights=found.bytes, minlength=ranks).astype(int).tolist()


def imbalance(found: SavePlan, ranks: int) -> float:
    loads = bytes_per_rank(found, ranks)
    return max(loads) / (sum(loads) / ranks)


def test_data_parallel_replicas_are_written_once_in_equal_shares() -> None:
    """Eight ranks hold everything: one huge embedding, 100 layers of unequal size."""
    shapes = {"embedding": (50_000, 512), **{f"layer{n}": (64 + 32 * (n % 7), 512) for n in range(100)}}
    state = [(key, shape, Region.whole(shape), IMPLICIT) for key, shape in shapes.items()]
    found = plan([description(state)] * 8)
    assert sum(bytes_per_rank(found, 8)) == sum(math.prod(shape) * 4 for shape in shapes.values())
    assert imbalance(found, 8) <= 1.05


def test_tensor_parallel_times_data_parallel_is_balanced() -> None:
    """TP 4 x DP 8: shards on all DP ranks, norms on all ranks."""
    descriptions = []
    for rank in range(32):
        tp, dp = rank % 4, rank // 4
        shards = [(f"layer{n}", (4096, 512), Region((1024 * tp, 0), (1024, 512)), MAIN if dp == 0 else COPY) for n in range(20)]
        shards += [(f"norm{n}", (512,), Region.whole((512,)), MAIN if rank == 0 else COPY) for n in range(40)]
        descriptions.append(description(shards))
    found = plan(descriptions)
    assert imbalance(found, 32) <= 1.05
    for row in range(len(found.tensor)):
        if found.keys[found.tensor[row]].startswith("layer"):
            assert found.offset[row, 0] // 1024 == found.writer[row] % 4


def test_who_holds_more_of_its_own_writes_less_of_what_is_shared() -> None:
    """Rank 0 has 40 MiB of its own, rank 1 has 8; 32 MiB are on both."""
    own = [(f"own{rank}", (mib, 1 << 18), Region.whole((mib, 1 << 18)), MAIN) for rank, mib in ((0, 40), (1, 8))]
    shared = ("shared", (32, 1 << 18), Region.whole((32, 1 << 18)), IMPLICIT)
    found = plan([description([own[0], shared]), description([own[1], shared])])
    assert bytes_per_rank(found, 2) == [40 << 20, 40 << 20]


def test_small_replicas_are_not_divided() -> None:
    state = [(f"w{n}", (100,), Region.whole((100,)), IMPLICIT) for n in range(10)]
    found = plan([description(state)] * 4)
    assert len(found.tensor) == 10
    assert max(bytes_per_rank(found, 4)) <= 3 * 400


def test_chunks_larger_than_allowed_are_divided_along_any_dimension() -> None:
    found = plan([description([("w", (1, 7, 100), Region.whole((1, 7, 100)), MAIN)])], max_chunk_bytes=160)
    assert int(found.bytes.max()) <= 160
    assert int(found.bytes.sum()) == 2800
    assert found.offset[:3].tolist() == [[0, 0, 0], [0, 0, 40], [0, 0, 80]]


def test_each_rank_gets_its_part_and_finds_its_regions_in_it() -> None:
    shards = [("a", (6, 5), Region((0, 0), (6, 5)), IMPLICIT), ("s", (), Region((), ()), IMPLICIT)]
    descriptions = [description(shards)] * 3
    found = plan(descriptions, split_bytes=1)
    parts, chunks = found.parts(as_gathered(descriptions)), found.chunks_by_writer()
    total = 0
    for rank in range(3):
        part = WritePart.decode(parts[rank].encode())
        cuts = dict(zip(part.cut.tolist(), cut_regions(part, descriptions[rank]), strict=True))
        assert len(part.row) == len(chunks[rank])
        for chunk, row in enumerate(part.row.tolist()):
            region = cuts.get(chunk, shards[row][2])
            assert region.fits(shards[row][1])
            total += region.elements
    assert total == 31


def test_nothing_and_empty_tensors_can_be_planned() -> None:
    assert len(plan([description([])] * 3).tensor) == 0
    found = plan([description([("e", (0, 3), Region((0, 0), (0, 3)), MAIN)]), description([])])
    assert found.keys == ["e"]
    assert len(found.tensor) == 0


@settings(max_examples=200)
@given(
    st.integers(1, 6),
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 50), st.lists(st.integers(0, 5), min_size=1, unique=True)), max_size=12
    ),
    st.integers(1, 60),
)
def test_shares_partition_all_slices_and_level_the_loads(
    ranks: int, drawn: list[tuple[int, int, list[int]]], split_bytes: int
) -> None:
    groups = [(slices, size, sorted({rank % ranks for rank in holders})) for slices, size, holders in drawn]
    distinct = sorted({tuple(holders) for *_, holders in groups})
    sets = [np.array(holders, dtype=np.int64) for holders in distinct]
    set_of = np.array([distinct.index(tuple(holders)) for *_, holders in groups], dtype=np.int64)
    regions = Regions(
        np.array([slices for slices, *_ in groups], dtype=np.int64), np.array([size for _, size, _ in groups], dtype=np.int64)
    )
    shares = balance(regions, sets, set_of, ranks, split_bytes)
    taken: dict[int, list[int]] = {}
    for group, rank, first, count in zip(
        *(column.tolist() for column in (shares.group, shares.rank, shares.first, shares.count)), strict=True
    ):
        assert rank in groups[group][2]
        assert count > 0
        taken.setdefault(group, []).extend(range(first, first + count))
    assert {group: sorted(found) for group, found in taken.items()} == {
        number: list(range(slices)) for number, (slices, *_) in enumerate(groups)
    }
    if groups and all(len(holders) == ranks for *_, holders in groups) and split_bytes == 1:
        loads = np.zeros(ranks)
        np.add.at(loads, shares.rank, shares.count * regions.slice_bytes[shares.group])
        assert loads.max() - loads.min() <= 2 * max(size for _, size, _ in groups)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8), st.integers(1, 5000))
def test_quotas_level_the_lowest_loads(loads: list[int], total: int) -> None:
    quotas = _quotas(np.array(loads, dtype=np.int64), total)
    assert int(quotas.sum()) == total
    assert int(quotas.min()) >= 0
    filled = np.array(loads) + quotas
    level = filled[quotas > 0].max()
    assert (filled[quotas == 0] >= level - 1).all()
    assert filled[quotas > 0].min() >= level - 1


@pytest.mark.parametrize("ranks", [64, 256])
def test_a_thousand_tensors_on_many_ranks_are_planned_and_balanced(ranks: int) -> None:
    """Shards, replicas and a dominating embedding on an HSDP-like grid of two replicas."""
    half = ranks // 2
    descriptions = []
    for rank in range(ranks):
        row = rank % half
        shards = [
            (f"w{n:04d}", (half * 4, 64), Region((row * 4, 0), (4, 64)), MAIN if rank < half else COPY) for n in range(900)
        ]
        shards += [(f"n{n:04d}", (256,), Region.whole((256,)), IMPLICIT) for n in range(99)]
        shards.append(("embedding", (32_000, 256), Region.whole((32_000, 256)), IMPLICIT))
        descriptions.append(description(shards))
    found = plan_save(descriptions, split_bytes=1 << 10, max_chunk_bytes=1 << 60)
    assert imbalance(found, ranks) <= 1.05


@pytest.mark.parametrize("shape", [(2, 300_001), (3, 5, 40_000), (1, 7, 1, 99_991), (600_000,), (5000, 130)])
@pytest.mark.parametrize("ranks", [3, 8, 64])
def test_one_tensor_of_any_shape_is_divided_into_equal_shares(shape: tuple[int, ...], ranks: int) -> None:
    found = plan([description([("w", shape, Region.whole(shape), IMPLICIT)])] * ranks)
    assert imbalance(found, ranks) <= 1.05
    assert (found.offset + found.size <= found.shape[found.tensor]).all()
    assert int(found.bytes.sum()) == 4 * math.prod(shape)
    # Every element once.
    covered = np.zeros(shape, dtype=np.int8)
    for offset, size in zip(found.offset.tolist(), found.size.tolist(), strict=True):
        covered[tuple(slice(first, first + count) for first, count in zip(offset, size, strict=True))] += 1
    assert (covered == 1).all()


def _mixed(rank: int, ranks: int) -> Description:
    """A tensor-parallel weight with replicas, a replicated one, a shard of all ranks, one of this rank's pipeline stage."""
    tp, dp = rank % 2, rank // 2
    shards = [
        ("tp", (64, 512), Region((tp * 32, 0), (32, 512)), MAIN if dp == 0 else COPY),
        ("dp", (300, 512), Region.whole((300, 512)), IMPLICIT),
        ("fsdp", (ranks * 8, 512), Region((rank * 8, 0), (8, 512)), IMPLICIT),
        (f"stage{rank % 4 // 2}", (100, 512), Region.whole((100, 512)), IMPLICIT),
    ]
    return description(shards)


@pytest.mark.parametrize("ranks", [4, 8, 32])
def test_a_mixed_layout_is_balanced(ranks: int) -> None:
    found = plan([_mixed(rank, ranks) for rank in range(ranks)])
    assert imbalance(found, ranks) <= 1.05


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.data())
def test_ranks_that_say_the_same_are_planned_as_if_each_had_said_it_alone(ranks: int, data: st.DataObject) -> None:
    """What is stored is the same whether equal descriptions are one object or many."""
    kinds = [
        [("a", (12, 5), Region((0, 0), (6, 5)), MAIN), ("s", (), Region((), ()), IMPLICIT)],
        [("a", (12, 5), Region((6, 0), (6, 5)), COPY), ("s", (), Region((), ()), IMPLICIT)],
        [("a", (12, 5), Region((0, 0), (6, 5)), COPY), ("b", (70, 1000), Region.whole((70, 1000)), IMPLICIT)],
        [("b", (70, 1000), Region.whole((70, 1000)), IMPLICIT), ("s", (), Region((), ()), IMPLICIT)],
    ]
    main = [("a", (12, 5), Region((6, 0), (6, 5)), MAIN)]
    drawn = [kinds[0], main, *(data.draw(st.sampled_from(kinds[1:])) for _ in range(ranks))]
    apart = [description(shards) for shards in drawn]
    one = plan_save(apart, split_bytes=1 << 20, max_chunk_bytes=1 << 60)
    other = plan_save(as_gathered(apart), split_bytes=1 << 20, max_chunk_bytes=1 << 60)
    assert one.keys == other.keys
    for found in (one, other):
        stored = np.zeros(len(found.keys), dtype=np.int64)
        np.add.at(stored, found.tensor, found.bytes)
        assert stored.tolist() == [4 * math.prod(shape) for shape in found.shape.tolist()]
        columns = (found.tensor, found.offset, found.size, found.writer, found.source_row, found.whole)
        for tensor, offset, size, writer, row, whole in zip(*(column.tolist() for column in columns), strict=True):
            key, shape, region, role = drawn[writer][row]
            chunk = Region(tuple(offset[2 - len(shape) :]), tuple(size[2 - len(shape) :]))
            assert key == found.keys[tensor]
            assert role != COPY or key == "a"
            assert chunk.intersect(region) == chunk
            assert whole == (chunk == region)
    decoded = SavePlan.decode(other.encode())
    for name in ("dtype", "ndim", "shape", "tied", "tensor", "offset", "size", "bytes", "writer", "source_row", "whole"):
        assert getattr(decoded, name).tolist() == getattr(other, name).tolist(), name
    assert (decoded.keys, decoded.ranks, decoded.objects.keys) == (other.keys, other.ranks, other.objects.keys)


def test_ranks_that_differ_in_their_objects_alone_are_planned_as_one_class() -> None:
    """Each rank has random number generators of its own: that must not cost the planner its classes of equal tensors."""
    shards = [("w", (64, 8), Region.whole((64, 8)), IMPLICIT)]
    own = [
        replace(
            description(shards),
            object_keys=[f"rng/shard_{rank}_4"],
            object_role=np.zeros(1, np.uint8),
            object_digest=np.full((1, 2), rank + 1, np.uint64),
            object_bytes=np.full(1, 10),
        )
        for rank in range(4)
    ]
    table = tabulate(as_gathered(own))
    assert [ranks.tolist() for ranks in table.ranks] == [[0, 1, 2, 3]]
    found = plan(own)
    assert found.objects.writer.tolist() == [0, 1, 2, 3]
    assert not found.objects.differs.any()


def test_holders_that_overlap_without_being_nested_are_levelled_too() -> None:
    """A grid of ranks: some tensors are sharded over its rows and replicated along them, others the other way round."""
    side, descriptions = 4, []
    for rank in range(side * side):
        i, j = divmod(rank, side)
        shards = []
        for n in range(4):
            shards.append((f"rows{n}", (512 * side, 512), Region((512 * i, 0), (512, 512)), IMPLICIT))
            shards.append((f"columns{n}", (512 * side, 512), Region((512 * j, 0), (512, 512)), IMPLICIT))
        descriptions.append(description(shards))
    assert imbalance(plan(descriptions), side * side) <= 1.05


@pytest.mark.parametrize("sets", [[(0, 1), (1, 2)], [(0, 1, 2, 3), (2, 3, 4, 5), (4, 5, 6, 7)], [(0, 1, 2), (0, 3), (1, 3)]])
def test_chains_of_holders_are_levelled(sets: list[tuple[int, ...]]) -> None:
    ranks = 1 + max(max(held) for held in sets)
    shape = (1000, 1000)
    found = plan(
        [
            description([(f"t{n}", shape, Region.whole(shape), IMPLICIT) for n, held in enumerate(sets) if rank in held])
            for rank in range(ranks)
        ]
    )
    assert imbalance(found, ranks) <= 1.05


def test_small_tensors_are_divided_where_shares_are_small_too() -> None:
    shapes = {f"t{n}": (63, 256) for n in range(25)}
    state = [(key, shape, Region.whole(shape), IMPLICIT) for key, shape in shapes.items()]
    assert imbalance(plan([description(state)] * 8), 8) <= 1.05


def test_ranks_that_write_large_objects_write_less_of_the_tensors() -> None:
    state = description([("w", (2048, 1024), Region.whole((2048, 1024)), IMPLICIT)])
    objects = replace(
        state,
        object_keys=["common_state"],
        object_role=np.full(1, IMPLICIT, np.uint8),
        object_digest=np.ones((1, 2), np.uint64),
        object_bytes=np.full(1, 1 << 20),
    )
    found = plan([objects] * 8)
    loads = np.array(bytes_per_rank(found, 8)) + np.bincount(found.objects.writer, found.objects.bytes, minlength=8)
    assert loads.max() <= 1.05 * loads.mean()


def test_main_replicas_in_different_cells_are_written_in_their_cells() -> None:
    whole = Region.whole((64, 1024))
    descriptions = [
        description([(key, whole.size, whole, MAIN if rank == main else COPY) for main, key in enumerate("ab")])
        for rank in range(2)
    ]
    found = plan_save(as_gathered(descriptions), split_bytes=1, max_chunk_bytes=1 << 60, cells=np.array([0, 1]))
    assert {(found.keys[tensor], rank) for tensor, rank in zip(found.tensor, found.writer.tolist(), strict=True)} == {
        ("a", 0),
        ("b", 1),
    }


def test_copies_that_begin_where_main_replicas_do_but_are_larger_are_not_taken_for_them() -> None:
    found = plan(
        [
            description([("a", (4,), Region((0,), (2,)), MAIN), ("a", (4,), Region((2,), (2,)), MAIN)]),
            description([("a", (4,), Region((0,), (4,)), COPY), ("b", (1,), Region((0,), (1,)), MAIN)]),
        ]
    )
    assert int(found.bytes.sum()) == 20
    assert found.writer.tolist() == [0, 0, 1]


_DESCRIBED = replace(
    description([("a", (4, 6), Region((0, 0), (2, 6)), MAIN), ("b", (2, 12), Region.whole((2, 12)), IMPLICIT)]),
    object_keys=["o", "p"],
    object_role=np.array([MAIN, COPY], np.uint8),
    object_digest=np.zeros((2, 2), np.uint64),
    object_bytes=np.zeros(2, np.int64),
)


@pytest.mark.parametrize("name", [*Description.__dataclass_fields__])
def test_a_fingerprint_changes_with_every_column_but_those_about_values(name: str) -> None:
    kept = getattr(_DESCRIBED, name)
    if isinstance(kept, list):
        changed: Any = [*kept[:-1], "z"]
    else:
        changed = kept.copy()
        changed.reshape(-1)[-1] ^= 1
    same = fingerprint(_DESCRIBED, b"x") == fingerprint(replace(_DESCRIBED, **{name: changed}), b"x")
    assert same == (name.endswith("_digest") or name == "object_bytes")


def test_a_fingerprint_tells_where_one_column_ends_and_the_next_begins() -> None:
    one = replace(_DESCRIBED, keys=["ab"], object_keys=["c"])
    assert fingerprint(one, b"x") != fingerprint(one, b"xx")
    assert fingerprint(one, b"x") != fingerprint(replace(one, keys=["a"], object_keys=["bc"]), b"x")


@pytest.mark.parametrize("half", [0, 1])
def test_a_token_notices_either_half_of_a_digest(half: int) -> None:
    digests = np.ones((1, 2), dtype=np.uint64)
    other = digests.copy()
    other[0, half] += np.uint64(1)
    tokens = [token(b"12345678", ["o"], np.array([1]), digests), token(b"12345678", ["o"], np.array([-1]), other)]
    assert not all_as_before(tokens)
    assert all_as_before([tokens[0], token(b"12345678", ["o"], np.array([-1]), digests)])
