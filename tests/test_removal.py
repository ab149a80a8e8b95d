"""`remove_sharded_tensors`: what it removes, keeps and rewrites; what failures leave."""

from __future__ import annotations

import contextlib
import errno
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import giantstep as gs
import giantstep.rewriting
from giantstep.errors import KeyMismatchError, NotACheckpointError
from giantstep.format.names import save_id_of
from giantstep.format.record import decode_record, encode_record
from giantstep.removal import RemovalReport, remove_sharded_tensors
from giantstep.storage.base import Store, read_all
from giantstep.storage.locate import StoreLike, store_at
from giantstep.storage.memory import MemoryStore
from giantstep.storage.record_file import files_of_ours
from giantstep.testing.faults import CrashError, CrashingStore, Loss
from giantstep.testing.ranks import run_ranks
from handmade import save_objects, save_tied
from independent_reader import StoredCheckpoint, read_checkpoint
from layouts import DTYPES, bits, random_tensor

MIB = 1 << 20
OPTIONS = gs.SaveOptions(block_bytes=4096, buffer_bytes=MIB, max_file_bytes=MIB, writer_threads=1, timeout_secs=20)

Shapes = dict[str, tuple[int, ...]]
# Per rank of two and in the order of keys, files of at most 1 MiB: one of removed tensors, a mixed one, one of kept tensors.
SHAPES: Shapes = {
    "gone.first": (700, 512),
    "gone.large": (700, 512),
    "gone.small": (6, 3),
    "kept.few": (2, 1),
    "kept.large": (700, 512),
    "kept.small": (1000, 4),
}


