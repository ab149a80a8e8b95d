"""State dicts of all kinds: what is a tensor, what is common state, what comes back where."""

from __future__ import annotations

import collections
import enum
import sys
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import UnexpectedError
from giantstep.format.codec import TensorSlot
from giantstep.mapping.tree import DROPPED, merge, prune
from giantstep.testing.ranks import run_ranks, run_ranks_collecting


def test_common_state_comes_back_whole_whether_or_not_it_is_asked_for(tmp_path: Path) -> None:
    state = {
        "model": {"w": torch.ones(2), "version": 3},
        "optim": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "mixed": [torch.zeros(1), "text", (torch.zeros(2), None)],
        "tensors_only": [torch.zeros(1), [torch.zeros(1)]],
        "empty": {},
        "nothing": None,
        "names": OrderedDict(a=1),
    }
    gs.save(state, tmp_path)
    everything = gs.load({}, tmp_path, strict=gs.StrictHandling.IGNORE_ALL)
    assert everything == {
        "model": {"version": 3},
        "optim": {"param_groups": [{"lr": 0.1, "params": [0]}]},
        "mixed": [TensorSlot("mixed.0"), "text", (TensorSlot("mixed.2.0"), None)],
        "empty": {},
        "nothing": None,
        "names": {"a": 1},
    }
    assert type(everything["names"]) is OrderedDict
    wanted = {
        "model": {"w": torch.zeros(2), "version": -1},
        "optim": {"state": {0: {"exp_avg": torch.zeros(2)}}},
        "mixed": [torch.ones(1), "", (torch.ones(2), 5)],
        "tensors_only": [torch.ones(1), [torch.ones(1)]],
        "mine": "kept",
    }
    loaded = gs.load(wanted, tmp_path)
    assert loaded["model"]["w"] is wanted["model"]["w"]
    assert loaded["model"]["version"] == 3
    assert wanted["model"]["version"] == -1
    assert loaded["optim"]["param_groups"] == [{"lr": 0.1, "params": [0]}]
    assert loaded["optim"]["state"][0]["exp_avg"].tolist() == [1, 1]
    assert loaded["mixed"][0].tolist() == [0]
    assert loaded["mixed"][2][1] is None
    assert "mine" not in loaded
    assert loaded.report.tensors == 6


def test_counters_stay_counters_in_common_state_and_in_objects(tmp_path: Path) -> None:
    counter, deep = collections.Counter("aab"), collections.Counter({3: 1})
    # Beside a tensor, so that the containers are taken apart and merged again.
    state = {"schedule": {"milestones": counter, "w": torch.ones(1)}, "list": [torch.ones(1), (deep,)]}
    grid = gs.ShardedObject("grid", {"seen": counter}, (), ())
    gs.save({**state, "grid": grid}, tmp_path)
    wanted = {"schedule": {"milestones": collections.Counter("zz"), "w": torch.zeros(1)}, "list": [torch.zeros(1), ({},)]}
    loaded = gs.load({**wanted, "grid": grid}, tmp_path)
    found = [loaded["schedule"]["milestones"], loaded["list"][1][0], loaded["grid"]["seen"]]
    assert [type(value) for value in found] == [collections.Counter] * 3
    assert found == [counter, deep, counter]


def test_keys_are_dotted_paths_and_a_sharded_tensors_own(tmp_path: Path) -> None:
    own = gs.ShardedTensor.from_rank_offsets("its own key", torch.ones(1))
    gs.save({"a": {"b": [torch.ones(1), {3: torch.ones(1)}], "c": own}}, tmp_path)
    assert gs.open_checkpoint(tmp_path).keys() == ["a.b.0", "a.b.1.3", "its own key"]
    loaded = gs.load({"a": {"b": [torch.zeros(1), {3: torch.zeros(1)}], "c": own}}, tmp_path)
    assert loaded["a"]["c"] is own.data


