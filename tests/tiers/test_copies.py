"""Copies on their way from host to host, and saves that follow each other in one place."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import giantstep as gs
from giantstep.errors import BadArgumentError, IncompleteError, UnexpectedError
from giantstep.format.digests import block_checksums
from giantstep.options import SaveOptions
from giantstep.storage.base import read_all
from giantstep.storage.memory import MemoryStore
from giantstep.testing.ranks import run_ranks, run_ranks_collecting
from giantstep.tiers.courier import Carried, Move, carry
from giantstep.tiers.node_store import Protection
from tiers.clusters import LOADING, SAVING, Cluster, Layout, check_exact, one_error, state_of

NUMBERS = itertools.count()
BLOCK = 64


def places(count: int) -> list[MemoryStore]:
    found = [MemoryStore(f"copies-{next(NUMBERS)}") for _ in range(count)]
    for store in found:
        store.prepare("data")
    return found


def put(store: MemoryStore, name: str, data: bytes) -> None:
    handle = store.create(name, len(data), direct=False)
    handle.write_at(0, data)
    handle.close()


@st.composite
def errands(draw: st.DrawFn) -> tuple[int, list[tuple[int, int, bytes, str]]]:
    """Ranks, and files from rank to rank: some damaged, too short or not there at all where they are sent from."""
    ranks = draw(st.integers(2, 5))
    files = []
    for _ in range(draw(st.integers(0, 8))):
        source, target = draw(st.permutations(range(ranks)))[:2]
        size = draw(st.one_of(st.integers(1, 3), st.integers(1, 700)))
        data = np.random.default_rng(len(files)).integers(1, 256, size, dtype=np.uint8).tobytes()
        files.append((source, target, data, draw(st.sampled_from(["", "", "", "flipped", "short", "missing"]))))
    return ranks, files


@settings(deadline=None, max_examples=60)
@given(errands(), st.sampled_from([1, 2, 5]))
def test_files_arrive_whole_and_what_is_bad_where_it_comes_from_is_named_and_not_kept(
    case: tuple[int, list[tuple[int, int, bytes, str]]], piece_blocks: int
) -> None:
    ranks, files = case
    stores = places(ranks)
    sends: list[list[Move]] = [[] for _ in range(ranks)]
    receives: list[list[Move]] = [[] for _ in range(ranks)]
    for number, (source, target, data, harm) in enumerate(files):
        name = f"data/{number}"
        sends[source].append(Move(name, len(data), target))
        receives[target].append(Move(name, len(data), source, block_checksums(memoryview(data), BLOCK)))
        there = {"": data, "flipped": bytes([data[0] ^ 1]) + data[1:], "short": data[:-1], "missing": data}[harm]
        if harm != "missing":
            put(stores[source], name, there)
        if number % 2:
            put(stores[target], name, b"left by a transfer that was cut off")

    def work(group: Any) -> Carried:
        rank = group.rank
        return carry(
            group,
            stores[rank],
            sends[rank],
            receives[rank],
            piece_bytes=piece_blocks * BLOCK,
            block_bytes=BLOCK,
            phase="copy",
            timeout_secs=20,
        )

    done = run_ranks(ranks, work)
    for number, (source, target, data, harm) in enumerate(files):
        name = f"data/{number}"
        assert (name in done[target].bad) == bool(harm)
        assert (name in list(stores[target].names("data"))) != bool(harm)
        if not harm:
            assert read_all(stores[target], name, 1000) == data
        assert name not in done[source].bad
    for rank in range(ranks):
        assert done[rank].bytes_sent == sum(move.bytes for move in sends[rank])
        assert done[rank].bytes_received == sum(move.bytes for move in receives[rank])


def test_a_check_that_raises_ends_the_carrying_for_all_ranks() -> None:
    stores = places(3)
    put(stores[0], "data/x", bytes(1000))

    def refuse() -> None:
        raise ValueError("no more")

    def work(group: Any) -> Carried:
        moves = {0: ([Move("data/x", 1000, 1)], []), 1: ([], [Move("data/x", 1000, 0)])}.get(group.rank, ([], []))
        how = {"piece_bytes": BLOCK, "block_bytes": BLOCK, "phase": "copy", "timeout_secs": 20.0}
        return carry(group, stores[group.rank], *moves, check=refuse if group.rank == 1 else lambda: None, **how)

    _, errors = run_ranks_collecting(3, work)
    error = one_error(errors[:2], UnexpectedError, "no more")
    assert (error.rank, error.phase) == (1, "copy")
    # That rank had nothing to carry, and so nothing to wait for.
    assert errors[2] is None


@pytest.mark.parametrize("protection", [Protection(1), Protection(0, (2, 1))], ids=["copies", "parity"])
def test_a_later_save_to_the_same_place_replaces_the_one_before_on_every_host(tmp_path: Path, protection: Protection) -> None:
    cluster = Cluster(tmp_path, [1, 2, 1], protection=protection)
    cluster.save(Layout(2), 1)
    first = cluster.record().save_id
    cluster.save(Layout(), 2)
    assert not [path for path in tmp_path.rglob("*") if first in path.name]
    cluster.check_load(Layout(2), 2)


@pytest.mark.parametrize("protection", [Protection(1), Protection(0, (2, 1))], ids=["copies", "parity"])
def test_parts_in_many_files_are_protected_each(tmp_path: Path, protection: Protection) -> None:
    cluster = Cluster(tmp_path, [1, 1, 1], protection=protection)
    options = SaveOptions(timeout_secs=20, block_bytes=4096, max_file_bytes=1 << 20)

    def state(rank: int, scale: float) -> dict[str, Any]:
        parts = {key: torch.arange(200_000.0) * (rank + number) * scale for number, key in enumerate("abc")}
        return {key: gs.ShardedTensor.from_rank_offsets(key, part, (0, rank, 3)) for key, part in parts.items()}

    run_ranks(3, lambda group: gs.save(state(group.rank, 1.0), cluster.store(group.rank), process_group=group, options=options))
    assert len(cluster.record().files) >= 9
    cluster.lose(1)
    found = run_ranks(3, lambda group: gs.load(state(group.rank, 0.0), cluster.store(group.rank), process_group=group))
    for rank, loaded in enumerate(found):
        for key, expected in state(rank, 1.0).items():
            assert torch.equal(loaded[key], expected.data)


def test_saves_in_the_background_overlap_and_all_are_exact(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, [2, 1, 1])
    options = SaveOptions(timeout_secs=20, max_pending=3)

    def work(group: Any) -> list[gs.SaveReport]:
        pending = []
        for seed in range(3):
            state = state_of(group.rank, 4, Layout(2), seed)
            store = cluster.store(group.rank).folder(f"s{seed}")
            pending.append(gs.async_save(state, store, process_group=group, options=options))
            pending[-1].wait_staged()
            # What was staged may change.
            state["bias"].zero_()
        return [one.result() for one in pending]

    reports = run_ranks(4, work)
    assert len({report.save_id for report in reports[0]}) == 3
    assert reports[0][0].bytes_spared > 0

    def load(group: Any) -> list[Any]:
        found = []
        for seed in range(3):
            store = cluster.store(group.rank).folder(f"s{seed}")
            found.append(gs.load(state_of(group.rank, 4, Layout(2), None), store, process_group=group, options=LOADING))
        return found

    cluster.lose(1)
    loaded = run_ranks(4, load)
    for seed in range(3):
        check_exact([states[seed] for states in loaded], Layout(2), seed)


def test_a_cancelled_save_leaves_nothing(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, [1, 1])

    def work(group: Any) -> bool:
        state = state_of(group.rank, 2, Layout(), 0)
        pending = gs.async_save(state, cluster.store(group.rank), process_group=group, options=SAVING)
        pending.cancel()
        return pending.exception() is None

    committed = run_ranks(2, work)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    # It may have been too late; all ranks agree on that.
    assert committed in ([True, True], [False, False])
    assert bool(files) == committed[0]


def test_one_process_saves_for_itself_without_copies(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, [1], protection=Protection(0))
    store = cluster.store(0)
    gs.save(state_of(0, 1, Layout(), 4), store)
    check_exact([gs.load(state_of(0, 1, Layout(), None), store)], Layout(), 4)


def test_what_cannot_be_for_places_of_hosts_is_refused(tmp_path: Path) -> None:
    store = Cluster(tmp_path, [1], protection=Protection(0)).store(0)
    with pytest.raises(BadArgumentError, match="digests"):
        gs.save({"x": 1}, store, options=SaveOptions(digests=True))
    with pytest.raises(IncompleteError, match="none of the 1 hosts"):
        gs.load({"x": 0}, store)
    gs.save({"x": 1}, store)
    with pytest.raises(BadArgumentError, match="on_corrupt"):
        gs.load({"x": 0}, store, on_corrupt="fallback")


def test_checkpoints_of_another_run_are_not_loaded(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, [1, 1], protection=Protection(1, run="theirs"))
    cluster.save(Layout())
    cluster.protection = Protection(1, run="ours")
    _, errors = cluster.load(Layout())
    one_error(errors, IncompleteError, "'theirs'", "'ours'", "none of the 2 hosts")
