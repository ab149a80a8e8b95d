"""Clocks that jump between saves and during them: ids of saves come out of order, and nothing is lost."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
import giantstep.commit.publish
import giantstep.saving
from giantstep.storage.local import LocalStore
from giantstep.testing.crash_points import explore, unneeded_files
from giantstep.testing.ranks import run_ranks

NOW = dt.datetime(2026, 3, 29, 1, 59, tzinfo=dt.UTC)
JUMPS = [
    [0.0, -86400.0, 86400.0],
    [0.0, 3600.0, -3600.0, 0.0],
    [-1e8, 1e8, 0.0, 0.0],
    [0.0, 0.0, 0.0],
]
OPTIONS = gs.SaveOptions(block_bytes=4096, buffer_bytes=4096, writer_threads=1, timeout_secs=20)


class Clock:
    """Stands still until it jumps."""

    UTC = dt.UTC

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.datetime = self
        self._now = NOW
        for module in (giantstep.saving, giantstep.commit.publish):
            monkeypatch.setattr(module, "dt", self)

    def now(self, _zone: Any) -> dt.datetime:
        return self._now

    def jump(self, seconds: float) -> None:
        self._now = NOW + dt.timedelta(seconds=seconds)


def save(store: Any, value: float, ranks: int = 1) -> None:
    def rank(group: Any) -> None:
        part = gs.ShardedTensor.from_rank_offsets("w", torch.full((600,), value), (0, group.rank, ranks))
        gs.save({"w": part, "value": value}, store, process_group=group, options=OPTIONS)

    run_ranks(ranks, rank)


def value_at(store: Any) -> float:
    checkpoint = gs.open_checkpoint(store)
    assert checkpoint.verify().ok
    (value,) = set(checkpoint["w"][...].tolist()) | {checkpoint.common["value"]}
    return float(value)


@pytest.mark.parametrize("jumps", JUMPS)
def test_saves_with_ids_out_of_order_replace_each_other_and_leave_nothing(
    jumps: Sequence[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    for value, jump in enumerate(jumps):
        clock.jump(jump)
        save(tmp_path, float(value), ranks=2)
        assert value_at(tmp_path) == value
        assert unneeded_files(LocalStore(tmp_path)) == []


@pytest.mark.parametrize("jump", [-86400.0, 0.0, 86400.0])
def test_a_crash_while_the_clock_is_wrong_leaves_old_or_new(jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def at(seconds: float, value: float) -> Callable[[Any], None]:
        def operation(store: Any) -> None:
            clock.jump(seconds)
            save(store, value)

        return operation

    def check_next_saves(store: Any) -> None:
        # What was left by a save that seems to be of the future may be a running one's, and stays until then.
        for seconds, value in ((-2 * 86400.0, 6.0), (2 * 86400.0, 7.0)):
            at(seconds, value)(store)
            assert gs.open_checkpoint(store).common["value"] == value
        assert unneeded_files(store) == []

    report = explore(at(jump, 2.0), before=at(0.0, 1.0), check=value_at, again=check_next_saves, states_per_point=8)
    assert set(report.outcomes) == {1.0, 2.0}


def test_a_clock_that_jumps_while_ranks_wait_neither_ends_nor_lengthens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting goes by a clock that does not jump."""
    real, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return real() + (-1e6, 1e6)[calls[0] % 2]

    monkeypatch.setattr(time, "time", jumping)

    def rank(group: Any) -> None:
        if group.rank == 1:
            time.sleep(0.3)
        part = gs.ShardedTensor.from_rank_offsets("w", torch.ones(50), (0, group.rank, 2))
        gs.save({"w": part}, tmp_path, process_group=group, options=OPTIONS)
        gs.async_save({"w": part}, tmp_path, process_group=group, options=OPTIONS).result(60)
        gs.load({"w": part}, tmp_path, process_group=group, options=gs.LoadOptions(timeout_secs=20))

    begin = time.monotonic()
    run_ranks(2, rank)
    assert time.monotonic() - begin < 20
