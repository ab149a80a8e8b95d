"""Copies and parity in many rounds, with buffers that are used again: the bytes are those of one round."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import giantstep as gs
from giantstep.format.digests import block_checksums
from giantstep.group.base import Group
from giantstep.storage.local import LocalStore
from giantstep.testing.ranks import run_ranks, run_ranks_collecting
from giantstep.tiers import courier, parity_rounds
from giantstep.tiers.courier import Move, carry
from giantstep.tiers.hosts import Standing
from giantstep.tiers.node_store import NodeStore, Protection

BLOCK = 64


def contents(rank: int) -> list[bytes]:
    """Files of very unequal sizes: some begin and end within a piece, one is empty."""
    random = np.random.default_rng(rank)
    return [random.bytes(size) for size in (5 * BLOCK * (rank + 1) + 7, 1, 3 * BLOCK, 0, 40 * BLOCK + rank)]


@pytest.mark.parametrize("peers", [1, 3])
def test_files_of_any_size_arrive_in_pieces(tmp_path: Path, peers: int) -> None:
    ranks = 4
    name = "data/of{}-{}".format

    def work(group: Group) -> None:
        store = LocalStore(tmp_path / str(group.rank))
        store.prepare("data")
        for number, data in enumerate(contents(group.rank)):
            (tmp_path / str(group.rank) / name(group.rank, number)).write_bytes(data)
        sends, receives = [], []
        for away in range(1, peers + 1):
            target, source = (group.rank + away) % ranks, (group.rank - away) % ranks
            sends += [Move(name(group.rank, row), len(data), target) for row, data in enumerate(contents(group.rank)) if data]
            for row, data in enumerate(contents(source)):
                if data:
                    receives.append(Move(name(source, row), len(data), source, block_checksums(memoryview(data), BLOCK)))
        done = carry(group, store, sends, receives, piece_bytes=2 * BLOCK, block_bytes=BLOCK, phase="copy", timeout_secs=60)
        assert done.bad == []
        assert done.bytes_received == sum(move.bytes for move in receives)

    run_ranks(ranks, work)
    for rank in range(ranks):
        for away in range(1, peers + 1):
            source = (rank - away) % ranks
            for row, data in enumerate(contents(source)):
                if data:
                    assert (tmp_path / str(rank) / name(source, row)).read_bytes() == data


def test_a_file_takes_a_bounded_number_of_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    class Counted(courier.Arenas):
        def __init__(self) -> None:
            super().__init__(lambda size: (taken.append(size), np.empty(size, dtype=np.uint8))[1])

    monkeypatch.setattr(courier, "Arenas", Counted)
    data = np.random.default_rng(0).bytes(100 * BLOCK)

    def work(group: Group) -> None:
        store = LocalStore(tmp_path / str(group.rank))
        store.prepare("data")
        if group.rank == 0:
            (tmp_path / "0/data/f").write_bytes(data)
            carry(
                group,
                store,
                [Move("data/f", len(data), 1)],
                [],
                piece_bytes=BLOCK,
                block_bytes=BLOCK,
                phase="copy",
                timeout_secs=60,
            )
        else:
            sums = block_checksums(memoryview(data), BLOCK)
            move = Move("data/f", len(data), 0, sums)
            carry(group, store, [], [move], piece_bytes=BLOCK, block_bytes=BLOCK, phase="copy", timeout_secs=60)

    run_ranks(2, work)
    assert (tmp_path / "1/data/f").read_bytes() == data
    # On either side one that travels, one that is read or written, and one that waits.
    assert 2 <= len(taken) <= 6


def store_of(root: Path, rank: int, parity: tuple[int, int]) -> NodeStore:
    host = f"h{rank}"
    return NodeStore(LocalStore(root / host), "steps", Standing(host, host), Protection(0, parity))


def state_of(rank: int, ranks: int, *, filled: bool) -> dict[str, Any]:
    # Hosts have very unequal streams, so that pieces of a stripe are of unequal lengths and some are missing.
    rows = [17 * (number % 3) + number + 1 for number in range(ranks)]
    shape = (rows[rank], 50)
    values = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape) + rank if filled else torch.zeros(shape)
    whole = gs.ShardedTensor("whole", values, torch.float32, shape, (sum(rows), 50), (sum(rows[:rank]), 0), None)
    return {"whole": whole, "rng": gs.ShardedObject("rng", {"r": rank} if filled else None, (ranks,), (rank,))}


@pytest.mark.parametrize(("hosts", "parity", "lost"), [(5, (4, 1), (3,)), (6, (4, 2), (1, 4)), (3, (2, 1), (0,))])
def test_parity_of_many_rounds_rebuilds_what_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hosts: int, parity: tuple[int, int], lost: tuple[int, ...]
) -> None:
    for module in ("parity_rounds.piece_bytes_for", "gathering.piece_bytes_for"):
        monkeypatch.setattr(f"giantstep.tiers.{module}", lambda _layout: 192)

    def save(group: Group) -> None:
        state = state_of(group.rank, hosts, filled=True)
        gs.save(state, store_of(tmp_path, group.rank, parity), process_group=group)

    def restore(group: Group) -> None:
        state = state_of(group.rank, hosts, filled=False)
        loaded = gs.load(state, store_of(tmp_path, group.rank, parity), process_group=group)
        expected = state_of(group.rank, hosts, filled=True)
        assert torch.equal(loaded["whole"], expected["whole"].data)
        assert loaded["rng"] == {"r": group.rank}
        assert any("rebuilt out of parity" in note for note in loaded.report.notes)

    run_ranks(hosts, save)
    for host in lost:
        shutil.rmtree(tmp_path / f"h{host}")
    run_ranks(hosts, restore)


@pytest.mark.parametrize("call", ["read", "encode", "write"])
def test_what_fails_in_the_background_of_parity_fails_the_save_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr("giantstep.tiers.parity_rounds.piece_bytes_for", lambda _layout: 192)
    original = getattr(parity_rounds._Making, f"_{call}")
    calls: list[int] = []

    def fail(self: Any, *arguments: Any) -> Any:
        if self._how.group.rank == 2:
            calls.append(1)
            if len(calls) == 4:
                raise OSError(errno.EIO, "the device is broken")
        return original(self, *arguments)

    monkeypatch.setattr(parity_rounds._Making, f"_{call}", fail)

    def save(group: Group) -> None:
        state = state_of(group.rank, 5, filled=True)
        gs.save(state, store_of(tmp_path, group.rank, (4, 1)), process_group=group)

    _, errors = run_ranks_collecting(5, save)
    for error in errors:
        assert isinstance(error, gs.errors.GiantstepError)
        assert error.rank == 2
        assert "the device is broken" in str(error)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
