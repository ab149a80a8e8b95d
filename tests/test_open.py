"""Looking into a checkpoint: keys, slices that read only their bytes, common state."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import giantstep as gs
from giantstep.errors import GiantstepError, IncompleteError, KeyMismatchError
from giantstep.storage.base import ReadHandle
from giantstep.storage.local import LocalStore
from giantstep.testing.ranks import run_ranks


class CountingStore(LocalStore):
    """Counts the bytes read from data files."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.bytes_read = 0

    def open_read(self, name: str, *, direct: bool = False) -> Any:
        handle = super().open_read(name, direct=direct)
        return _Counting(handle, self) if name.startswith("data/") else handle


class _Counting(ReadHandle):
    def __init__(self, handle: ReadHandle, store: CountingStore) -> None:
        self._handle = handle
        self._store = store

    @property
    def size(self) -> int:
        return self._handle.size

    def read_into(self, offset: int, target: memoryview) -> None:
        self._store.bytes_read += len(target)
        self._handle.read_into(offset, target)

    def close(self) -> None:
        self._handle.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open")

    def rank(group: Any) -> None:
        rows = torch.arange(64 * 1024, dtype=torch.float32).reshape(64, 1024) + 64 * 1024 * group.rank
        state = {
            "w": gs.ShardedTensor.from_rank_offsets("w", rows, (0, group.rank, 4)),
            "cube": torch.arange(5 * 6 * 7, dtype=torch.int16).reshape(5, 6, 7),
            "bf16": torch.arange(4).bfloat16(),
            "zero": torch.tensor(3.0),
            "lr": 0.5,
        }
        gs.save(state, folder, process_group=group, options=gs.SaveOptions(block_bytes=4096, buffer_bytes=64 << 10))

    run_ranks(4, rank)
    return folder


def test_keys_membership_and_info(path: Path) -> None:
    checkpoint = gs.open_checkpoint(path)
    assert checkpoint.keys() == list(checkpoint) == ["bf16", "cube", "w", "zero"]
    assert len(checkpoint) == 4
    assert "cube" in checkpoint
    assert "cub" not in checkpoint
    assert 3 not in checkpoint
    info = checkpoint.info("w")
    assert (info.dtype, info.shape, info.bytes, info.chunk_count) == ("float32", (256, 1024), 1 << 20, 4)
    assert [chunk.rank for chunk in info.chunks] == [0, 1, 2, 3]
    assert [found.key for found in checkpoint.infos()] == checkpoint.keys()
    assert checkpoint.common == {"lr": 0.5}
    assert checkpoint.objects() == {}
    with pytest.raises(KeyMismatchError):
        checkpoint.object("nothing")
    array = checkpoint["bf16"]
    assert (array.shape, array.ndim, array.nbytes, len(array), str(array.dtype)) == ((4,), 1, 8, 4, "bfloat16")
    assert np.asarray(array).astype(float).tolist() == [0, 1, 2, 3]
    assert checkpoint["zero"][()] == 3.0
    with pytest.raises(TypeError):
        len(checkpoint["zero"])


def test_a_slice_reads_only_the_blocks_that_hold_it(path: Path) -> None:
    store = CountingStore(path)
    array = gs.open_checkpoint(store)["w"]
    assert store.bytes_read == 0
    assert array[100, 7] == 100 * 1024 + 7
    assert store.bytes_read == 4096
    store.bytes_read = 0
    assert array[60:70, :].shape == (10, 1024)
    assert store.bytes_read <= 10 * 4096 + 4096
    store.bytes_read = 0
    assert (array[:, 5] == np.arange(256) * 1024 + 5).all()
    assert store.bytes_read <= 256 * 4096 + 4 * 4096


INDEX = st.one_of(
    st.integers(-5, 4),
    st.slices(6),
    st.just(Ellipsis),
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(INDEX, max_size=4))
def test_indexing_is_numpys(path: Path, index: list[Any]) -> None:
    expected = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)
    array = gs.open_checkpoint(path)["cube"]
    try:
        wanted = expected[tuple(index)]
    except IndexError:
        with pytest.raises(gs.errors.BadArgumentError):
            array[tuple(index)]
        return
    found = array[tuple(index)]
    assert found.shape == wanted.shape
    assert (found == wanted).all()


@pytest.mark.parametrize(
    "index", [1.5, "a", [0, 1], np.array([0, 1]), None, (0, 0, 0, 0), (..., ...), 5, -6, slice(None, None, 0), slice("a", None)]
)
def test_indices_that_cannot_be(path: Path, index: Any) -> None:
    with pytest.raises(gs.errors.BadArgumentError):
        gs.open_checkpoint(path)["cube"][index]


def test_finding_a_key_reads_little_of_the_index(tmp_path: Path) -> None:
    """Finding one key reads the head and a few blocks, however many tensors there are."""
    options = gs.SaveOptions(block_bytes=4096, buffer_bytes=4096)
    gs.save({f"layers.{n:05d}.weight": torch.tensor(float(n)) for n in range(20_000)}, tmp_path, options=options)
    checkpoint = gs.open_checkpoint(tmp_path)
    assert checkpoint["layers.12345.weight"][()] == 12345
    index = checkpoint.index_tables()
    touched = int(index._verified.sum())
    assert len(index._verified) > 300
    assert touched < 40


def test_a_step_that_is_removed_while_it_is_open_is_told_as_incomplete(tmp_path: Path) -> None:
    gs.save({"w": torch.zeros(3), "v": torch.zeros(3), "rng": gs.ShardedObject("rng", 1, (1,), (0,))}, tmp_path / "1")
    fresh, used = (gs.open_checkpoint(tmp_path / "1") for _ in range(2))
    assert used["w"].shape == (3,)
    shutil.rmtree(tmp_path / "1")
    with pytest.raises(IncompleteError, match="is missing"):
        fresh.keys()
    with pytest.raises(IncompleteError, match="is missing"):
        fresh["w"]
    with pytest.raises(GiantstepError):
        used["w"][...]
    with pytest.raises(GiantstepError):
        fresh.object("rng/shard_0_1")
    assert not fresh.verify().ok
