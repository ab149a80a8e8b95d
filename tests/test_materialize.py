"""`materialize`: a step that shares no file with any other, and holds nothing that it does not need."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import BadArgumentError, CorruptionError
from giantstep.materializing import materialize
from giantstep.storage.base import read_all
from giantstep.storage.locate import StoreLike, store_at
from giantstep.storage.record_file import files_of_ours
from giantstep.testing.faults import CrashError, CrashingStore, Loss
from giantstep.testing.ranks import run_ranks
from independent_reader import read_checkpoint

BASE = torch.arange(40_000.0).reshape(200, 200)


def save(path: StoreLike, value: float, previous: Any = None, rows: int = 200) -> None:
    """A frozen base, a smaller tensor of one value, two tied tensors and a common state, by two ranks."""
    options = gs.SaveOptions(
        digests=True, previous=previous, block_bytes=4096, buffer_bytes=1 << 20, writer_threads=1, timeout_secs=20
    )

    def rank(group: Any) -> None:
        tied = torch.arange(300.0)
        state = {
            "base": gs.ShardedTensor.from_rank_offsets("base", BASE[:rows].chunk(2)[group.rank].clone(), (0, group.rank, 2)),
            "w": gs.ShardedTensor.from_rank_offsets("w", torch.full((2, 900), value), (0, group.rank, 2)),
            "first": tied,
            "second": tied,
            "value": value,
        }
        gs.save(state, path, process_group=group, options=options, content_metadata={"value": value})

    run_ranks(2, rank)


def check(path: StoreLike, value: float, rows: int = 200) -> None:
    checkpoint = gs.open_checkpoint(path)
    assert checkpoint.verify().ok
    assert (checkpoint["base"][...] == BASE[:rows].numpy()).all()
    assert set(checkpoint["w"][...].reshape(-1).tolist()) == {value}
    assert checkpoint.info("first").chunks == checkpoint.info("second").chunks
    assert (checkpoint.common, checkpoint.content_metadata) == ({"value": value}, {"value": value})
    store, record = store_at(path), checkpoint.record
    names = {"checkpoint.json", record.index.name, *(file.name for file in record.files)}
    assert set(files_of_ours(store)) == names
    read_checkpoint({name: read_all(store, name, 1 << 30) for name in names})


def links(path: Path) -> set[int]:
    return {(path / file.name).stat().st_nlink for file in gs.open_checkpoint(path).record.files}


def size(path: StoreLike) -> int:
    return sum(file.bytes for file in gs.open_checkpoint(path).record.files)


def test_a_materialised_step_shares_no_file_and_drops_what_is_dead(tmp_path: Path) -> None:
    save(tmp_path / "1", 1)
    save(tmp_path / "2", 2, tmp_path / "1")
    save(tmp_path / "3", 3, tmp_path / "2")
    assert links(tmp_path / "3") == {1, 3}
    before = size(tmp_path / "3")
    report = materialize(tmp_path / "3")
    assert links(tmp_path / "3") == {1}
    assert links(tmp_path / "2") == {1, 2}
    assert (report.bytes_before, report.bytes_copied) == (before, size(tmp_path / "3"))
    # What step 1 had in the files that step 3 linked, but for headers.
    assert before - 2 * 4 * 900 * 2 - 3 * 8192 < size(tmp_path / "3") < before - 4 * 900 * 2
    assert report.save_id == gs.open_checkpoint(tmp_path / "3").record.save_id
    assert "shares no files any more" in str(report)
    for step in (1, 2, 3):
        check(tmp_path / str(step), step)


def test_damage_to_a_shared_file_does_not_reach_it(tmp_path: Path) -> None:
    save(tmp_path / "1", 1)
    save(tmp_path / "2", 2, tmp_path / "1")
    save(tmp_path / "3", 3, tmp_path / "2")
    materialize(tmp_path / "2")
    largest = max(gs.open_checkpoint(tmp_path / "1").record.files, key=lambda file: file.bytes)
    with (tmp_path / "1" / largest.name).open("r+b") as file:
        file.seek(40_000)
        file.write(b"damage")
    assert not gs.open_checkpoint(tmp_path / "1").verify().ok
    assert not gs.open_checkpoint(tmp_path / "3").verify().ok
    check(tmp_path / "2", 2)
    names = sorted(path.name for path in (tmp_path / "3").rglob("*"))
    with pytest.raises(CorruptionError, match="checksum differs"):
        materialize(tmp_path / "3")
    assert sorted(path.name for path in (tmp_path / "3").rglob("*")) == names


def test_a_copy_elsewhere_leaves_the_step_as_it_is(tmp_path: Path) -> None:
    save(tmp_path / "1", 1)
    save(tmp_path / "2", 2, tmp_path / "1")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "2").rglob("*")}
    report = materialize(tmp_path / "2", tmp_path / "out" / "step")
    assert report.location == str(tmp_path / "out" / "step")
    assert report.deleted == ()
    check(tmp_path / "out" / "step", 2)
    assert links(tmp_path / "out" / "step") == {1}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "2").rglob("*")} == before
    with pytest.raises(BadArgumentError, match="holds a checkpoint already"):
        materialize(tmp_path / "1", tmp_path / "out" / "step")
    check(tmp_path / "out" / "step", 2)


def test_digests_stay_so_that_a_materialised_step_can_be_the_previous_one(tmp_path: Path) -> None:
    save(tmp_path / "1", 1)
    save(tmp_path / "2", 2, tmp_path / "1")
    old = gs.open_checkpoint(tmp_path / "2").index_tables().load_all()
    materialize(tmp_path / "2")
    new = gs.open_checkpoint(tmp_path / "2").index_tables().load_all()
    assert new.chunk_digest is not None
    assert (new.chunk_digest == old.chunk_digest).all()
    assert gs.open_checkpoint(tmp_path / "2").record.version == "1.1"
    save(tmp_path / "3", 3, tmp_path / "2")
    assert links(tmp_path / "2") == {2}
    check(tmp_path / "3", 3)


def test_a_plain_checkpoint_stays_plain(tmp_path: Path) -> None:
    gs.save({"w": torch.ones(10), "n": 1}, tmp_path)
    materialize(tmp_path)
    assert gs.open_checkpoint(tmp_path).record.version == "1.0"
    assert gs.open_checkpoint(tmp_path)["w"][...].tolist() == [1] * 10


def test_the_command_says_what_it_did_and_fails_with_a_line(tmp_path: Path) -> None:
    save(tmp_path / "1", 1)
    save(tmp_path / "2", 2, tmp_path / "1")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "giantstep.cli.main", "materialize", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    found = run(tmp_path / "2", "--out", tmp_path / "3")
    assert (found.returncode, found.stderr) == (0, "")
    assert f"{tmp_path / '3'} shares no files any more" in found.stdout
    assert run(tmp_path / "2").returncode == 0
    assert links(tmp_path / "2") == {1}
    found = run(tmp_path / "nowhere")
    assert found.returncode == 1
    assert "does not exist" in found.stderr


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_crash_before_or_after_any_operation_leaves_the_step_whole(after: bool, elsewhere: bool) -> None:
    def prepared() -> CrashingStore:
        store = CrashingStore()
        save(store.folder("1"), 1, rows=20)
        save(store.folder("2"), 2, store.folder("1"), rows=20)
        return store

    def run(store: CrashingStore) -> None:
        materialize(store.folder("2"), store.folder("out") if elsewhere else None)

    store = prepared()
    store.arm(None)
    run(store)
    count = len(store.operations)
    assert count > 15
    for position, loss in itertools.product(range(count), Loss):
        store = prepared()
        store.arm(position, after=after)
        with contextlib.suppress(CrashError):
            run(store)
        assert store.crashed
        left = store.after_power_loss(loss)
        check(left.folder("1"), 1, 20)
        assert gs.open_checkpoint(left.folder("2")).verify().ok
        assert set(gs.open_checkpoint(left.folder("2"))["w"][...].reshape(-1).tolist()) == {2}
        if elsewhere:
            with contextlib.suppress(gs.errors.OpenError):
                assert gs.open_checkpoint(left.folder("out")).verify().ok
        else:
            run(left)
            check(left.folder("2"), 2, 20)
