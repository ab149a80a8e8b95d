"""Node-local checkpoints under odd circumstances: damage in every place, calls that do not fit together, strange records."""

from __future__ import annotations

import errno
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import DisagreementError, IncompleteError
from giantstep.format.record import decode_record, encode_record
from giantstep.storage.local import LocalReadHandle, LocalStore
from giantstep.testing.ranks import run_ranks, run_ranks_collecting
from giantstep.tiers.file_numbers import parity_of_file

RANKS = 4
HOSTS = ("a", "b", "c", "d")


def state(rank: int, value: float, ranks: int = RANKS) -> dict[str, Any]:
    shard = torch.full((50, 10), value * (rank + 1))
    return {
        "solo": gs.ShardedTensor.from_rank_offsets("solo", shard, (0, rank, ranks)),
        "all": torch.arange(50.0) * value,
        "own": gs.ShardedObject("own", {"rank": rank, "value": value}, (ranks,), (rank,)),
        "value": value,
    }


def check(loaded: Any, rank: int, value: float) -> None:
    assert torch.equal(loaded["solo"], torch.full((50, 10), value * (rank + 1)))
    assert torch.equal(loaded["all"], torch.arange(50.0) * value)
    assert loaded["own"] == {"rank": rank, "value": value}
    assert loaded["value"] == value


def tier(group: Any, root: Path, hosts: Any = HOSTS, **arguments: Any) -> gs.LocalTier:
    host = hosts[group.rank]
    arguments = {
        "save_options": gs.SaveOptions(timeout_secs=60),
        "load_options": gs.LoadOptions(timeout_secs=60),
        "asynchronous": False,
        **arguments,
    }
    return gs.LocalTier(str(root / host), host=host, process_group=group, **arguments)


def save_steps(root: Path, *steps: int, hosts: Any = HOSTS, **arguments: Any) -> None:
    def run(group: Any) -> None:
        with tier(group, root, hosts, **arguments) as opened:
            for step in steps:
                opened.save(step, state(group.rank, float(step), group.size))

    run_ranks(len(hosts), run)


def restore(root: Path, hosts: Any = HOSTS, step: int | None = None, **arguments: Any) -> list[Any]:
    """Restore on all ranks, check what is loaded, and return reports."""

    def run(group: Any) -> Any:
        with tier(group, root, hosts, **arguments) as opened:
            found = opened.restore(state(group.rank, 0.0, group.size), step)
            assert found is not None
            check(found.state, group.rank, float(found.step))
            return found

    return run_ranks(len(hosts), run)


