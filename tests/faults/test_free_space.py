"""A save that cannot fit is refused before a byte is written, on all ranks, and the job goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import BadArgumentError, StoreError
from giantstep.storage.local import LocalStore
from giantstep.testing.ranks import run_ranks_collecting

MIB = 1 << 20


class Small(LocalStore):
    """Says that so many bytes are free."""

    free: int | None = None

    def free_bytes(self) -> int | None:
        return self.free

    def create(self, name: str, size: int, *, direct: bool) -> Any:
        assert self.free is None or self.free >= 2 * MIB, "a file was created"
        return super().create(name, size, direct=direct)


def save(store: Any, value: float, ranks: int = 2, **settings: Any) -> list[BaseException | None]:
    """Two MiB together."""

    def rank(group: Any) -> None:
        part = torch.full((MIB // 2 // ranks,), value)
        shard = gs.ShardedTensor.from_rank_offsets("w", part, (0, group.rank, ranks))
        call = gs.async_save if settings.get("asynchronous") else gs.save
        options = gs.SaveOptions(check_free_space=settings.get("check", True), plan_cache=settings.get("cache"))
        result: Any = call({"w": shard, "n": value}, store, process_group=group, options=options)
        if settings.get("asynchronous"):
            result.result()

    return run_ranks_collecting(ranks, rank)[1]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_all_ranks_raise_before_a_byte_is_written_and_can_save_once_there_is_room(tmp_path: Path, asynchronous: bool) -> None:
    store = Small(tmp_path)
    assert save(store, 1.0) == [None, None]
    store.free = 2 * MIB - 1
    for error in save(store, 2.0, asynchronous=asynchronous):
        assert isinstance(error, StoreError)
        assert "2.0 MiB of free space, and the save needs 2.0 MiB" in str(error)
    assert gs.open_checkpoint(store).common["n"] == 1.0
    assert len(list((tmp_path / "data").iterdir())) == 2
    store.free = 3 * MIB
    assert save(store, 3.0) == [None, None]
    assert gs.open_checkpoint(store).common["n"] == 3.0


def test_it_is_checked_too_where_a_plan_is_used_again(tmp_path: Path) -> None:
    store, cache = Small(tmp_path), gs.PlanCache()
    assert save(store, 1.0, ranks=1, cache=cache) == [None]
    store.free = MIB
    (error,) = save(store, 2.0, ranks=1, cache=cache)
    assert isinstance(error, StoreError)


def test_where_the_store_does_not_know_or_the_check_is_off_it_is_tried(tmp_path: Path) -> None:
    store = Small(tmp_path)
    store.free = 2 * MIB
    assert save(store, 1.0, check=False) == [None, None]
    with pytest.raises(BadArgumentError, match="check_free_space"):
        gs.SaveOptions(check_free_space=1)  # type: ignore[arg-type]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("check", [True, False])
def test_a_real_disk_that_is_full_leaves_the_old_checkpoint_and_takes_the_next_save(small_disk: Path, check: bool) -> None:
    path = small_disk / "run"
    assert save(path, 1.0) == [None, None]
    filler = small_disk / "filler"
    filler.write_bytes(bytes(5 * MIB))
    errors = save(path, 2.0, check=check)
    assert all(isinstance(error, StoreError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    opened = gs.open_checkpoint(path)
    assert opened.verify().ok
    assert opened.common["n"] == 1.0
    filler.unlink()
    assert save(path, 3.0) == [None, None]
    assert gs.open_checkpoint(path)["w"][-1] == 3.0
    assert len(list((path / "data").iterdir())) == 2, "nothing is left of the save that failed"
