"""Incremental saves: what is unchanged is not written again, and each step is whole whatever becomes of the others."""

from __future__ import annotations

import errno
import itertools
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

import giantstep as gs
from giantstep.commit.remove import remove_checkpoint
from giantstep.errors import BadArgumentError, DisagreementError, StoreError
from giantstep.format.names import save_id_of
from giantstep.removal import remove_sharded_tensors
from giantstep.storage.base import Store, read_all
from giantstep.storage.local import LocalStore
from giantstep.storage.locate import StoreLike, store_at
from giantstep.storage.memory import MemoryStore
from giantstep.storage.record_file import files_of_ours
from giantstep.testing.faults import CrashingStore, Loss
from giantstep.testing.ranks import run_ranks, run_ranks_collecting
from independent_reader import StoredCheckpoint, read_checkpoint
from processes import results, run_processes

BLOCK = 4096
_NAMES = itertools.count()


def options(previous: Any = None, **more: Any) -> gs.SaveOptions:
    settings = {"block_bytes": BLOCK, "buffer_bytes": 1 << 20, "writer_threads": 1, "timeout_secs": 20} | more
    return gs.SaveOptions(digests=True, previous=previous, **settings)


@pytest.fixture
def root() -> Iterator[MemoryStore]:
    """A place for steps."""
    store = MemoryStore(f"incremental-{next(_NAMES)}")
    yield store
    for name in list(store.folders()):
        store.folder(name).clear()


def sharded(key: str, value: torch.Tensor, rank: int, ranks: int, axis: int = 0) -> gs.ShardedTensor:
    return gs.ShardedTensor.from_rank_offsets(key, value.chunk(ranks, axis)[rank].clone(), (axis, rank, ranks))


def save(
    state: dict[str, torch.Tensor], path: StoreLike, previous: Any = None, ranks: int = 2, axis: int = 0, **more: Any
) -> list[gs.SaveReport]:
    """Every tensor divided along an axis over the ranks, and a common state of plain values."""
    common = more.pop("common", {})

    def rank(group: Any) -> gs.SaveReport:
        shards = {f"at {key}": sharded(key, value, group.rank, ranks, axis) for key, value in state.items()}
        return gs.save({**shards, **common}, path, process_group=group, options=options(previous, **more))

    return run_ranks(ranks, rank)


def read(path: StoreLike) -> StoredCheckpoint:
    """The checkpoint as the independent reader sees it; all of it verified before, and nothing lies beside it."""
    checkpoint = gs.open_checkpoint(path)
    found = checkpoint.verify()
    assert found.ok, found.damages
    store, record = store_at(path), checkpoint.record
    names = {"checkpoint.json", record.index.name, *(file.name for file in record.files)}
    assert set(files_of_ours(store)) == names
    return read_checkpoint({name: read_all(store, name, 1 << 30) for name in names})


def check(path: StoreLike, state: dict[str, torch.Tensor]) -> StoredCheckpoint:
    stored = read(path)
    assert set(stored.tensors) == set(state)
    for key, value in state.items():
        assert stored.tensors[key].data.tobytes() == value.numpy().tobytes(), key
    return stored


def written(reports: list[gs.SaveReport]) -> int:
    return sum(report.bytes_written for report in reports)