def test_modules_optimizers_and_anything_stateful(tmp_path: Path) -> None:
    class Counter:
        def __init__(self) -> None:
            self.n = 0

        def state_dict(self) -> dict[str, Any]:
            return {"n": self.n, "inner": torch.tensor(float(self.n))}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.n = state["n"]
            self.inner = state["inner"]

    def make(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer, Counter]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        return model, torch.optim.AdamW(model.parameters()), Counter()

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad()
        loss = model(torch.arange(6.0).reshape(2, 3)).square().sum()
        loss.backward()
        optimizer.step()
        return loss.item()

    model, optimizer, counter = make(1)
    counter.n = 5
    step(model, optimizer)
    gs.save({"model": model, "opt": optimizer, "extra": {"counter": counter}}, tmp_path)
    expected = [step(model, optimizer) for _ in range(3)]
    other, other_optimizer, other_counter = make(2)
    step(other, other_optimizer)
    loaded = gs.load({"model": other, "opt": other_optimizer, "extra": {"counter": other_counter}}, tmp_path)
    assert loaded["model"] is other
    assert loaded["extra"]["counter"] is other_counter
    assert (other_counter.n, other_counter.inner.item()) == (5, 5.0)
    assert [step(other, other_optimizer) for _ in range(3)] == expected


