"""What a checkpoint holds, as requests for `load`, and all of it as plain tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
import giantstep.metadata
from giantstep.mapping.sharded_object import ShardedObject
from giantstep.metadata import (
    load_common_state_dict,
    load_content_metadata,
    load_plain_tensors,
    load_sharded_metadata,
    load_tensors_metadata,
)
from giantstep.reading.checkpoint import TensorInfo
from giantstep.storage.memory import MemoryStore
from giantstep.testing.ranks import RanksFailedError, run_ranks
from handmade import save_objects
from layouts import DTYPES, bits, random_tensor

VALUES = {
    "w": random_tensor((6, 4), torch.bfloat16, 1),
    "model.bias": random_tensor((4,), torch.float32, 2),
    "scalar": random_tensor((), torch.int64, 3),
    "empty": random_tensor((0, 3), torch.float16, 4),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Saved by two ranks: one tensor divided, the others replicated, under paths that are not their keys."""

    def rank(group: Any) -> None:
        shard = gs.ShardedTensor.from_rank_offsets("w", VALUES["w"].chunk(2)[group.rank], (0, group.rank, 2))
        others = [gs.ShardedTensor.from_rank_offsets(key, VALUES[key], replica_id=group.rank) for key in VALUES if key != "w"]
        state = {"layers": [shard, *others], "epoch": 3, "args": {"lr": 0.5}}
        gs.save(state, tmp_path / "c", process_group=group, content_metadata={"a": [1, None], "b": {}})

    run_ranks(2, rank)
    return tmp_path / "c"


def test_tensors_metadata_are_whole_tensors_by_key_without_data(path: Path) -> None:
    found = load_tensors_metadata(path)
    assert set(found) == set(VALUES)
    for key, value in VALUES.items():
        tensor, dims = found[key], value.dim()
        assert (tensor.key, tensor.data, tensor.dtype, tensor.replica_id) == (key, None, value.dtype, 0)
        assert tensor.global_shape == tensor.local_shape == tuple(value.shape)
        assert tensor.global_offset == (0,) * dims
        assert tensor.axis_fragmentations == (1,) * dims


def test_tensors_metadata_can_be_loaded(path: Path) -> None:
    state = gs.load(load_tensors_metadata(path), path)
    assert {key: bits(state[key]) for key in VALUES} == {key: bits(value) for key, value in VALUES.items()}
    assert {state[key].dtype for key in VALUES} == {value.dtype for value in VALUES.values()}
    assert state["epoch"] == 3


def test_part_of_the_metadata_loads_part_of_the_checkpoint(path: Path) -> None:
    wanted = {"mine": load_tensors_metadata(path)["w"]}
    state = gs.load(wanted, path, strict=gs.StrictHandling.RAISE_UNEXPECTED)
    assert bits(state["mine"]) == bits(VALUES["w"])
    assert state.report.tensors == 1


def test_every_dtype_has_metadata(tmp_path: Path) -> None:
    values = {str(dtype): random_tensor((2, 3), dtype, n) for n, dtype in enumerate(DTYPES)}
    gs.save(values, tmp_path)
    assert {key: tensor.dtype for key, tensor in load_tensors_metadata(tmp_path).items()} == {
        key: value.dtype for key, value in values.items()
    }


def test_a_dtype_that_torch_lacks_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = TensorInfo("w", "float3_new", (2,), 2, 0, ())
    monkeypatch.setattr(giantstep.metadata.Checkpoint, "infos", lambda self: iter([unknown]))
    with pytest.raises(gs.GiantstepError, match=r"tensor 'w' of .* has dtype float3_new, which torch .* lacks: upgrade torch"):
        load_tensors_metadata(path)


def test_sharded_metadata_have_objects_by_unique_key_but_not_internal_ones() -> None:
    store = MemoryStore("metadata-objects")
    store.clear()
    positions = ["ObjB/shard_0.3_1.8", "a/b/shard_0_1", "single/shard__"]
    save_objects(store, {key: {"x": 1} for key in [*positions, "common_state", "q.weight/wrapper"]})
    found = load_sharded_metadata(store)
    assert set(found) == set(positions)
    objects = {key: value for key, value in found.items() if isinstance(value, ShardedObject)}
    assert {key: (value.key, value.global_offset, value.global_shape, value.data) for key, value in objects.items()} == {
        "ObjB/shard_0.3_1.8": ("ObjB", (0, 3), (1, 8), None),
        "a/b/shard_0_1": ("a/b", (0,), (1,), None),
        "single/shard__": ("single", (), (), None),
    }
    assert load_tensors_metadata(store) == {}


