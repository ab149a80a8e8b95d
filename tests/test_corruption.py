"""A single damaged byte anywhere in a checkpoint is detected, and the file and the tensor are named."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import IncompleteError
from giantstep.format.names import RECORD_NAME
from giantstep.storage.memory import _MEDIA, MemoryStore
from giantstep.testing.ranks import run_ranks

_NAMES = itertools.count()


def small_checkpoint(store: MemoryStore) -> None:
    def rank(group: Any) -> None:
        state = {
            "weight": gs.ShardedTensor.from_rank_offsets("weight", torch.arange(6.0) + 6 * group.rank, (0, group.rank, 2)),
            "bias": torch.arange(5, dtype=torch.int16),
            "step": 7,
        }
        gs.save(state, store, process_group=group, options=gs.SaveOptions(block_bytes=4096, buffer_bytes=4096))

    run_ranks(2, rank)


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    found = MemoryStore(f"corruption-{next(_NAMES)}")
    small_checkpoint(found)
    yield found
    found.clear()


def files_of(store: MemoryStore) -> dict[str, bytearray]:
    return _MEDIA[store.location.removeprefix("memory://")]


def broken_by(store: MemoryStore) -> tuple[str, tuple[str, ...]] | None:
    """(text naming the file, tensors) of what opening or verifying says; None if nothing is noticed."""
    try:
        report = gs.open_checkpoint(store).verify()
    except gs.errors.CorruptionError as error:
        return str(error), ()
    except gs.errors.OpenError as error:
        return f"{type(error).__name__} {error}", ()
    if report.ok:
        return None
    (damage,) = report.damages
    return f"{damage.file} {damage.problem}", damage.tensors


def test_every_single_byte_of_every_file_is_guarded(store: MemoryStore) -> None:
    checkpoint = gs.open_checkpoint(store)
    places = {}
    for key in checkpoint:
        for chunk in checkpoint.info(key).chunks:
            places.update({(chunk.file, position): key for position in range(chunk.start, chunk.start + chunk.bytes)})
    total = 0
    for name, data in sorted(files_of(store).items()):
        for position in range(len(data)):
            data[position] ^= 1 << (position % 8)
            found = broken_by(store)
            if found is None:
                pytest.fail(f"byte {position} of {name} changed and nothing was noticed")
            text, tensors = found
            if name not in text:
                pytest.fail(f"byte {position} of {name} changed, and this was said: {text}")
            key = places.get((name, position))
            if key is not None and key not in tensors:
                pytest.fail(f"byte {position} of {name} belongs to {key}, and these were named: {tensors}")
            data[position] ^= 1 << (position % 8)
            total += 1
    assert total > 16_000
    assert gs.open_checkpoint(store).verify().ok


@pytest.mark.parametrize("verify", ["reading", "before"])
def test_load_names_tensor_file_offset_and_writer_on_all_ranks(store: MemoryStore, verify: Any) -> None:
    checkpoint = gs.open_checkpoint(store)
    chunk = next(chunk for chunk in checkpoint.info("weight").chunks if chunk.rank == 1)
    for position in range(chunk.start, chunk.start + chunk.bytes):
        files_of(store)[chunk.file][position] ^= 0x10

        def rank(group: Any) -> tuple[str, bool]:
            # Only rank 1 reads the damaged block; both must hear of it.
            target = torch.full((6,), -1.0)
            shard = gs.ShardedTensor.from_rank_offsets("weight", target, (0, group.rank, 2))
            options = gs.LoadOptions(verify=verify)
            with pytest.raises(gs.errors.CorruptionError) as caught:
                gs.load({"w": shard}, store, strict=gs.StrictHandling.RAISE_UNEXPECTED, process_group=group, options=options)
            return str(caught.value), bool((target == -1).all())

        outcomes = run_ranks(2, rank)
        assert len({message for message, _ in outcomes}) == 1
        message, untouched = outcomes[1]
        for part in (
            "'weight'",
            chunk.file,
            "written by rank 1",
            f"rank 1, phase {'read' if verify == 'reading' else 'verify'}",
            "bytes 4096 to",
        ):
            assert part in message
        # Bytes are checked where they are wanted: the tensor may be filled when the damage is noticed.
        assert untouched or verify == "reading"
        assert outcomes[0][1] == (verify == "before")
        files_of(store)[chunk.file][position] ^= 0x10


def test_unverified_reading_is_what_the_user_asked_for(store: MemoryStore) -> None:
    chunk = next(chunk for chunk in gs.open_checkpoint(store).info("weight").chunks if chunk.rank == 1)
    files_of(store)[chunk.file][chunk.start + 3] ^= 0x80
    partial = gs.StrictHandling.RAISE_UNEXPECTED
    found = gs.load({"weight": torch.zeros(12)}, store, strict=partial, options=gs.LoadOptions(verify="never"))
    assert found["weight"][6:8].tolist() == [-6.0, 7.0]


def test_truncated_longer_swapped_and_missing_files_are_named(store: MemoryStore) -> None:
    files = files_of(store)
    names = sorted(name for name in files if name.startswith("data/"))
    index = next(name for name in files if ".index." in name)
    for name in [*names, index, RECORD_NAME]:
        original = bytes(files[name])
        for damaged in (original[:-1], original + b"\0", b"", original[: len(original) // 2]):
            files[name] = bytearray(damaged)
            found = broken_by(store)
            assert found is not None
            assert name in found[0]
        del files[name]
        found = broken_by(store)
        assert found is not None
        assert name in found[0]
        files[name] = bytearray(original)
    files[names[0]], files[names[1]] = files[names[1]], files[names[0]]
    report = gs.open_checkpoint(store).verify()
    assert {damage.file for damage in report.damages} == set(names)


def test_a_missing_data_file_stops_a_load_before_any_tensor_changes(store: MemoryStore) -> None:
    files = files_of(store)
    del files[next(name for name in sorted(files) if name.endswith("r00001-0.safetensors"))]
    with pytest.raises(IncompleteError, match="written by rank 1, is missing"):
        gs.load({"weight": torch.zeros(12), "bias": torch.zeros(5, dtype=torch.int16)}, store)


def test_an_index_of_another_save_is_refused(store: MemoryStore) -> None:
    other = MemoryStore(f"corruption-{next(_NAMES)}")
    small_checkpoint(other)
    mine, theirs = files_of(store), files_of(other)
    index, foreign = (next(name for name in files if ".index." in name) for files in (mine, theirs))
    mine[index] = bytearray(theirs[foreign])
    with pytest.raises(gs.errors.CorruptionError, match="damaged"):
        gs.open_checkpoint(store)
    other.clear()