def test_what_an_object_of_the_users_raises_reaches_all_ranks(tmp_path: Path) -> None:
    class Fragile:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def state_dict(self) -> dict[str, Any]:
            return {"w": torch.zeros(1)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            if self.rank == 1:
                raise RuntimeError("no room")

    run_ranks(2, lambda group: gs.save({"f": Fragile(group.rank)}, tmp_path, process_group=group))
    _, errors = run_ranks_collecting(2, lambda group: gs.load({"f": Fragile(group.rank)}, tmp_path, process_group=group))
    assert {type(error) for error in errors} == {UnexpectedError}
    assert {str(error) for error in errors} == {"[rank 1, phase restore] RuntimeError: no room"}


def test_the_given_state_dict_is_not_changed(tmp_path: Path) -> None:
    state = {"a": [torch.ones(1), 2], "b": {"c": torch.ones(1)}}
    lists = state["a"]
    gs.save(state, tmp_path)
    gs.load(state, tmp_path)
    assert state["a"] is lists
    assert set(state) == {"a", "b"}


def test_rolling_back_gives_what_was_stored_and_nothing_of_the_present(tmp_path: Path) -> None:
    class Loader:
        state: dict[str, Any]

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.state = state

    loader = Loader()
    loader.state = {"seen": [1, 2], "epochs": {"epoch1": 1}, "w": torch.ones(1)}
    gs.save({"losses": [3.0, 2.5], "none": [], "loader": loader}, tmp_path)
    loader.state = {"seen": [7] * 4, "epochs": {"epoch1": 5, "epoch2": 6}, "w": torch.zeros(1)}
    loaded = gs.load({"losses": [9, 8, 7, 6], "none": ["x"], "loader": loader}, tmp_path)
    assert (loaded["losses"], loaded["none"]) == ([3.0, 2.5], [])
    assert (loader.state["seen"], loader.state["epochs"], loader.state["w"].item()) == ([1, 2], {"epoch1": 1}, 1.0)


def test_a_module_on_the_meta_device_takes_the_loaded_tensors(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    gs.save({"model": model}, tmp_path)
    with torch.device("meta"):
        empty = torch.nn.Linear(3, 2)
    gs.load({"model": empty}, tmp_path)
    assert torch.equal(empty.weight, model.weight)
    assert isinstance(empty.weight, torch.nn.Parameter)


def test_an_empty_flat_range_without_data_becomes_an_empty_tensor(tmp_path: Path) -> None:
    gs.save({"w": torch.ones(4)}, tmp_path)
    shard = gs.ShardedTensor("w", None, torch.float32, (4,), (4,), (0,), None, flattened_range=slice(4, 4))
    loaded = gs.load({"w": shard}, tmp_path)
    assert loaded["w"].shape == (0,)


def test_a_defaultdict_counts_as_a_dict(tmp_path: Path) -> None:
    gs.save({"d": defaultdict(dict, {"x": {"w": torch.ones(1), "n": 1}})}, tmp_path)
    assert gs.load({}, tmp_path, strict=gs.StrictHandling.IGNORE_ALL) == {"d": {"x": {"n": 1}}}


def test_parameters_views_and_expanded_tensors_store_their_own_bytes_only(tmp_path: Path) -> None:
    large = torch.arange(1_000_000.0)
    state = {
        "view": large[10:20],
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "transposed": large[:6].view(2, 3).t(),
        "expanded": torch.ones(1).expand(4),
        "conjugated": torch.tensor([1 + 2j, 3j]).conj(),
        "negated": torch.tensor([1 + 2j, 3j]).conj().imag,
        "scalar": torch.tensor(7),
    }
    report = gs.save(state, tmp_path)
    assert report.bytes == 10 * 4 + 3 * 4 + 6 * 4 + 4 * 4 + 2 * 8 + 2 * 4 + 8
    checkpoint = gs.open_checkpoint(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) < 40_000
    for key, value in state.items():
        assert (checkpoint[key][...] == value.detach().resolve_conj().resolve_neg().numpy()).all()
    target = {key: torch.zeros_like(value).contiguous() for key, value in state.items()}
    target["conjugated"] = torch.zeros(2, dtype=torch.complex64).conj()
    target["parameter"] = torch.nn.Parameter(torch.zeros(3))
    loaded = gs.load(target, tmp_path)
    for key, value in state.items():
        assert torch.equal(loaded[key], value)
    assert loaded["parameter"] is target["parameter"]


def test_meta_tensors_and_absent_data_get_memory(tmp_path: Path) -> None:
    gs.save({"w": torch.arange(6.0).reshape(2, 3), "v": torch.ones(2)}, tmp_path)
    absent = gs.ShardedTensor("v", None, torch.float32, (1,), (2,), (1,), None)
    with torch.device("meta"):
        meta = torch.empty(2, 3)
    loaded = gs.load({"w": meta, "part": absent}, tmp_path)
    assert loaded["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded["part"].tolist() == [1]


def test_a_padded_vocabulary_loads_into_another_padding(tmp_path: Path) -> None:
    gs.save({"e": torch.arange(1.0, 11.0).reshape(5, 2)}, tmp_path)
    for rows in (3, 5, 8):

        def rank(group: Any, rows: int = rows) -> torch.Tensor:
            data = torch.full((rows, 2), -1.0)
            offset = (group.rank * rows, 0)
            shard = gs.ShardedTensor("e", data, data.dtype, (rows, 2), (2 * rows, 2), offset, None, allow_shape_mismatch=True)
            return gs.load({"e": shard}, tmp_path, process_group=group)["e"]

        found = torch.cat(run_ranks(2, rank))
        expected = torch.zeros(max(5, 2 * rows), 2)
        expected[:5] = torch.arange(1.0, 11.0).reshape(5, 2)
        assert torch.equal(found, expected[: 2 * rows])


def test_prepended_axes_place_layers_in_one_tensor(tmp_path: Path) -> None:
    def rank(group: Any) -> None:
        layer = torch.full((2, 3), float(group.rank))
        shard = gs.ShardedTensor.from_rank_offsets("layers.w", layer, (0, group.rank, 4), prepend_axis_num=1)
        gs.save({"w": shard}, tmp_path, process_group=group)

    run_ranks(4, rank)
    assert gs.open_checkpoint(tmp_path)["layers.w"][:, 0, 0].tolist() == [0, 1, 2, 3]
    strided = torch.zeros(3, 2).t()
    shard = gs.ShardedTensor.from_rank_offsets("layers.w", strided, (0, 2, 4), prepend_axis_num=1)
    partial = gs.StrictHandling.RAISE_UNEXPECTED
    assert gs.load({"w": shard}, tmp_path, strict=partial)["w"].tolist() == [[2.0] * 3] * 2


@pytest.mark.parametrize(
    ("tree", "pruned"),
    [
        (DROPPED, DROPPED),
        ({}, {}),
        ({"a": DROPPED}, DROPPED),
        ({"a": DROPPED, "b": {}}, {"b": {}}),
        ([DROPPED, 1], [TensorSlot("0"), 1]),
        ([DROPPED, [DROPPED]], DROPPED),
        (({"a": DROPPED}, 2), (TensorSlot("0"), 2)),
        ({"a": {"b": DROPPED, "c": 0}}, {"a": {"c": 0}}),
    ],
)
def test_pruning(tree: Any, pruned: Any) -> None:
    assert prune(tree) == pruned


@pytest.mark.parametrize(
    ("given", "common", "merged"),
    [
        ({"a": DROPPED}, {"a": 2, "b": 3}, {"a": 2, "b": 3}),
        ({"a": DROPPED, "zombie": DROPPED}, {"a": {}}, {"a": {}}),
        ({"a": {"t": "t", "n": DROPPED}, "z": {"y": DROPPED}}, {}, {"a": {"t": "t"}}),
        ([DROPPED] * 4, [3.0, 2.5], [3.0, 2.5]),
        ([DROPPED] * 2, [], []),
        (["t", DROPPED, DROPPED], [TensorSlot("0"), 5], ["t", 5]),
        (["t", DROPPED, "u"], [TensorSlot("0")], ["t", None, "u"]),
        (["t"], [TensorSlot("0"), TensorSlot("1")], ["t", TensorSlot("1")]),
        ({"a": "t"}, {"a": {"b": 1}}, {"a": "t"}),
        ((DROPPED,), [2], [2]),
        (DROPPED, DROPPED, DROPPED),
        ({"y": [], "z": {}}, {}, {"y": [], "z": {}}),
        ({"y": []}, {"y": 3}, {"y": 3}),
        ({"y": [{}, {}]}, {"y": []}, {"y": []}),
    ],
)
def test_merging(given: Any, common: Any, merged: Any) -> None:
    assert merge(given, common) == merged


def test_a_list_where_a_tuple_is_stored_loses_nothing(tmp_path: Path) -> None:
    gs.save({"s": (torch.ones(1), 5)}, tmp_path)
    loaded = gs.load({"s": [torch.zeros(1), 0]}, tmp_path)["s"]
    assert (type(loaded), loaded[0].tolist(), loaded[1]) == (tuple, [1], 5)


class Settings(dict[str, Any]):
    """A dict of a class of its own."""


def test_a_registered_dict_class_comes_back_as_what_it_is(tmp_path: Path) -> None:
    gs.register_type(Settings, name="test settings", encode=dict, decode=Settings)
    gs.save({"x": Settings(a=1), "y": [Settings()], "z": {"plain": 1}}, tmp_path)
    loaded = gs.load({"x": Settings(a=2)}, tmp_path)
    assert (type(loaded["x"]), type(loaded["y"][0]), type(loaded["z"])) == (Settings, Settings, dict)
    assert loaded["x"] == {"a": 1}


class Stage(enum.Enum):
    """An enum that is found by its name while it is there."""

    A = 1


def test_the_tensors_of_a_checkpoint_can_be_read_without_its_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gs.save({"w": torch.ones(2), "stage": Stage.A}, tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "Stage", None)
    with pytest.raises(gs.errors.UnsupportedTypeError, match="Stage"):
        gs.load({"w": torch.zeros(2)}, tmp_path)
    assert gs.metadata.load_plain_tensors(tmp_path)["w"].tolist() == [1, 1]
    loaded = gs.load({"w": torch.zeros(2)}, tmp_path, options=gs.LoadOptions(unknown_types="keep"))
    assert "Stage" in repr(loaded["stage"])


def test_attributes_of_parameters_without_memory_stay(tmp_path: Path) -> None:
    gs.save({"m": torch.nn.Linear(2, 2)}, tmp_path)
    module = torch.nn.Linear(2, 2, device="meta")
    module.weight.tensor_model_parallel = True  # type: ignore[union-attr]
    gs.load({"m": module}, tmp_path)
    assert module.weight.tensor_model_parallel
    assert not module.weight.is_meta