def damage(place: Path, pattern: str) -> int:
    """Change a byte in the middle and one near the end of the files of data; how many there are."""
    files = [file for file in place.rglob(pattern) if "-9000" not in file.name]
    for file in files:
        found = bytearray(file.read_bytes())
        found[len(found) // 2] ^= 1
        found[-5] ^= 1
        file.write_bytes(found)
    return len(files)


# Damage.


def test_what_is_read_first_and_is_damaged_is_rebuilt_out_of_parity(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, parity=(3, 1))
    assert damage(tmp_path / "a", "*-r00000-*") >= 2
    found = restore(tmp_path, parity=(3, 1))
    assert "rebuilt out of parity" in str(found[0].state.report.notes)


def test_damage_of_a_file_out_of_which_another_is_rebuilt_is_survived_by_more_parity(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, parity=(2, 2))
    shutil.rmtree(tmp_path / "b")
    assert damage(tmp_path / "c", "*-r00002-*")
    found = restore(tmp_path, ("a", "e", "c", "d"), parity=(2, 2))
    assert "rebuilt out of parity" in str(found[0].state.report.notes)


def test_damage_beyond_parity_is_one_error_on_all_ranks(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, parity=(3, 1))
    damage(tmp_path / "a", "*-r00000-*")
    damage(tmp_path / "c", "*-r00002-*")

    def run(group: Any) -> None:
        with tier(group, tmp_path, parity=(3, 1)) as opened:
            opened.restore(state(group.rank, 0.0))

    _, errors = run_ranks_collecting(RANKS, run)
    assert {type(error) for error in errors} == {IncompleteError}


class Unreadable:
    """A handle of a file on a disk with bad sectors."""

    def __init__(self, handle: LocalReadHandle) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def read_into(self, *_arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    read_parts = read_into


@pytest.mark.parametrize("protection", [{"replicas": 1}, {"parity": (3, 1)}], ids=["copies", "parity"])
def test_a_file_that_cannot_be_read_on_its_host_is_had_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protection: dict[str, Any]
) -> None:
    save_steps(tmp_path, 1, **protection)
    broken = set((tmp_path / "c").rglob("*-r00002-*"))
    opened, deleted = LocalStore.open_read, LocalStore.delete

    def open_read(self: LocalStore, name: str, *, direct: bool = False) -> Any:
        handle = opened(self, name, direct=direct)
        return Unreadable(handle) if self._path(name) in broken else handle

    def delete(self: LocalStore, name: str) -> None:
        broken.discard(self._path(name))
        deleted(self, name)

    monkeypatch.setattr(LocalStore, "open_read", open_read)
    monkeypatch.setattr(LocalStore, "delete", delete)
    assert restore(tmp_path, **protection)[0].step == 1


def test_damage_is_passed_over_together_with_ranks_that_read_nothing(tmp_path: Path) -> None:
    def two(rank: int, value: float) -> dict[str, Any]:
        shard = torch.full((50, 10), value * (rank + 1))
        return {"two": gs.ShardedTensor.from_rank_offsets("two", shard, (0, rank, 2))} if rank < 2 else {}

    def save(group: Any) -> None:
        with tier(group, tmp_path) as opened:
            opened.save(1, two(group.rank, 1.0))

    run_ranks(RANKS, save)
    assert damage(tmp_path / "a", "*-r00000-*")

    def load(group: Any) -> None:
        with tier(group, tmp_path) as opened:
            found = opened.restore(two(group.rank, 0.0))
            assert found is not None
            if group.rank < 2:
                assert torch.equal(found.state["two"], torch.full((50, 10), group.rank + 1.0))

    run_ranks(RANKS, load)


def test_a_step_whose_index_is_damaged_everywhere_is_told_as_such(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    for index in tmp_path.rglob("*.index.safetensors"):
        index.write_bytes(index.read_bytes()[:-9])

    def run(group: Any) -> None:
        with tier(group, tmp_path) as opened:
            opened.restore(state(group.rank, 0.0))

    _, errors = run_ranks_collecting(RANKS, run)
    assert {type(error) for error in errors} == {IncompleteError}
    assert "is damaged on every host that has its commit record" in str(errors[0])


def test_a_file_that_cannot_be_looked_at_hides_none_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1)
    shutil.rmtree(tmp_path / "a")
    # Host b alone has what was on host a, but for one file.
    hidden = min((tmp_path / "b").rglob("*-r00000-*"))
    shutil.copy(hidden, tmp_path / "c" / "step_00000001" / "data" / hidden.name)
    size = LocalStore.size

    def sized(self: LocalStore, name: str) -> int:
        if self._path(name) == hidden:
            raise OSError(errno.EIO, "Input/output error")
        return size(self, name)

    monkeypatch.setattr(LocalStore, "size", sized)
    assert restore(tmp_path, ("b", "c", "d", "e"))[0].step == 1


# Records and calls that do not fit.


def test_a_record_that_no_save_has_written_is_refused_and_another_hosts_is_used(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, parity=(3, 1))
    found = tmp_path / "b" / "step_00000002" / "checkpoint.json"
    record = decode_record(found.read_bytes(), "b")
    assert record.nodes is not None
    files = tuple(file for file in record.files if parity_of_file(file.name) is None)
    later = replace(record, files=files, nodes=replace(record.nodes, generation=7))
    found.write_bytes(encode_record(later))
    shutil.rmtree(tmp_path / "c")
    loaded = restore(tmp_path, ("a", "b", "e", "d"))[0]
    assert loaded.step == 2
    assert "other files of parity" in str(loaded.state.report.notes)


def test_ranks_that_ask_for_different_steps_leave_both_as_they_are(tmp_path: Path) -> None:
    save_steps(tmp_path, 5, 10)
    before = {host: (tmp_path / host / "step_00000005" / "checkpoint.json").read_bytes() for host in HOSTS}

    def run(group: Any) -> None:
        with tier(group, tmp_path) as opened:
            opened.restore(state(group.rank, 0.0), 10 if group.rank else 5)

    _, errors = run_ranks_collecting(RANKS, run)
    assert {type(error) for error in errors} == {DisagreementError}
    after = {host: (tmp_path / host / "step_00000005" / "checkpoint.json").read_bytes() for host in HOSTS}
    assert after == before


def test_one_host_with_two_places_is_refused(tmp_path: Path) -> None:
    def run(group: Any) -> None:
        gs.LocalTier(str(tmp_path / str(group.rank)), host="ab"[group.rank // 2], process_group=group)

    _, errors = run_ranks_collecting(RANKS, run)
    assert {type(error) for error in errors} == {DisagreementError}
    assert "Ranks of one host share its place" in str(errors[1])


# Loads.


def test_ranks_of_several_hosts_load_different_blocks_of_one_file_that_only_one_of_them_holds(tmp_path: Path) -> None:
    whole = torch.arange(6 << 18, dtype=torch.float32).reshape(6, 1 << 18)

    def save(group: Any) -> None:
        with tier(group, tmp_path, ("a",), replicas=0) as opened:
            opened.save(1, {"w": whole})

    def load(group: Any) -> None:
        part = gs.ShardedTensor.from_rank_offsets("w", torch.zeros(2, 1 << 18), (0, group.rank, 3))
        with tier(group, tmp_path, ("e", "a", "f"), replicas=0) as opened:
            found = opened.restore({"w": part})
            assert found is not None
            assert torch.equal(found.state["w"], whole[2 * group.rank :][:2])

    run_ranks(1, save)
    run_ranks(3, load)


# Removal.


def test_the_place_of_a_save_that_has_just_begun_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = LocalStore.prepare

    def run(group: Any) -> None:
        with tier(group, tmp_path, ("a",), replicas=0) as opened:
            opened.save(1, {"w": torch.ones(3)})

            def prepared(self: LocalStore, folder: str) -> None:
                prepare(self, folder)
                # Something else is through, so that it is looked what can go.
                opened.hold(1)
                opened.release(1)
                opened.settle()

            monkeypatch.setattr(LocalStore, "prepare", prepared)
            opened.save(2, {"w": torch.ones(3)})

    run_ranks(1, run)
    assert (tmp_path / "a" / "step_00000002" / "checkpoint.json").exists()


def test_a_release_after_the_end_keeps_nobody_waiting(tmp_path: Path) -> None:
    def run(group: Any) -> None:
        with tier(group, tmp_path, ("a",), replicas=0) as opened:
            opened.save(1, {"w": torch.ones(3)})
            opened.hold(1)
        opened.release(1)
        waiter = threading.Thread(target=opened.settle, daemon=True)
        waiter.start()
        waiter.join(30)
        assert not waiter.is_alive()

    run_ranks(1, run)


def test_a_step_is_not_saved_again_before_its_removal_is_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delete, removing, waited = LocalStore.delete, threading.Event(), threading.Event()

    def run(group: Any) -> None:
        with tier(group, tmp_path, ("a",), replicas=0, keep=1) as opened:
            opened.save(1, {"w": torch.ones(3)})

            def deleted(self: LocalStore, name: str) -> None:
                delete(self, name)
                if self.location.endswith("step_00000001") and threading.current_thread().name == "giantstep-prune":
                    removing.set()
                    waited.wait(1)

            monkeypatch.setattr(LocalStore, "delete", deleted)
            opened.save(2, {"w": torch.ones(3)})
            assert removing.wait(30)
            opened.hold(1)
            assert not (tmp_path / "a" / "step_00000001").exists()
            opened.release(1)

    run_ranks(1, run)


def test_nothing_is_left_of_a_save_that_is_replaced_though_its_clock_was_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("giantstep.saving.new_save_id", lambda *_: "29991231T235959-0123456789abcdef")
    save_steps(tmp_path, 3)
    monkeypatch.undo()
    save_steps(tmp_path, 3)
    assert not list(tmp_path.rglob("29991231*"))
    assert restore(tmp_path)[0].step == 3