def values(seed: int, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def data_names(path: StoreLike) -> set[str]:
    return {file.name for file in gs.open_checkpoint(path).record.files}


# What is shared.


def test_a_frozen_base_is_written_once_and_its_files_are_hard_links(tmp_path: Path) -> None:
    base, adapter = values(0, base=(200, 100)), values(1, adapter=(20, 10))
    first = save(base | adapter, tmp_path / "1", common={"step": 1})
    second = save(base | values(2, adapter=(20, 10)), tmp_path / "2", tmp_path / "1", common={"step": 2})
    assert written(first) == first[0].bytes
    assert {report.bytes_reused for report in second} == {200 * 100 * 4}
    assert written(second) == second[0].bytes - 200 * 100 * 4
    assert "78.1 KiB of it unchanged" in str(second[0])
    assert {report.not_reused for report in second} == {""}
    check(tmp_path / "1", base | adapter)
    check(tmp_path / "2", base | values(2, adapter=(20, 10)))
    assert gs.open_checkpoint(tmp_path / "2").common == {"step": 2}
    for name in data_names(tmp_path / "1"):
        assert (tmp_path / "1" / name).samefile(tmp_path / "2" / name)
    # The next one links from the second what the first wrote; the first may be gone.
    shutil.rmtree(tmp_path / "1")
    third = save(base | values(3, adapter=(20, 10)), tmp_path / "3", tmp_path / "2", common={"step": 3})
    assert third[0].bytes_reused == 200 * 100 * 4
    shutil.rmtree(tmp_path / "2")
    check(tmp_path / "3", base | values(3, adapter=(20, 10)))


def test_a_copy_of_a_step_is_complete_without_the_others(tmp_path: Path) -> None:
    state = values(0, a=(100, 10), b=(100, 10))
    save(state, tmp_path / "1")
    save(state, tmp_path / "2", tmp_path / "1")
    shutil.copytree(tmp_path / "2", tmp_path / "copy")
    shutil.rmtree(tmp_path / "1")
    shutil.rmtree(tmp_path / "2")
    check(tmp_path / "copy", state)


def test_nothing_changed_means_that_nothing_is_written_and_all_changed_that_all_is(root: MemoryStore) -> None:
    state = values(0, a=(64, 64), b=(8, 3))
    save(state, root.folder("1"), common={"same": True})
    same = save(state, root.folder("2"), root.folder("1"), common={"same": True})
    assert written(same) == 0
    assert same[0].bytes_reused == same[0].bytes
    assert data_names(root.folder("2")) == data_names(root.folder("1"))
    other = save(values(1, a=(64, 64), b=(8, 3)), root.folder("3"), root.folder("2"), common={"same": False})
    assert (other[0].bytes_reused, written(other)) == (0, other[0].bytes)
    assert not data_names(root.folder("3")) & data_names(root.folder("1"))
    check(root.folder("2"), state)


def test_what_has_settled_in_mostly_dead_files_is_written_once_more_into_files_of_its_own(root: MemoryStore) -> None:
    """A paused average is a fifth of the state: its files are mostly dead at the next step, and not at the one after."""
    ema = values(0, ema=(200, 50))
    reports = []
    for step in range(4):
        previous = root.folder(str(step - 1)) if step else None
        state = ema | values(step + 1, w=(200, 50), m=(200, 50), v=(200, 50), z=(200, 50))
        reports.append(save(state, root.folder(str(step)), previous))
        check(root.folder(str(step)), state)
    assert [report[0].bytes_reused for report in reports] == [0, 0, 40_000, 40_000]
    assert [report[0].bytes_dead for report in reports] == [0] * 4


def digests_taken(path: StoreLike) -> list[str]:
    """Keys of tensors with digests."""
    checkpoint = gs.open_checkpoint(path)
    index = checkpoint.index_tables().load_all()
    assert index.chunk_digest is not None
    rows = np.repeat(np.arange(len(checkpoint)), np.diff(index.tensor_chunk_ends))
    taken = index.chunk_digest.any(axis=1)
    return [key for row, key in enumerate(checkpoint.keys()) if taken[rows == row].all()]


def test_what_changes_at_every_step_costs_no_digests_and_is_found_once_it_rests(root: MemoryStore) -> None:
    shape = (2, 200, 100)
    state = values(0, base=shape, moving=shape, rare=shape)
    save(state, root.folder("0"), least_live=0.1)
    assert digests_taken(root.folder("0")) == ["base", "moving", "rare"]
    plan = [  # What changes; what has digests then; whether base, moving and rare are used again.
        ({"moving"}, ["base", "rare"], "base rare"),
        ({"moving"}, ["base", "rare"], "base rare"),
        ({"moving", "rare"}, ["base", "rare"], "base"),
        (set(), ["base", "moving", "rare"], "base rare"),
        (set(), ["base", "moving", "rare"], "base moving rare"),
        ({"base"}, ["base", "moving", "rare"], "moving rare"),
        (set(), ["base", "moving", "rare"], "base moving rare"),
    ]
    for step, (changes, digested, reused) in enumerate(plan, 1):
        state = {key: value + 1 if key in changes else value for key, value in state.items()}
        reports = save(state, root.folder(str(step)), root.folder(str(step - 1)), least_live=0.1)
        assert digests_taken(root.folder(str(step))) == digested, step
        assert reports[0].bytes_reused == 160_000 * len(reused.split()), step
        check(root.folder(str(step)), state)


def test_a_change_behind_the_head_is_found(root: MemoryStore) -> None:
    state = values(0, a=(2, 200, 100))
    save(state, root.folder("0"))
    for step in (1, 2):
        state["a"] = state["a"].clone()
        state["a"][1, 199, 99] += 1
        save(state, root.folder(str(step)), root.folder(str(step - 1)))
        check(root.folder(str(step)), state)


def test_dead_bytes_in_linked_files_are_bounded_and_told(root: MemoryStore) -> None:
    names = [f"e{number}" for number in range(8)]
    state = {name: torch.full((64, 64), float(number)) for number, name in enumerate(names)}
    save(state, root.folder("0"), ranks=1)
    dead = []
    for step, name in enumerate(names, 1):
        state[name] = state[name] + 100
        (report,) = save(state, root.folder(str(step)), root.folder(str(step - 1)), ranks=1)
        check(root.folder(str(step)), state)
        dead.append(report.bytes_dead)
        total = sum(file.bytes for file in gs.open_checkpoint(root.folder(str(step))).record.files)
        assert total <= 2 * report.bytes + 10 * 8192
    assert dead[:4] == pytest.approx([16384, 2 * 16384, 3 * 16384, 4 * 16384], abs=8192)
    assert dead[4] == 0


def test_many_generations_of_small_files_are_gathered(root: MemoryStore) -> None:
    state = {f"e{number:02}": torch.full((64, 64), float(number)) for number in range(100)}
    save(state, root.folder("0"), ranks=1)
    for step, name in enumerate([*state][:60], 1):
        state[name] = state[name] + 1000
        save(state, root.folder(str(step)), root.folder(str(step - 1)), ranks=1)
        assert len(data_names(root.folder(str(step)))) <= 34
        if step > 1:
            remove_checkpoint(root.folder(str(step - 2)))
    check(root.folder("60"), state)


def test_files_of_the_greatest_size_are_used_however_many_there_are(root: MemoryStore) -> None:
    state = values(0, **{f"w{number:02}": (250, 250) for number in range(40)})
    limits = {"ranks": 1, "max_file_bytes": 1 << 20}
    save(state, root.folder("0"), **limits)
    assert len(data_names(root.folder("0"))) > 9
    (report,) = save(state, root.folder("1"), root.folder("0"), **limits)
    assert report.bytes_written == 0
    check(root.folder("1"), state)


def test_equality_is_of_bits(root: MemoryStore) -> None:
    payload = torch.tensor([0x7FC00001, 0x7FC00002], dtype=torch.int32).view(torch.float32)
    first = {"zero": torch.zeros(3000), "nan": payload.repeat(1500)}
    save(first, root.folder("0"), ranks=1, least_live=0.1)
    second = {"zero": -torch.zeros(3000), "nan": payload.repeat(1500)}
    (report,) = save(second, root.folder("1"), root.folder("0"), ranks=1, least_live=0.1)
    assert report.bytes_reused == 12_000
    check(root.folder("1"), second)


# Layouts.


def test_another_layout_is_written_and_used_from_then_on(root: MemoryStore) -> None:
    state = values(0, a=(60, 60), b=(30, 60))
    save(state, root.folder("0"), ranks=2)
    resharded = save(state, root.folder("1"), root.folder("0"), ranks=3, axis=1)
    assert resharded[0].bytes_reused == 0
    again = save(state, root.folder("2"), root.folder("1"), ranks=3, axis=1)
    assert written(again) == 0
    for step in "012":
        check(root.folder(step), state)


def test_fewer_or_more_ranks_with_the_same_regions_use_files_whoever_wrote_them(root: MemoryStore) -> None:
    state = values(0, a=(60, 60), b=(60, 60), c=(60, 60), d=(60, 60))

    def whole_on(ranks: int, path: Store, previous: Store | None) -> list[gs.SaveReport]:
        def rank(group: Any) -> gs.SaveReport:
            mine = {
                key: gs.ShardedTensor.from_rank_offsets(key, value)
                for number, (key, value) in enumerate(state.items())
                if number % ranks == group.rank
            }
            return gs.save(mine, path, process_group=group, options=options(previous))

        return run_ranks(ranks, rank)

    whole_on(4, root.folder("0"), None)
    for step, ranks in enumerate((1, 3, 2), 1):
        assert written(whole_on(ranks, root.folder(str(step)), root.folder(str(step - 1)))) == 0
        check(root.folder(str(step)), state)
        assert gs.open_checkpoint(root.folder(str(step))).record.world_size == ranks


@pytest.mark.parametrize("cached", [False, True])
def test_replicas_are_divided_alike_although_the_common_state_grows(root: MemoryStore, cached: bool) -> None:
    value = torch.randn(400, 300)
    caches = [gs.PlanCache() if cached else None for _ in range(3)]
    for step in range(4):

        def rank(group: Any, step: int = step) -> gs.SaveReport:
            previous = root.folder(str(step - 1)) if step else None
            chosen = options(previous, split_bytes=4096, plan_cache=caches[group.rank])
            return gs.save({"w": value, "log": "x" * 5000 * step}, root.folder(str(step)), process_group=group, options=chosen)

        reports = run_ranks(3, rank)
        assert reports[0].plan_reused == (cached and step > 0)
        assert all(report.bytes_written > 0 for report in reports) == (step == 0)
        assert reports[0].bytes_reused == (400 * 300 * 4 if step else 0)
    assert gs.open_checkpoint(root.folder("3")).verify().ok
    assert (gs.open_checkpoint(root.folder("3"))["w"][...] == value.numpy()).all()


def test_a_key_of_another_dtype_or_shape_is_written(root: MemoryStore) -> None:
    save({"w": torch.zeros(1000), "v": torch.zeros(50, 20)}, root.folder("0"), ranks=1)
    state = {"w": torch.zeros(1000, dtype=torch.int32), "v": torch.zeros(1000)}
    (report,) = save(state, root.folder("1"), root.folder("0"), ranks=1)
    assert report.bytes_reused == 0
    check(root.folder("1"), state)


def test_a_tensor_that_grew_keeps_the_regions_that_it_had(root: MemoryStore) -> None:
    old = torch.randn(400, 20)

    def save_rows(rows: torch.Tensor, path: Store, previous: Store | None) -> list[gs.SaveReport]:
        def rank(group: Any) -> gs.SaveReport:
            first = group.rank * 200
            part = rows[first : first + 200]
            shard = gs.ShardedTensor("w", part, part.dtype, tuple(part.shape), tuple(rows.shape), (first, 0), None)
            return gs.save({"w": shard}, path, process_group=group, options=options(previous))

        return run_ranks(len(rows) // 200, rank)

    save_rows(old, root.folder("0"), None)
    grown = torch.cat((old, torch.randn(200, 20)))
    assert save_rows(grown, root.folder("1"), root.folder("0"))[0].bytes_reused == old.nbytes
    check(root.folder("1"), {"w": grown})


def test_tensors_that_are_tied_no_longer_share_no_bytes(root: MemoryStore) -> None:
    shared = torch.randn(100, 30)
    gs.save({"a": shared, "b": shared}, root.folder("0"), options=options())
    again = gs.save({"a": shared, "b": shared}, root.folder("1"), options=options(root.folder("0")))
    assert again.bytes_written == 0
    apart = gs.save({"a": shared, "b": shared.clone()}, root.folder("2"), options=options(root.folder("1")))
    assert (apart.bytes_reused, apart.bytes_written) == (shared.nbytes, shared.nbytes)
    tied = gs.save({"a": shared, "b": shared}, root.folder("3"), options=options(root.folder("2")))
    assert tied.bytes == tied.bytes_reused == shared.nbytes
    for step in "0123":
        assert set(read(root.folder(step)).tensors) == {"a", "b"}


def test_objects_are_used_again_like_tensors(root: MemoryStore) -> None:
    for step in range(3):

        def rank(group: Any, step: int = step) -> gs.SaveReport:
            loader = gs.ShardedObject("loader", bytes(5000), (2,), (group.rank,))
            counter = gs.ShardedObject("counter", step, (2,), (group.rank,))
            previous = root.folder(str(step - 1)) if step else None
            state = {"loader": loader, "counter": counter, "step": step}
            return gs.save(state, root.folder(str(step)), process_group=group, options=options(previous))

        reports = run_ranks(2, rank)
        assert (reports[0].bytes_reused > 10_000) == (step > 0)
        checkpoint = gs.open_checkpoint(root.folder(str(step)))
        assert checkpoint.verify().ok
        assert checkpoint.common == {"step": step}
        assert checkpoint.objects() == {
            f"{name}/shard_{n}_2": (bytes(5000) if name == "loader" else step) for name in ("loader", "counter") for n in (0, 1)
        }


# Other operations.


def test_a_step_may_be_saved_over_the_one_that_it_begins_from(tmp_path: Path) -> None:
    base = values(0, base=(200, 50))
    save(base | values(1, w=(20, 50)), tmp_path)
    for seed in (2, 3):
        reports = save(base | values(seed, w=(20, 50)), tmp_path, tmp_path)
        assert reports[0].bytes_reused == 40_000
        check(tmp_path, base | values(seed, w=(20, 50)))
    # And over another one.
    save(values(9, other=(10, 10)), tmp_path / "x")
    save(base | values(3, w=(20, 50)), tmp_path / "x", tmp_path)
    check(tmp_path / "x", base | values(3, w=(20, 50)))
    # A full save afterwards leaves nothing of the earlier ones.
    save(base, tmp_path)
    check(tmp_path, base)
    assert len({save_id_of(name) for name in files_of_ours(LocalStore(tmp_path))} - {None}) == 1


def test_tensors_can_be_removed_from_an_incremental_step_without_harm_to_the_others(root: MemoryStore) -> None:
    state = values(0, gone=(100, 20), kept=(100, 20), new=(100, 20))
    save(state, root.folder("0"))
    state["new"] = state["new"] + 1
    save(state, root.folder("1"), root.folder("0"))
    before = dict(state)
    remove_sharded_tensors(root.folder("1"), "gone")
    del state["gone"]
    check(root.folder("1"), state)
    assert save(state, root.folder("2"), root.folder("1"))[0].bytes_reused == 16_000
    check(root.folder("2"), state)
    assert set(read(root.folder("0")).tensors) == set(before)


def test_saves_in_the_background_use_the_step_that_was_in_flight_when_they_began(root: MemoryStore) -> None:
    base, moving = torch.randn(300, 40), torch.zeros(10, 40)

    def rank(group: Any) -> list[gs.SaveReport]:
        pending = []
        for step in range(3):
            moving_now = moving + step
            state = {"base": sharded("base", base, group.rank, 2), "w": sharded("w", moving_now, group.rank, 2)}
            previous = root.folder(str(step - 1)) if step else None
            chosen = options(previous, max_pending=3)
            pending.append(gs.async_save(state, root.folder(str(step)), process_group=group, options=chosen))
            # What is staged is a copy: later changes do not reach it, nor its digests.
            state["w"].data.fill_(-1)
        found = [one.result(60) for one in pending]
        gs.finish_saves(60)
        return found

    reports = run_ranks(2, rank)
    assert [report.bytes_reused for report in reports[1]] == [0, base.nbytes, base.nbytes]
    assert "compare" in reports[0][1].seconds
    for step in range(3):
        check(root.folder(str(step)), {"base": base, "w": moving + step})


def save_steps(rank: int, folder: str) -> list[tuple[int, int]]:
    """Two steps by real processes; bytes reused and written by this rank."""
    found = []
    for step in range(2):
        state = {
            "base": sharded("base", torch.arange(20_000.0).reshape(200, 100), rank, 2),
            "step": step,
            "w": torch.full((9,), float(step)),
        }
        previous = f"{folder}/{step - 1}" if step else None
        report = gs.save(state, f"{folder}/{step}", options=options(previous))
        found.append((report.bytes_reused, report.bytes_written))
    return found


def test_processes_share_what_they_need_not_write(tmp_path: Path) -> None:
    first, second = results(run_processes(2, save_steps, str(tmp_path)))
    assert first[1][0] == second[1][0] == 80_000
    assert first[1][1] + second[1][1] < 1000
    assert gs.open_checkpoint(tmp_path / "1").verify().ok
    assert (gs.open_checkpoint(tmp_path / "1")["base"][...].reshape(-1) == np.arange(20_000)).all()


# What stands against it.


def refusal(root: MemoryStore, caplog: pytest.LogCaptureFixture, previous: Any, **more: Any) -> str:
    """Why a save that could use everything again writes everything."""
    state = values(0, a=(64, 64))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "giantstep"):
        reports = save(state, root.folder("next"), previous, **more)
    assert (written(reports), reports[0].bytes_reused) == (64 * 64 * 4, 0)
    check(root.folder("next"), state)
    told = [record for record in caplog.records if "used again" in record.message]
    assert len(told) == 1
    assert reports[0].not_reused in told[0].getMessage()
    assert {report.not_reused for report in reports} == {reports[0].not_reused}
    return reports[0].not_reused


def test_a_previous_step_that_cannot_be_used_costs_a_full_save_and_a_warning(
    root: MemoryStore, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    state = values(0, a=(64, 64))
    assert "does not exist" in refusal(root, caplog, root.folder("nowhere"))
    save(state, tmp_path / "disk")
    assert "cannot share files" in refusal(root, caplog, tmp_path / "disk")
    save(state, root.folder("0"))
    assert "blocks of 4096 bytes, this save of 8192" in refusal(root, caplog, root.folder("0"), block_bytes=8192)
    gs.save(state, root.folder("plain"), options=gs.SaveOptions(block_bytes=BLOCK))
    assert "saved without digests" in refusal(root, caplog, root.folder("plain"))
    index = gs.open_checkpoint(root.folder("0")).record.index.name
    data = root.folder("0")._files()[index]
    data[-1] ^= 1
    assert "is damaged" in refusal(root, caplog, root.folder("0"))
    data[-1] ^= 1
    root.folder("0").delete("checkpoint.json")
    assert "never committed" in refusal(root, caplog, root.folder("0"))


def test_a_file_that_vanishes_or_shrinks_before_it_is_linked_is_written_again(
    root: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    state = values(0, a=(100, 50), b=(100, 50))
    save(state, root.folder("0"))
    gone, _ = sorted(data_names(root.folder("0")))
    root.folder("0").delete(gone)
    reports = save(state, root.folder("1"), root.folder("0"))
    assert (reports[0].bytes_reused, written(reports)) == (20_000, 20_000)
    assert f"{gone} is gone from" in reports[0].not_reused
    check(root.folder("1"), state)
    (kept,) = data_names(root.folder("1")) & data_names(root.folder("0"))
    del root.folder("1")._files()[kept][-1]
    reports = save(state, root.folder("2"), root.folder("1"))
    assert "expected" in reports[0].not_reused
    assert (reports[0].bytes_reused, written(reports)) == (20_000, 20_000)
    check(root.folder("2"), state)


def test_an_error_while_linking_is_told_to_all_ranks_and_leaves_no_link(
    root: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = values(0, a=(100, 50))
    save(state, root.folder("0"))
    original, calls = MemoryStore.link, itertools.count()

    def link(self: MemoryStore, name: str, source: Store, source_name: str) -> None:
        if next(calls) == 1:
            raise OSError(errno.EIO, "injected")
        original(self, name, source, source_name)

    monkeypatch.setattr(MemoryStore, "link", link)
    errors = failures(state, root.folder("1"), root.folder("0"))
    assert [type(error) for error in errors] == [StoreError, StoreError]
    assert "injected" in str(errors[1])
    assert files_of_ours(root.folder("1")) == []


def failures(state: dict[str, torch.Tensor], path: Store, previous: Store) -> list[BaseException | None]:
    def rank(group: Any) -> None:
        shards = {key: sharded(key, value, group.rank, 2) for key, value in state.items()}
        gs.save(shards, path, process_group=group, options=options(previous))

    return run_ranks_collecting(2, rank)[1]


def test_a_save_that_fails_to_write_takes_its_links_back(root: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    state = values(0, a=(100, 50), b=(50, 10))
    save(state, root.folder("0"))
    original: Callable[..., Any] = MemoryStore.create

    def create(self: MemoryStore, name: str, size: int, *, direct: bool) -> Any:
        if "-r00001-" in name:
            raise OSError(errno.ENOSPC, "no space")
        return original(self, name, size, direct=direct)

    monkeypatch.setattr(MemoryStore, "create", create)
    errors = failures(state | values(1, b=(50, 10)), root.folder("1"), root.folder("0"))
    assert [type(error) for error in errors] == [StoreError, StoreError]
    assert files_of_ours(root.folder("1")) == []
    check(root.folder("0"), state)


def test_ranks_must_name_the_same_previous_step(root: MemoryStore) -> None:
    save(values(0, a=(10, 10)), root.folder("0"))

    def rank(group: Any) -> None:
        previous = root.folder("0") if group.rank else None
        gs.save({"a": 1}, root.folder("1"), process_group=group, options=options(previous))

    errors = run_ranks_collecting(2, rank)[1]
    assert [type(error) for error in errors] == [DisagreementError, DisagreementError]
    assert "previous is None on rank 0 and 'memory://" in str(errors[0])


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for settings in ({"previous": 3}, {"previous": ""}, {"least_live": 0}, {"least_live": 1.5}, {"digests": "yes"}):
        with pytest.raises(BadArgumentError, match=next(iter(settings))):
            gs.SaveOptions(**settings)  # type: ignore[arg-type]
    with pytest.raises(BadArgumentError, match="s3://"):
        gs.save({"a": 1}, tmp_path, options=gs.SaveOptions(previous="s3://bucket/step"))
    assert list(tmp_path.iterdir()) == []


# Bytes of the format.


def test_plain_saves_are_of_version_1_0_and_digests_are_those_of_the_bytes(root: MemoryStore) -> None:
    state = values(0, a=(64, 30), b=(4, 2))
    gs.save(state, root.folder("plain"))
    plain = gs.open_checkpoint(root.folder("plain"))
    assert plain.record.version == "1.0"
    assert plain.index_tables().load_all().chunk_digest is None
    save(state, root.folder("0"), common={"step": 3})
    checkpoint = gs.open_checkpoint(root.folder("0"))
    assert checkpoint.record.version == "1.1"
    index = checkpoint.index_tables().load_all()
    assert index.chunk_digest is not None
    assert index.object_digest is not None
    files = [read_all(root.folder("0"), file.name, 1 << 30) for file in checkpoint.record.files]
    for kind, digests in (("chunk", index.chunk_digest), ("object", index.object_digest)):
        places = zip(*(getattr(index, f"{kind}_{part}").tolist() for part in ("file", "start", "bytes")), strict=True)
        found = [xxhash.xxh3_128_intdigest(files[file][start : start + size]) for file, start, size in places]
        assert [int(high) << 64 | int(low) for high, low in digests] == found
        assert len(found) > 0
    assert np.array_equal(
        index.chunk_digest, np.unique(index.chunk_digest, axis=0)[np.argsort(np.argsort(index.chunk_digest[:, 0]))]
    )


@pytest.mark.parametrize("direct", ["auto", "never"])
@pytest.mark.parametrize("strided", [10, 300], ids=["few to be gathered", "many to be gathered"])
@pytest.mark.parametrize("threads", [1, 3])
def test_digests_taken_while_bytes_are_written_are_those_of_the_bytes(
    tmp_path: Path, threads: int, strided: int, direct: str
) -> None:
    """Entries of less and more than a stretch, beside each other in memory or not; files past the page cache or not."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(200_000, generator=generator)
    state = {
        "big": torch.randn(1_500_000, generator=generator),
        "gathered": torch.randn(strided, 100, generator=generator).T,
        **{f"near{number}": flat[number * 50_000 : (number + 1) * 50_000] for number in range(4)},
        "odd": torch.randn(12_345, generator=generator).to(torch.bfloat16),
        "one": torch.tensor(1.0),
    }
    chosen = options(buffer_bytes=1 << 16, writer_threads=threads, direct_io=direct)
    gs.save({**state, "n": 1}, tmp_path / "1", options=chosen)
    checkpoint = gs.open_checkpoint(tmp_path / "1")
    index = checkpoint.index_tables().load_all()
    assert index.chunk_digest is not None
    for row, key in enumerate(checkpoint.keys()):
        (chunk,) = index.chunk_digest[index.tensor_chunk_ends[row] : index.tensor_chunk_ends[row + 1]]
        data = state[key].contiguous().reshape(-1).view(torch.uint8).numpy()
        assert chunk.astype(">u8").tobytes() == xxhash.xxh3_128_digest(data), key
    assert index.object_digest is not None
    assert index.object_digest.any()
    report = gs.save({**state, "n": 1}, tmp_path / "2", options=options(tmp_path / "1", buffer_bytes=1 << 16))
    assert report.bytes_written == 0


def test_tensors_that_must_be_gathered_first_have_the_digest_of_their_elements(root: MemoryStore) -> None:
    value = torch.randn(50, 60)
    gs.save({"w": value, "c": torch.view_as_complex(torch.randn(9, 2)).conj()}, root.folder("0"), options=options())
    strided = value.t().contiguous().t()
    same = {
        "w": strided,
        "c": gs.load({"c": torch.zeros(9, dtype=torch.complex64)}, root.folder("0"), strict=gs.StrictHandling.RETURN_ALL)["c"],
    }
    assert not strided.is_contiguous()
    assert gs.save(same, root.folder("1"), options=options(root.folder("0"), writer_threads=3)).bytes_written == 0


# Crashes.


@pytest.mark.parametrize("after", [False, True])
def test_crash_before_or_after_any_operation_leaves_the_earlier_step_whole_and_the_new_one_whole_or_unfinished(
    after: bool,
) -> None:
    base, old, new = values(0, base=(20, 50)), values(1, w=(6, 50)), values(2, w=(6, 50))

    def prepared() -> CrashingStore:
        store = CrashingStore()
        save(base | old, store.folder("1"))
        return store

    def attempt(store: CrashingStore) -> None:
        failures(base | new, store.folder("2"), store.folder("1"))  # type: ignore[arg-type]

    store = prepared()
    store.arm(None)
    attempt(store)
    operations = store.operations
    assert sum(operation.startswith("link ") for operation in operations) == 2
    outcomes = set()
    for position, loss in itertools.product(range(len(operations)), Loss):
        store = prepared()
        store.arm(position, after=after)
        attempt(store)
        assert store.crashed
        left = store.after_power_loss(loss)
        check(left.folder("1"), base | old)
        try:
            gs.open_checkpoint(left.folder("2"))
        except gs.errors.OpenError:
            outcomes.add("unfinished")
        else:
            outcomes.add("whole")
            record = gs.open_checkpoint(left.folder("2")).record
            assert gs.open_checkpoint(left.folder("2")).verify().ok
            assert len(record.files) == 4
        # The next save over what is left works, and leaves nothing else behind; the earlier step may go then.
        reports = save(base | new, left.folder("2"), left.folder("1"))
        assert reports[0].bytes_reused == 4000
        remove_checkpoint(left.folder("1"))
        check(left.folder("2"), base | new)
    assert outcomes == {"unfinished", "whole"}