def test_sharded_metadata_have_the_tensors_of_tensors_metadata(path: Path) -> None:
    found, tensors = load_sharded_metadata(path), load_tensors_metadata(path)
    assert list(found) == list(tensors)
    assert all(isinstance(value, gs.ShardedTensor) for value in found.values())


def test_common_state_and_content_metadata_come_back_as_saved(path: Path, tmp_path: Path) -> None:
    common = load_common_state_dict(path)
    assert (common["epoch"], common["args"]) == (3, {"lr": 0.5})
    assert load_content_metadata(path) == {"a": [1, None], "b": {}}
    gs.save({"w": torch.ones(2)}, tmp_path / "plain")
    assert load_common_state_dict(tmp_path / "plain") == {}
    assert load_content_metadata(tmp_path / "plain") is None


def test_plain_tensors_are_whole_on_every_rank(path: Path) -> None:
    for loaded in run_ranks(3, lambda group: load_plain_tensors(path, process_group=group)):
        assert {key: bits(tensor) for key, tensor in loaded.items()} == {key: bits(value) for key, value in VALUES.items()}
        assert {tensor.device.type for tensor in loaded.values()} == {"cpu"}
        assert {key: tensor.dtype for key, tensor in loaded.items()} == {key: value.dtype for key, value in VALUES.items()}


def test_plain_tensors_do_not_meet_the_common_state(tmp_path: Path) -> None:
    state = {
        "a": gs.ShardedTensor.from_rank_offsets("step", torch.ones(2)),
        "b": gs.ShardedTensor.from_rank_offsets("args", torch.zeros(2)),
        "step": 5,
        "args": {"lr": 1},
    }
    gs.save(state, tmp_path)
    assert {key: tensor.tolist() for key, tensor in load_plain_tensors(tmp_path).items()} == {"step": [1, 1], "args": [0, 0]}
    assert load_plain_tensors(tmp_path, options=gs.LoadOptions(verify="before")).keys() == {"step", "args"}


@pytest.mark.parametrize(
    "function",
    [load_tensors_metadata, load_sharded_metadata, load_common_state_dict, load_content_metadata, load_plain_tensors],
)
def test_what_is_no_checkpoint_is_told_as_by_load(function: Any, tmp_path: Path) -> None:
    with pytest.raises(gs.errors.CheckpointNotFoundError, match="does not exist"):
        function(tmp_path / "nowhere")


def test_a_rank_that_cannot_look_is_told_to_all(path: Path, tmp_path: Path) -> None:
    def rank(group: Any) -> None:
        load_plain_tensors(path if group.rank != 1 else tmp_path / "nowhere", process_group=group)

    with pytest.raises(RanksFailedError) as found:
        run_ranks(3, rank)
    assert {type(error) for error in found.value.errors} == {gs.errors.CheckpointNotFoundError}
    assert len({str(error) for error in found.value.errors}) == 1


def test_plain_tensors_notice_a_save_in_between(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = giantstep.metadata.load

    def load(*arguments: Any, **settings: Any) -> Any:
        gs.save({"other": torch.ones(2)}, path)
        return original(*arguments, **settings)

    monkeypatch.setattr(giantstep.metadata, "load", load)
    with pytest.raises(gs.errors.StoreError, match="another checkpoint was saved"):
        load_plain_tensors(path)


def test_plain_tensors_notice_ranks_that_see_different_checkpoints(path: Path, tmp_path: Path) -> None:
    gs.save({"other": torch.ones(2)}, tmp_path / "other")

    def rank(group: Any) -> None:
        load_plain_tensors(path if group.rank else tmp_path / "other", process_group=group)

    with pytest.raises(RanksFailedError) as found:
        run_ranks(2, rank)
    assert {type(error) for error in found.value.errors} == {gs.errors.StoreError}


def test_bad_options_are_refused(path: Path) -> None:
    with pytest.raises(gs.errors.BadArgumentError, match="options must be LoadOptions"):
        load_plain_tensors(path, options=gs.SaveOptions())  # type: ignore[arg-type]


def test_sharded_metadata_load_tensors_and_objects_under_their_own_names(tmp_path: Path) -> None:
    rng = ShardedObject("rng", {"seed": 7}, (2,), (0,))
    loader = ShardedObject("rng", {"seed": 8}, (2,), (1,))
    gs.save({"deep": {"w": torch.ones(3), "rng": [rng, loader]}, "epoch": 3}, tmp_path)
    state = gs.load(load_sharded_metadata(tmp_path), tmp_path)
    assert state["deep.w"].tolist() == [1, 1, 1]
    assert (state["rng/shard_0_2"], state["rng/shard_1_2"]) == ({"seed": 7}, {"seed": 8})
    assert load_plain_tensors(tmp_path).keys() == {"deep.w"}
