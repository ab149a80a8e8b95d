"""Torch's own ShardedTensor, which FSDP1 gives when it was made without a mesh."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from processes import results, run_processes

ROWS = 5


def whole() -> torch.Tensor:
    return torch.arange(ROWS * 3.0).reshape(ROWS, 3)


def sharded(rank: int, rows: dict[int, tuple[int, int]], data: torch.Tensor, group: Any = None) -> Any:
    """Of the rows of `data`, (first, count) for each rank that holds some."""
    from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards

    first, count = rows.get(rank, (0, 0))
    shards = [Shard.from_tensor_and_offsets(data[first : first + count].clone(), [first, 0], rank)] if count else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return init_from_local_shards(shards, *data.shape, process_group=group)


def uneven_rank(rank: int, folder: str) -> list[Any]:
    # Rank 2 holds nothing.
    saved = sharded(rank, {0: (0, 1), 1: (1, 4)}, whole())
    target = sharded(rank, {0: (3, 2), 2: (0, 3)}, torch.zeros(ROWS, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = gs.save({"w": saved}, folder)
        pending = gs.async_save({"w": saved}, f"{folder}/async")
        loaded = gs.load({"w": target}, folder)["w"]
        pending.result()
    plain = {"w": torch.zeros(ROWS, 3)}
    gs.load(plain, f"{folder}/async")
    mine = [shard.tensor.tolist() for shard in target.local_shards()]
    return [loaded is target, report.bytes, mine, torch.equal(plain["w"], whole())]


def test_it_is_cut_anew_and_loaded_in_place_without_a_warning(tmp_path: Path) -> None:
    found = results(run_processes(3, uneven_rank, str(tmp_path)))
    rows = whole().tolist()
    bytes_ = ROWS * 3 * 4
    assert found == [[True, bytes_, [rows[3:]], True], [True, bytes_, [], True], [True, bytes_, [rows[:3]], True]]


def two_groups_rank(rank: int, folder: str, *, differ: bool) -> str | int:
    import torch.distributed as dist

    # Two groups with a copy each, as in HYBRID_SHARD.
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    data = whole() + (rank // 2 if differ else 0)
    first = 2 * (rank // 2)
    tensor = sharded(rank, {first: (0, 3), first + 1: (3, 2)}, data, groups[rank // 2])
    try:
        return gs.save({"w": tensor}, folder).bytes
    except gs.errors.DisagreementError as error:
        return str(error)


def equal_copies(rank: int, folder: str) -> str | int:
    return two_groups_rank(rank, folder, differ=False)


def different_copies(rank: int, folder: str) -> str | int:
    return two_groups_rank(rank, folder, differ=True)


def test_copies_in_several_groups_are_compared(tmp_path: Path) -> None:
    assert results(run_processes(4, equal_copies, str(tmp_path))) == [ROWS * 3 * 4] * 4
    for found in results(run_processes(4, different_copies, str(tmp_path))):
        assert "'w'" in found
        assert "different values" in found


def background_rank(rank: int, folder: str) -> str:
    tensor = sharded(rank, {0: (0, 2), 1: (2, 3)}, whole())
    pending = gs.async_save({"w": tensor}, folder, options=gs.SaveOptions(staging="background", staging_bytes=1 << 20))
    with gs.staging_guard(pending):
        for shard in tensor.local_shards():
            shard.tensor.zero_()
    pending.result()
    return str(gs.open_checkpoint(folder)["w"][...].tolist())


def test_an_asynchronous_save_stores_its_values_at_the_call(tmp_path: Path) -> None:
    assert results(run_processes(2, background_rank, str(tmp_path))) == [str(whole().tolist())] * 2


def stateful_rank(rank: int, folder: str) -> list[Any]:
    class Holder:
        def __init__(self, data: torch.Tensor) -> None:
            self.tensor = sharded(rank, {0: (0, 2), 1: (2, 3)}, data)

        def state_dict(self) -> dict[str, Any]:
            return {"w": self.tensor}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.loaded = state["w"] is self.tensor

    gs.save({"model": Holder(whole())}, folder)
    holder = Holder(torch.zeros(ROWS, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gs.load({"model": holder}, folder)
    return [holder.loaded, holder.tensor.local_shards()[0].tensor.tolist()]


def test_objects_with_a_state_dict_may_hold_it(tmp_path: Path) -> None:
    rows = whole().tolist()
    assert results(run_processes(2, stateful_rank, str(tmp_path))) == [[True, rows[:2]], [True, rows[2:]]]


def meta_rank(rank: int, folder: str) -> str:
    tensor = sharded(rank, {0: (0, 2), 1: (2, 3)}, whole())
    gs.save({"w": tensor}, folder)
    for shard in tensor.local_shards():
        shard.tensor = shard.tensor.to("meta")
    with pytest.raises(gs.errors.BadArgumentError) as caught:
        gs.load({"w": tensor}, folder)
    return str(caught.value)


def test_one_without_memory_is_refused(tmp_path: Path) -> None:
    for found in results(run_processes(2, meta_rank, str(tmp_path))):
        assert "'w' is a torch ShardedTensor on the meta device" in found
