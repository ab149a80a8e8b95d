"""A save that does not fit is refused on all ranks before the first byte is written."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import StoreError
from giantstep.storage.local import LocalStore
from giantstep.storage.memory import MemoryStore
from giantstep.testing.crash_points import leftovers
from giantstep.testing.ranks import run_ranks_collecting
from small_disks import mounted

RANKS = 3
_NAMES = itertools.count()


class FullStore(MemoryStore):
    """Has so many bytes left, and counts how often it is asked and written to."""

    def __init__(self, free: int | None) -> None:
        super().__init__(f"full-{next(_NAMES)}")
        self.free = free
        self.asked = self.changes = 0

    def free_bytes(self) -> int | None:
        self.asked += 1
        return self.free

    def prepare(self, folder: str) -> None:
        self.changes += 1
        super().prepare(folder)

    def create(self, name: str, size: int, *, direct: bool) -> Any:
        self.changes += 1
        return super().create(name, size, direct=direct)


def state_of(rank: int, length: int = 1000) -> dict[str, Any]:
    part = gs.ShardedTensor.from_rank_offsets("w", torch.full((length,), float(rank)), (0, rank, RANKS))
    return {"w": part, "same": torch.ones(500)}


def save_all(store: Any, length: int = 1000, *, later: bool = False) -> list[BaseException | None]:
    options = gs.SaveOptions(timeout_secs=20)

    def rank(group: Any) -> None:
        if later:
            gs.async_save(state_of(group.rank, length), store, process_group=group, options=options).result(60)
        else:
            gs.save(state_of(group.rank, length), store, process_group=group, options=options)

    return run_ranks_collecting(RANKS, rank)[1]


# Three shards and one tensor that all have, of which one is stored.
DATA_BYTES = 4 * (RANKS * 1000 + 500)


@pytest.mark.parametrize("later", [False, True], ids=["save", "async_save"])
def test_what_does_not_fit_is_the_same_error_on_all_ranks_and_nothing_is_written(later: bool) -> None:
    store = FullStore(DATA_BYTES - 1)
    errors = save_all(store, later=later)
    assert {type(error) for error in errors} == {StoreError}
    (message,) = {str(error) for error in errors}
    assert message.startswith("[phase plan] memory://full-")
    assert f"and {DATA_BYTES - 1} bytes" in message
    assert "Nothing was written" in message
    assert store.changes == 0
    assert not store.exists()
    # One look for all ranks.
    assert store.asked == 1
    store.free = DATA_BYTES + 4096
    assert save_all(store, later=later) == [None] * RANKS
    assert gs.open_checkpoint(store).verify().ok


def test_a_store_that_does_not_know_its_free_space_is_not_refused() -> None:
    store = FullStore(None)
    assert save_all(store) == [None] * RANKS
    assert store.asked == 1


def test_a_plan_that_is_used_again_is_checked_as_well() -> None:
    store, state = FullStore(1 << 30), {"w": torch.ones(1000), "step": 1}
    options = gs.SaveOptions(plan_cache=gs.PlanCache())
    gs.save(state, store, options=options)
    assert gs.save(state, store, options=options).plan_reused
    store.free = 100
    changes = store.changes
    with pytest.raises(StoreError, match="too little space"):
        gs.save(state, store, options=options)
    assert store.changes == changes
    assert gs.open_checkpoint(store).verify().ok


def test_a_local_directory_is_looked_at_once_and_where_the_system_does_not_know_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    real = os.statvfs

    def statvfs(path: Any) -> Any:
        looks.append(path)
        found = list(real(path))
        # Blocks in all, free ones, and those free for users.
        found[2:5] = [0, 0, 0]
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", statvfs)
    assert LocalStore(tmp_path / "not" / "there").free_bytes() is None
    looks.clear()
    assert save_all(tmp_path / "a") == [None] * RANKS
    assert len(looks) == 1


def used_bytes(place: Path) -> int:
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_on_a_small_file_system_the_checkpoint_before_stays_and_nothing_is_written(kind: str, tmp_path: Path) -> None:
    with mounted(kind, tmp_path, 8) as place:
        path = place / "checkpoint"
        assert save_all(path) == [None] * RANKS
        used = used_bytes(place)
        for later in (False, True):
            errors = save_all(path, length=1 << 20, later=later)
            assert {type(error) for error in errors} == {StoreError}
            assert "too little space" in str(errors[0])
            assert used_bytes(place) == used
        assert gs.open_checkpoint(path).verify().ok
        assert save_all(path) == [None] * RANKS
        assert leftovers(LocalStore(path)) == []


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@pytest.mark.parametrize("later", [False, True], ids=["save", "async_save"])
def test_a_disk_that_fills_during_the_save_is_told_on_all_ranks_and_nothing_stays(
    kind: str, later: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when others write to it meanwhile: the look at the free space says nothing."""
    monkeypatch.setattr(LocalStore, "free_bytes", lambda self: None)
    with mounted(kind, tmp_path, 8) as place:
        path = place / "checkpoint"
        assert save_all(path) == [None] * RANKS
        used = used_bytes(place)
        errors = save_all(path, length=1 << 20, later=later)
        assert {type(error) for error in errors} == {StoreError}
        assert len({str(error) for error in errors}) == 1
        assert os.strerror(errno.ENOSPC) in str(errors[0])
        assert gs.open_checkpoint(path).verify().ok
        assert leftovers(LocalStore(path)) == []
        assert used_bytes(place) <= used + (64 << 10)
        assert save_all(path) == [None] * RANKS
        assert gs.open_checkpoint(path).verify().ok