def value_of(key: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return random_tensor(shape, dtype, zlib.crc32(key.encode()))


def save(path: StoreLike, shapes: Shapes, ranks: int = 2, options: gs.SaveOptions = OPTIONS, **common: Any) -> None:
    """Every tensor divided along its first axis over the ranks."""

    def rank(group: Any) -> None:
        state: dict[str, Any] = dict(common)
        for key, shape in shapes.items():
            part = value_of(key, shape).chunk(ranks)[group.rank]
            state[f"at {key}"] = gs.ShardedTensor.from_rank_offsets(key, part, (0, group.rank, ranks))
        gs.save(state, path, process_group=group, options=options, content_metadata={"tokens": 7})

    run_ranks(ranks, rank)


def bytes_in(store: Store) -> dict[str, bytes]:
    """All files of ours by name."""
    return {name: read_all(store, name, 1 << 30) for name in files_of_ours(store)}


def named_by(path: StoreLike) -> set[str]:
    record = gs.open_checkpoint(path).record
    return {"checkpoint.json", record.index.name, *(file.name for file in record.files)}


def read(path: StoreLike) -> StoredCheckpoint:
    """The checkpoint as the independent reader sees it, every block checked before."""
    found = gs.open_checkpoint(path).verify()
    assert found.ok, found.damages
    store = store_at(path)
    return read_checkpoint({name: read_all(store, name, 1 << 30) for name in named_by(path)})


def check(path: StoreLike, shapes: Shapes, **common: Any) -> StoredCheckpoint:
    """Exactly these tensors are there, to the bit, and this common state."""
    stored = read(path)
    assert set(stored.tensors) == set(shapes)
    for key, shape in shapes.items():
        assert stored.tensors[key].data.tobytes() == bits(value_of(key, shape)), key
    assert gs.open_checkpoint(path).common == common
    return stored


def without(shapes: Shapes, prefix: str) -> Shapes:
    return {key: shape for key, shape in shapes.items() if not key.startswith(prefix)}


def test_tensors_with_the_prefix_go_and_the_others_stay_to_the_bit(tmp_path: Path) -> None:
    save(tmp_path, SHAPES, epoch=3)
    before, old = gs.open_checkpoint(tmp_path).record, bytes_in(store_at(tmp_path))
    report = remove_sharded_tensors(tmp_path, "gone")
    check(tmp_path, without(SHAPES, "gone"), epoch=3)
    after, new = gs.open_checkpoint(tmp_path).record, bytes_in(store_at(tmp_path))
    assert report.tensors == ("gone.first", "gone.large", "gone.small")
    assert report.objects == ()
    assert report.location == str(tmp_path)
    assert report.save_id == after.save_id
    assert report.freed_bytes == sum(file.bytes for file in before.files) - sum(file.bytes for file in after.files)
    assert report.freed_bytes >= 2 * 700 * 512 * 4
    assert set(report.deleted) == set(old) - set(new)
    assert "removed 3 tensors and 0 objects" in str(report)
    assert set(new) == named_by(tmp_path)


def test_files_of_kept_tensors_are_untouched_and_only_mixed_ones_are_rewritten(tmp_path: Path) -> None:
    save(tmp_path, SHAPES, epoch=3)
    checkpoint, old = gs.open_checkpoint(tmp_path), bytes_in(store_at(tmp_path))
    holds = {
        file.name: {key[:4] for key in SHAPES for chunk in checkpoint.info(key).chunks if chunk.file == file.name}
        for file in checkpoint.record.files
    }
    assert {frozenset(kinds) for kinds in holds.values()} == {
        frozenset({"gone"}),
        frozenset({"kept"}),
        frozenset({"gone", "kept"}),
    }
    report = remove_sharded_tensors(tmp_path, "gone")
    new = bytes_in(store_at(tmp_path))
    for name, kinds in holds.items():
        assert (name in new) == (kinds == {"kept"}), name
        assert new.get(name, old[name]) == old[name]
    written = {name for name in new if save_id_of(name) == report.save_id and name.startswith("data/")}
    assert written == {f"data/{report.save_id}-r{rank:05d}-0.safetensors" for rank in (0, 1)}
    ranks = {file.name: file.rank for file in gs.open_checkpoint(tmp_path).record.files}
    assert {ranks[name] for name in written} == {0, 1}


def test_record_keeps_what_it_says_of_the_save_but_id_and_time(tmp_path: Path) -> None:
    save(tmp_path, SHAPES)
    old = gs.open_checkpoint(tmp_path).record
    remove_sharded_tensors(tmp_path, "gone")
    new = gs.open_checkpoint(tmp_path).record
    assert (new.world_size, new.block_bytes, new.content_metadata) == (2, 4096, {"tokens": 7})
    assert new.save_id > old.save_id
    assert new.created >= old.created
    assert (new.totals.tensors, new.totals.objects) == (3, 0)


def test_removing_again_and_then_all_works_and_leaves_the_common_state(tmp_path: Path) -> None:
    save(tmp_path, SHAPES, epoch=3, common_prefix="x")
    remove_sharded_tensors(tmp_path, "gone.small")
    remove_sharded_tensors(tmp_path, "kept.f")
    check(
        tmp_path,
        {key: SHAPES[key] for key in ("gone.first", "gone.large", "kept.large", "kept.small")},
        epoch=3,
        common_prefix="x",
    )
    assert set(files_of_ours(store_at(tmp_path))) == named_by(tmp_path)
    report = remove_sharded_tensors(tmp_path, "")
    assert report.tensors == ("gone.first", "gone.large", "kept.large", "kept.small")
    check(tmp_path, {}, epoch=3, common_prefix="x")
    with pytest.raises(KeyMismatchError, match="among 0 tensors and 0 objects"):
        remove_sharded_tensors(tmp_path, "")


def test_a_checkpoint_of_tensors_alone_can_lose_them_all(tmp_path: Path) -> None:
    save(tmp_path, SHAPES)
    remove_sharded_tensors(tmp_path, "")
    check(tmp_path, {})
    assert gs.open_checkpoint(tmp_path).record.files == ()


def test_what_is_left_loads_under_another_layout(tmp_path: Path) -> None:
    save(tmp_path, SHAPES, ranks=2, epoch=3)
    remove_sharded_tensors(tmp_path, "gone")
    key, shape = "kept.small", SHAPES["kept.small"]

    def rank(group: Any) -> torch.Tensor:
        part = gs.ShardedTensor.from_rank_offsets(key, torch.zeros(shape[0], 1), (1, group.rank, 4))
        state = gs.load({"w": part}, tmp_path, process_group=group, strict=gs.StrictHandling.RAISE_UNEXPECTED)
        assert state["epoch"] == 3
        found: torch.Tensor = state["w"]
        return found

    assert bits(torch.cat(run_ranks(4, rank), dim=1)) == bits(value_of(key, shape))


def test_a_save_over_it_leaves_no_file_of_any_earlier_save(tmp_path: Path) -> None:
    save(tmp_path, SHAPES)
    remove_sharded_tensors(tmp_path, "gone.small")
    remove_sharded_tensors(tmp_path, "gone.large")
    assert len({save_id_of(name) for name in named_by(tmp_path)} - {None}) > 1
    save(tmp_path, {"new": (6, 4)}, ranks=3)
    check(tmp_path, {"new": (6, 4)})
    assert set(files_of_ours(store_at(tmp_path))) == named_by(tmp_path)


def test_a_clock_that_runs_back_costs_no_file_and_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, SHAPES)
    with monkeypatch.context() as patch:
        patch.setattr(giantstep.rewriting, "new_save_id", lambda *_: "20010101T000000-0123456789abcdef")
        remove_sharded_tensors(tmp_path, "gone")
    check(tmp_path, without(SHAPES, "gone"))
    assert set(files_of_ours(store_at(tmp_path))) == named_by(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(giantstep.saving, "new_save_id", lambda *_: "20020202T000000-0123456789abcdef")
        save(tmp_path, {"new": (4, 4)})
    check(tmp_path, {"new": (4, 4)})
    assert set(files_of_ours(store_at(tmp_path))) == named_by(tmp_path)


def test_command_line_accepts_files_of_earlier_saves(tmp_path: Path) -> None:
    save(tmp_path, SHAPES, epoch=3)
    remove_sharded_tensors(tmp_path, "gone")
    kept = next(file.name for file in gs.open_checkpoint(tmp_path).record.files)
    for command, key, told in (
        ("ls", (), "kept.large"),
        ("verify", (), "in 5 files are what was written (3 tensors)"),
        ("show", ("kept.large",), kept),
    ):
        arguments = [sys.executable, "-m", "giantstep.cli.main", command, str(tmp_path), *key]
        found = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
        assert found.returncode == 0, found.stderr
        assert told in found.stdout
        assert "gone" not in found.stdout


# Objects.


def test_objects_with_the_prefix_go_but_never_the_common_state() -> None:
    store = MemoryStore("removal-objects")
    store.clear()
    values = {"common_state": {"a": 1}, "common/shard_0_1": [1] * 5000, "rng/shard_0_2": "zero", "rng/shard_1_2": "one"}
    save_objects(store, values)
    report = remove_sharded_tensors(store, "common")
    assert report.objects == ("common/shard_0_1",)
    assert report.freed_bytes > 0
    assert read(store).objects.keys() == {"common_state", "rng/shard_0_2", "rng/shard_1_2"}
    assert gs.open_checkpoint(store).objects() == {"rng/shard_0_2": "zero", "rng/shard_1_2": "one"}
    assert gs.open_checkpoint(store).common == {"a": 1}
    assert remove_sharded_tensors(store, "rng/shard_1").objects == ("rng/shard_1_2",)
    assert remove_sharded_tensors(store, "").objects == ("rng/shard_0_2",)
    with pytest.raises(KeyMismatchError):
        remove_sharded_tensors(store, "common_state")
    assert gs.open_checkpoint(store).common == {"a": 1}


def test_tied_tensors_keep_the_bytes_that_they_share_with_a_removed_one() -> None:
    store = MemoryStore("removal-tied")
    store.clear()
    shared, alone = bytes(range(200)) * 50, b"alone"
    save_tied(store, {"a": shared, "b": shared, "c": shared, "d": alone})
    (file,) = gs.open_checkpoint(store).record.files
    assert remove_sharded_tensors(store, "a").freed_bytes == 0
    assert gs.open_checkpoint(store).record.files == (file,)
    # The file is copied from once something goes that nobody shares; what is shared is copied once.
    assert remove_sharded_tensors(store, "d").freed_bytes == len(alone)
    assert gs.open_checkpoint(store).info("b").chunks == gs.open_checkpoint(store).info("c").chunks
    assert gs.open_checkpoint(store).verify().ok
    assert remove_sharded_tensors(store, "b").freed_bytes == 0
    assert gs.open_checkpoint(store)["c"][...].tobytes() == shared
    assert remove_sharded_tensors(store, "c").freed_bytes > len(shared)


# What cannot be.


def test_a_prefix_that_matches_nothing_changes_nothing_and_names_what_is_near(tmp_path: Path) -> None:
    save(tmp_path, SHAPES, epoch=3)
    old = bytes_in(store_at(tmp_path))
    with pytest.raises(KeyMismatchError, match=r"begins with 'gone_s', among 6 tensors and 0 objects.*Nearest: 'gone\.small'"):
        remove_sharded_tensors(tmp_path, "gone_s")
    with pytest.raises(KeyMismatchError, match="begins with 'common_state'"):
        remove_sharded_tensors(tmp_path, "common_state")
    assert bytes_in(store_at(tmp_path)) == old


def test_what_is_no_checkpoint_or_no_prefix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(gs.errors.CheckpointNotFoundError):
        remove_sharded_tensors(tmp_path / "nowhere", "a")
    with pytest.raises(NotACheckpointError):
        remove_sharded_tensors(tmp_path, "a")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(gs.errors.BadArgumentError, match="prefix must be a str, not int"):
        remove_sharded_tensors(tmp_path, 3)  # type: ignore[arg-type]


def test_a_newer_minor_version_is_not_rewritten(tmp_path: Path) -> None:
    save(tmp_path, SHAPES)
    path = tmp_path / "checkpoint.json"
    record = decode_record(path.read_bytes(), "record")
    object.__setattr__(record, "version", "1.999")
    path.write_bytes(encode_record(record))
    old = bytes_in(store_at(tmp_path))
    with pytest.raises(gs.errors.VersionError, match=r"1\.999.*would drop what it does not know"):
        remove_sharded_tensors(tmp_path, "gone")
    assert bytes_in(store_at(tmp_path)) == old


def chunk_of(path: Path, key: str) -> tuple[Path, int]:
    """File and first byte of a tensor's first chunk."""
    chunk = gs.open_checkpoint(path).info(key).chunks[0]
    return path / chunk.file, chunk.start


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_damage_in_what_must_be_copied_is_told_and_the_checkpoint_stays(tmp_path: Path) -> None:
    save(tmp_path, SHAPES)
    file, start = chunk_of(tmp_path, "kept.few")
    flip(file, start)
    old = bytes_in(store_at(tmp_path))
    with pytest.raises(gs.errors.CorruptionError, match=rf"kept\.few\[0:1,0:1\].*{file.name}, written by rank 0"):
        remove_sharded_tensors(tmp_path, "gone")
    assert bytes_in(store_at(tmp_path)) == old


def test_damage_in_what_is_removed_does_not_matter(tmp_path: Path) -> None:
    shapes = {"first": (4000, 4), "gone": (4000, 4), "last": (4000, 4)}
    save(tmp_path, shapes)
    file, start = chunk_of(tmp_path, "gone")
    assert file == chunk_of(tmp_path, "first")[0] == chunk_of(tmp_path, "last")[0]
    flip(file, start + 9000)
    assert not gs.open_checkpoint(tmp_path).verify().ok
    remove_sharded_tensors(tmp_path, "gone")
    check(tmp_path, without(shapes, "gone"))


def test_a_lost_file_matters_only_if_something_in_it_is_kept(tmp_path: Path) -> None:
    save(tmp_path, SHAPES)
    file, _ = chunk_of(tmp_path, "kept.large")
    hidden = file.rename(tmp_path / "hidden")
    old = bytes_in(store_at(tmp_path))
    with pytest.raises(gs.errors.IncompleteError, match=f"{file.name}.*is missing"):
        remove_sharded_tensors(tmp_path, "gone")
    assert bytes_in(store_at(tmp_path)) == old
    hidden.rename(file)
    chunk_of(tmp_path, "gone.first")[0].unlink()
    remove_sharded_tensors(tmp_path, "gone")
    check(tmp_path, without(SHAPES, "gone"))


# Crashes and errors.

CRASH_SHAPES: Shapes = {"gone.first": (700, 512), "gone.last": (700, 512), "kept.first": (6, 3), "kept.last": (700, 512)}


@pytest.fixture(scope="module")
def saved() -> CrashingStore:
    """A checkpoint with files of all kinds, not to be changed."""
    store = CrashingStore()
    save(store, CRASH_SHAPES, epoch=3)
    return store


def copy_of(store: CrashingStore) -> CrashingStore:
    return store.after_power_loss(Loss.NOTHING)


def operations_of(saved: CrashingStore) -> list[str]:
    store = copy_of(saved)
    store.arm(None)
    remove_sharded_tensors(store, "gone")
    return store.operations


def is_new(store: CrashingStore) -> bool:
    """Whether the new checkpoint is in force; that or the old one is complete and to the bit."""
    new = "gone.first" not in gs.open_checkpoint(store)
    check(store, without(CRASH_SHAPES, "gone") if new else CRASH_SHAPES, epoch=3)
    return new


@pytest.mark.parametrize("loss", list(Loss))
@pytest.mark.parametrize("after", [False, True])
def test_crash_before_or_after_any_operation_leaves_the_checkpoint_with_or_without_them(
    saved: CrashingStore, after: bool, loss: Loss
) -> None:
    operations = operations_of(saved)
    assert len(operations) > 15
    outcomes = []
    for position in range(len(operations)):
        store = copy_of(saved)
        store.arm(position, after=after)
        with contextlib.suppress(CrashError):
            remove_sharded_tensors(store, "gone")
        assert store.crashed
        left = store.after_power_loss(loss)
        outcomes.append(is_new(left))
        # What comes next works, and leaves nothing else behind.
        if not outcomes[-1]:
            remove_sharded_tensors(left, "gone")
            assert is_new(left)
            assert set(files_of_ours(left)) == named_by(left)
        else:
            save(left, {"new": (2, 2)}, epoch=4)
            check(left, {"new": (2, 2)}, epoch=4)
            assert set(files_of_ours(left)) == named_by(left)
    assert set(outcomes) == {False, True}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_operation_is_told_and_leaves_no_file_behind(saved: CrashingStore, code: int) -> None:
    operations = operations_of(saved)
    renamed = next(n for n, operation in enumerate(operations) if operation.startswith("rename"))
    for position, operation in enumerate(operations):
        store = copy_of(saved)
        names = set(files_of_ours(store))
        store.arm(position, fail_with=code)
        if position <= renamed:
            with pytest.raises(gs.errors.StoreError, match=r"injected at.*Nothing was removed\."):
                remove_sharded_tensors(store, "gone")
            assert not is_new(store), operation
            assert set(files_of_ours(store)) == names, operation
        elif position == renamed + 1:
            with pytest.raises(gs.errors.StoreError, match="It took effect, but may be undone by a power loss"):
                remove_sharded_tensors(store, "gone")
            assert is_new(store)
        else:
            # After the commit point: what could not be deleted goes with the next save.
            remove_sharded_tensors(store, "gone")
            assert is_new(store)


def test_when_even_undoing_fails_the_error_says_so(saved: CrashingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = copy_of(saved)

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "gone mad")

    monkeypatch.setattr(store, "delete", fail)
    store.arm(5, fail_with=errno.EIO)
    with pytest.raises(gs.errors.StoreError, match="Whether it took effect is not known"):
        remove_sharded_tensors(store, "gone")
    assert not is_new(store)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_leaves_the_checkpoint_and_no_file_behind(saved: CrashingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = copy_of(saved)
    names = set(files_of_ours(store))
    monkeypatch.setattr(giantstep.rewriting, "index_after", interrupt)
    with pytest.raises(KeyboardInterrupt):
        remove_sharded_tensors(store, "gone")
    assert not is_new(store)
    assert set(files_of_ours(store)) == names


def test_a_removal_that_a_save_overtook_gives_up(saved: CrashingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = copy_of(saved)
    original: Callable[..., Any] = giantstep.rewriting.index_after

    def index_after(*arguments: Any) -> Any:
        save(store, {"other": (2, 2)}, ranks=1)
        return original(*arguments)

    monkeypatch.setattr(giantstep.rewriting, "index_after", index_after)
    with pytest.raises(gs.errors.StoreError, match="another save was committed"):
        remove_sharded_tensors(store, "gone")
    check(store, {"other": (2, 2)})
    assert set(files_of_ours(store)) == named_by(store)


def test_memory_does_not_grow_with_what_is_copied(tmp_path: Path) -> None:
    # Not getrusage: what that says begins with the memory of the process that started this one.
    program = """
import sys
from pathlib import Path
from giantstep.removal import remove_sharded_tensors

def peak_kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

remove_sharded_tensors(sys.argv[1], "gone")
before = peak_kib()
remove_sharded_tensors(sys.argv[2], "gone")
print(peak_kib() - before)
"""
    small, large = tmp_path / "small", tmp_path / "large"
    gs.save({"kept": torch.ones(2), "gone": torch.ones(2)}, small)
    gs.save({"kept": torch.ones(40, MIB), "gone": torch.ones(2)}, large)
    found = subprocess.run(
        [sys.executable, "-c", program, str(small), str(large)], capture_output=True, text=True, timeout=200, check=True
    )
    assert int(found.stdout) < 96 << 10
    assert bool((gs.load({"kept": torch.zeros(40, MIB)}, large)["kept"] == 1).all())


# Any keys at all.

KEYS = st.lists(st.text(alphabet="ab.é", min_size=1, max_size=4), unique=True, max_size=8)


@settings(max_examples=40, deadline=None)
@given(keys=KEYS, prefixes=st.lists(st.text(alphabet="ab.é", max_size=2), min_size=1, max_size=3), data=st.data())
def test_any_prefixes_of_any_keys_leave_exactly_the_others(keys: list[str], prefixes: list[str], data: st.DataObject) -> None:
    store = MemoryStore("removal-any")
    store.clear()
    dtypes, shapes = st.sampled_from(DTYPES), st.lists(st.integers(0, 40), max_size=3).map(tuple)
    state = {key: value_of(key, data.draw(shapes), data.draw(dtypes)) for key in keys}
    options = gs.SaveOptions(block_bytes=4096, buffer_bytes=4096)
    tree = {n: gs.ShardedTensor.from_rank_offsets(key, value) for n, (key, value) in enumerate(state.items())}
    gs.save({"t": tree, "epoch": 3}, store, options=options)
    for prefix in prefixes:
        going = sorted((key for key in state if key.startswith(prefix)), key=str.encode)
        if going:
            report: RemovalReport = remove_sharded_tensors(store, prefix)
            assert list(report.tensors) == going
            for key in going:
                del state[key]
        else:
            with pytest.raises(KeyMismatchError):
                remove_sharded_tensors(store, prefix)
        stored = read(store)
        assert {key: found.data.tobytes() for key, found in stored.tensors.items()} == {
            key: bits(value) for key, value in state.items()
        }
        assert set(files_of_ours(store)) == named_by(store)
        assert gs.open_checkpoint(store).common["epoch"] == 3


def test_a_wrapper_tensor_goes_whole_or_not_at_all(tmp_path: Path) -> None:
    parts = {"w.q": torch.ones(4), "w.scale": torch.ones(1), "w2": torch.ones(1)}

    class Wrapped(torch.Tensor):
        @staticmethod
        def __new__(cls, q: torch.Tensor, scale: torch.Tensor) -> Any:
            made: Any = torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=torch.float32)  # type: ignore[attr-defined]
            made.q, made.scale = q, scale
            return made

        def __tensor_flatten__(self) -> Any:
            return ["q", "scale"], None

        @classmethod
        def __tensor_unflatten__(cls, inner: Any, *_: Any) -> Any:
            return cls(inner["q"], inner["scale"])

        @classmethod
        def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
            raise NotImplementedError(str(func))

    gs.save({"w": Wrapped(parts["w.q"], parts["w.scale"]), "w2": parts["w2"]}, tmp_path)
    for prefix in ("w.scale", "w.q"):
        with pytest.raises(gs.errors.BadArgumentError, match=r"a part of the wrapper tensor 'w', and keeps others"):
            gs.remove_sharded_tensors(tmp_path, prefix)
    with pytest.raises(gs.errors.KeyMismatchError):
        gs.remove_sharded_tensors(tmp_path, "w/wr")
    report = gs.remove_sharded_tensors(tmp_path, "w.")
    assert report.tensors == ("w.q", "w.scale")
    checkpoint = gs.open_checkpoint(tmp_path)
    assert (checkpoint.keys(), checkpoint.object_keys()) == (["w2"], [])
