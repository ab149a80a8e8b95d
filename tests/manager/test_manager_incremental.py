"""What incremental saves of a manager are compared with: damage is not handed on, and full saves end what came before."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
import giantstep.saving
from giantstep.errors import StoreError
from giantstep.format.names import save_id_of
from giantstep.manager import CheckpointManager
from giantstep.manager.chain import Chain
from giantstep.materializing import materialize
from giantstep.steps import step_name
from giantstep.storage.base import WriteHandle
from giantstep.storage.memory import MemoryStore


def state_of(value: float) -> dict[str, Any]:
    return {"frozen": torch.arange(300_000.0), "w": torch.full((5000,), float(value))}


def damage(place: Path, key: str) -> None:
    """Flip a bit of a tensor that lies in one file, in its middle."""
    checkpoint = gs.open_checkpoint(place)
    entry = next(one for one in map(checkpoint.index_tables().tensor, range(len(checkpoint))) if one.key == key)
    (chunk,) = entry.chunks
    index = checkpoint.index_tables().load_all()
    row = list(checkpoint.keys()).index(key)
    file = place / checkpoint.record.files[int(index.chunk_file[int(index.tensor_chunk_ends[row])])].name
    content = bytearray(file.read_bytes())
    content[chunk.start + 500_000] ^= 1
    file.write_bytes(content)


def writers(place: Any) -> set[str]:
    """Ids of the saves that wrote the data files of a step."""
    return {save_id_of(file.name) or "" for file in gs.open_checkpoint(place).record.files}


@pytest.mark.parametrize("told", [False, True], ids=["found by restore", "known by the caller"])
def test_a_save_after_a_restore_uses_no_file_of_steps_that_were_not_restored(tmp_path: Path, told: bool) -> None:
    """The newest step is damaged, the one before is not: what is saved next has nothing of the newest."""
    with CheckpointManager(tmp_path, incremental=True) as manager:
        for step in (1, 2, 3):
            manager.save(step, state_of(step))
        materialize(tmp_path / step_name(3))
        damage(tmp_path / step_name(3), "frozen")
        restored = manager.restore(state_of(0), step=2 if told else None)
        assert restored is not None
        assert restored.step == 2
        for step in (4, 5) if not told else (4, 5, 6):
            manager.save(step, state_of(step), overwrite=True)
            assert gs.open_checkpoint(tmp_path / step_name(step)).verify().ok
            assert not writers(tmp_path / step_name(step)) & writers(tmp_path / step_name(3))


def test_a_manager_that_goes_back_uses_no_file_of_the_newer_steps_that_are_there(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, incremental=True) as manager:
        manager.save(50, state_of(50))
    damage(tmp_path / step_name(50), "frozen")
    with CheckpointManager(tmp_path, incremental=True) as manager:
        for step in (10, 20):
            manager.save(step, state_of(step))
        assert gs.open_checkpoint(tmp_path / step_name(20)).verify().ok
        assert writers(tmp_path / step_name(20)) > writers(tmp_path / step_name(10))


def test_a_step_that_is_replaced_is_written_in_full(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, incremental=True) as manager:
        manager.save(1, state_of(1))
        manager.save(2, state_of(2))
        damage(tmp_path / step_name(2), "frozen")
        report = manager.save(2, state_of(2), overwrite=True)
        assert isinstance(report, gs.SaveReport)
        assert report.bytes_reused == 0
        assert gs.open_checkpoint(tmp_path / step_name(2)).verify().ok


class _Slow(MemoryStore):
    """Files are written when the gate is open."""

    gate = threading.Event()

    def create(self, name: str, size: int, *, direct: bool) -> WriteHandle:
        assert self.gate.wait(20)
        return super().create(name, size, direct=direct)

    def folder(self, name: str) -> _Slow:
        return _Slow(f"{self._name}/{name}")


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_no_step_shares_a_file_that_is_older_than_the_full_save_before_it_also_with_saves_in_flight(in_flight: int) -> None:
    root = _Slow(f"chain-{in_flight}")
    options = gs.SaveOptions(max_pending=in_flight, timeout_secs=20)
    manager = CheckpointManager(root, incremental=True, full_every=4, asynchronous=True, save_options=options)
    ids: dict[int, str] = {}
    for first in range(1, 13, in_flight):
        # So many are handed off before the first of them is written.
        _Slow.gate.clear()
        for step in range(first, first + in_flight):
            manager.save(step, state_of(step))
        _Slow.gate.set()
        manager.wait()
    manager.close()
    for step in range(1, 13):
        ids[step] = gs.open_checkpoint(root.folder(step_name(step))).record.save_id
    for step in range(1, 13):
        full = step - (step - 1) % 4
        found = writers(root.folder(step_name(step)))
        assert found <= {ids[one] for one in range(full, step + 1)}, step
        assert ids[full] in found, step


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_save_that_fails_is_made_up_for_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    publish = giantstep.saving.publish

    def failing(*arguments: Any, **more: Any) -> Any:
        raise OSError(28, "No space left on device")

    reused = {}
    with CheckpointManager(tmp_path, incremental=True, full_every=3, asynchronous=asynchronous) as manager:

        def reuses(step: int) -> bool:
            found = manager.save(step, state_of(step))
            return (found.result(20) if isinstance(found, gs.PendingSave) else found).bytes_reused > 0

        for step in range(1, 9):
            # The second full one, and one that is not.
            if step in (4, 7):
                monkeypatch.setattr(giantstep.saving, "publish", failing)
                with pytest.raises(StoreError, match="No space"):
                    reuses(step)
                monkeypatch.setattr(giantstep.saving, "publish", publish)
            else:
                reused[step] = reuses(step)
    assert reused == {1: False, 2: True, 3: True, 5: False, 6: True, 8: False}


def test_saves_are_compared_with_the_last_one_of_the_manager_that_has_not_failed() -> None:
    chain = Chain(on=True, full_every=4)
    assert chain.previous(1, []) is None
    # A step of another job is no matter, one in flight is.
    assert chain.previous(2, [1]) == 1
    chain.saved(1)
    assert chain.previous(3, [2]) == 2
    chain.failed(2)
    assert chain.previous(4, []) == 1
    chain.saved(3)
    assert chain.previous(5, [4]) is None, "the fourth after the full one"
    assert chain.previous(6, [4, 5]) == 5
    chain.failed(5)
    assert chain.previous(7, [6]) is None, "the full one has failed"
    chain.begin_anew()
    assert chain.previous(8, [7]) is None
    assert chain.previous(8, [8]) is None
    off = Chain(on=False, full_every=4)
    assert [off.previous(step, []) for step in (1, 2, 3)] == [None] * 3
