"""The reshardable form: saved under any buckets and ranks, loaded under any other, and into optimizers that are not sharded."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from zero_layouts import STATES, Optimizer, Place, Side, Spec, models, optimizers, sides

import giantstep as gs
from giantstep.errors import BadArgumentError, CoverageError
from giantstep.optimizer import OptimizerState
from giantstep.storage.memory import MemoryStore
from giantstep.testing import check_coverage, round_trip, run_ranks
from giantstep.zero import BucketRules, FlatParameter, empty_buffers, lay_out, lay_out_whole, reshardable_state
from processes import results, run_processes

_NUMBERS = itertools.count()
LOAD = gs.LoadOptions(reader_threads=1, buffer_bytes=1 << 20)
SAVE = gs.SaveOptions(writer_threads=1, buffer_bytes=1 << 20, on_object_difference="raise")

MODEL = [
    Spec("embed", (12, 5), 0, shared=True),
    Spec("norm", (7,), dtype=torch.bfloat16),
    Spec("mlp", (6, 4), 0, "glu", torch.bfloat16),
    Spec("scale", ()),
    Spec("out", (5, 6), 1, "turned"),
    Spec("none", (0, 4)),
]


def state_of(optimizer: Optimizer) -> dict[str, object]:
    place = optimizer.place
    state = reshardable_state(optimizer.layout, place.dp, optimizer.states, optimizer.model, instance=place.instance)
    return {"optimizer": {"state": state, "step": 7}}


def save_all(ranks: list[Optimizer]) -> MemoryStore:
    store = MemoryStore(f"reshardable-{next(_NUMBERS)}")
    states = [state_of(rank) for rank in ranks]
    run_ranks(len(ranks), lambda group: gs.save(states[group.rank], store, process_group=group, options=SAVE))
    return store


def load_all(ranks: list[Optimizer], store: MemoryStore) -> list[gs.LoadedState]:
    states = [state_of(rank) for rank in ranks]
    return run_ranks(len(ranks), lambda group: gs.load(states[group.rank], store, process_group=group, options=LOAD))


@settings(max_examples=40, deadline=None)
@given(models(), sides(), sides())
def test_every_element_comes_back_under_any_other_layout(specs: list[Spec], before: Side, after: Side) -> None:
    store = save_all([one.fill() for one in optimizers(before, specs)])
    checkpoint = gs.open_checkpoint(store)
    expected = {
        f"optimizer.state.{state}.{key}": value
        for spec in specs
        for state in STATES
        for key, value in spec.whole(state).items()
    }
    assert set(checkpoint.keys()) == set(expected)
    for key, value in expected.items():
        assert np.array_equal(checkpoint[key][...], value.numpy()), key
    loaded = optimizers(after, specs)
    states = load_all(loaded, store)
    for one, state in zip(loaded, states, strict=True):
        one.check()
        assert state["optimizer"]["step"] == 7
    store.clear()


@settings(max_examples=40, deadline=None)
@given(models(), sides())
def test_every_element_is_covered_exactly_once(specs: list[Spec], side: Side) -> None:
    found = check_coverage([state_of(one.fill()) for one in optimizers(side, specs)])
    assert not found.differences
    assert found.bytes >= sum(4 * len(STATES) * value.numel() for spec in specs for value in spec.whole("").values())


def test_states_of_two_layouts_pass_the_round_trip_that_users_run() -> None:
    before, after = Side(dp=2, tp=2), Side(dp=3, pp=2, rules=BucketRules(max_elements=20, even=False))
    round_trip([state_of(one.fill()) for one in optimizers(before, MODEL)], [state_of(one) for one in optimizers(after, MODEL)])


def test_a_rank_that_owns_nothing_saves_and_loads_with_the_others() -> None:
    specs = [Spec("tiny", (2,))]
    store = save_all([one.fill() for one in optimizers(Side(dp=5), specs)])
    ranks = optimizers(Side(dp=4), specs)
    assert [len(one.layout.owned(one.place.dp)) for one in ranks] == [1, 1, 0, 0]
    states = load_all(ranks, store)
    for one in ranks:
        one.check()
    assert states[3]["optimizer"] == {"state": {name: {} for name in STATES}, "step": 7}


def test_saving_and_loading_copy_nothing() -> None:
    (one,) = optimizers(Side(), MODEL)
    state = state_of(one.fill())["optimizer"]["state"]
    buffers = {buffer.untyped_storage().data_ptr() for buffers in one.states.values() for buffer in buffers}
    shards = [leaf for leaves in state.values() for leaf in leaves.values()]
    built = [part for leaf in shards if isinstance(leaf, gs.ShardedTensorFactory) for part in leaf.build()]
    assert len(built) == 3 * 3
    for shard in [*shards, *built]:
        assert not shard.data.numel() or shard.data.untyped_storage().data_ptr() in buffers


def test_an_optimizer_that_is_not_sharded_loads_what_a_sharded_one_saved_and_the_other_way_round() -> None:
    store = save_all([one.fill() for one in optimizers(Side(dp=3, tp=2), MODEL)])
    plain = {
        f"optimizer.state.{state}.{key}": torch.empty_like(value)
        for spec in MODEL
        for state in STATES
        for key, value in spec.whole(state).items()
    }
    named = {name: gs.ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in plain.items()}
    gs.load({"state": named}, store, options=LOAD)
    for spec in MODEL:
        for state in STATES:
            for key, value in spec.whole(state).items():
                assert torch.equal(plain[f"optimizer.state.{state}.{key}"], value)
    again = MemoryStore("plain-to-zero")
    gs.save({"state": named, "optimizer": {"step": 7}}, again)
    ranks = optimizers(Side(dp=2, tp=3, pp=2), MODEL)
    load_all(ranks, again)
    for one in ranks:
        one.check()


def test_a_background_save_stores_what_was_there_when_it_was_called() -> None:
    side, store = Side(dp=2, tp=2), MemoryStore("background")
    ranks = [one.fill() for one in optimizers(side, MODEL)]

    def save(group: object) -> None:
        one = ranks[group.rank]
        pending = gs.async_save(state_of(one), store, process_group=group, options=SAVE)
        pending.wait_staged(60)
        for buffers in one.states.values():
            for buffer in buffers:
                buffer.fill_(-3)
        pending.result(60)

    run_ranks(4, save)
    loaded = optimizers(Side(dp=3), MODEL)
    load_all(loaded, store)
    for one in loaded:
        one.check()


def test_state_is_given_by_parameter_too_and_need_not_be_there_for_all() -> None:
    """As Megatron-Core has it: a tensor per parameter; float32 main parameters only beside those of lower precision."""
    specs = [Spec("low", (4, 3), dtype=torch.bfloat16), Spec("high", (5,))]
    store = MemoryStore("by-parameter")

    def state(rank: int, ranks: int, value: float | None) -> tuple[dict[str, object], list[torch.Tensor]]:
        one = Optimizer(Side(dp=ranks), specs, Place(0, 0, 0, rank))
        tensors = {
            owned.parameter.name: one.by_name[owned.parameter.name]
            .cut("main", 0, 1)
            .flatten()[owned.start : owned.stop]
            .clone()
            for owned in one.layout.owned(rank)
            if owned.parameter.dtype == "bfloat16"
        }
        expected = [tensor.clone() for tensor in tensors.values()]
        if value is not None:
            for tensor in tensors.values():
                tensor.fill_(value)
        found = reshardable_state(one.layout, rank, {"fp32_param": tensors}, one.model)
        return {"state": found, "kept": tensors if value is None else gs.LocalNonpersistentObject(tensors)}, expected

    def save(group: object) -> None:
        gs.save({"state": state(group.rank, 2, None)[0]["state"]}, store, process_group=group)

    def load(group: object) -> None:
        wanted, expected = state(group.rank, 3, 0.0)
        found = gs.load(wanted, store, process_group=group)
        assert all(map(torch.equal, found["kept"].values(), expected))

    run_ranks(2, save)
    assert gs.open_checkpoint(store).keys() == ["optimizer.state.fp32_param.low"]
    run_ranks(3, load)


def test_state_without_memory_is_given_some_on_load() -> None:
    store = save_all([one.fill() for one in optimizers(Side(dp=2), MODEL)])
    (one,) = optimizers(Side(), MODEL)
    expected = {name: one.expected(name) for name in STATES}
    one.states = {name: [buffer.to("meta") for buffer in buffers] for name, buffers in one.states.items()}
    loaded = gs.load(state_of(one), store, options=LOAD)["optimizer"]["state"]
    for name in STATES:
        for owned in one.layout.owned(0):
            found = loaded[name][owned.parameter.name]
            assert torch.equal(found.flatten(), expected[name][owned.bucket][owned.at : owned.at + owned.stop - owned.start])


def test_a_padded_vocabulary_is_padded_otherwise() -> None:
    store = MemoryStore("padded")

    def state(rank: int, ranks: int, rows: int, buffer: torch.Tensor) -> dict[str, object]:
        layout = lay_out([FlatParameter("embed", (rows, 3), "float32")], ranks)
        model = gs.ShardedTensor.from_rank_offsets("embed", torch.zeros(rows, 3), allow_shape_mismatch=True)
        return reshardable_state(layout, rank, {"exp_avg": [buffer]}, {"embed": model})

    values = torch.arange(24.0)
    run_ranks(
        2, lambda group: gs.save(state(group.rank, 2, 8, values.chunk(2)[group.rank].clone()), store, process_group=group)
    )
    buffers = [torch.full((10,), 5.0) for _ in range(3)]
    run_ranks(3, lambda group: gs.load(state(group.rank, 3, 10, buffers[group.rank]), store, process_group=group))
    assert torch.equal(torch.cat(buffers), torch.cat([values, torch.zeros(6)]))


def test_stacked_layers_are_one_tensor_in_any_layout() -> None:
    store, layers = MemoryStore("stacked"), torch.arange(48.0).view(4, 4, 3)

    def state(rank: int, pipeline: int, ranks: int, buffers: list[torch.Tensor]) -> tuple[dict[str, object], torch.Tensor]:
        """Ranks by stage, then by data parallelism; what the stage's bucket is to hold of this rank's."""
        stage, place = divmod(rank, ranks)
        numbers = range(4)[stage * 4 // pipeline : (stage + 1) * 4 // pipeline]
        layout = lay_out([FlatParameter(f"{n}.w", (4, 3), "float32") for n in numbers], ranks, BucketRules(even=False))
        model = {
            f"{n}.w": gs.ShardedTensor.from_rank_offsets("layers.w", torch.zeros(4, 3), (0, n, 4), prepend_axis_num=1)
            for n in numbers
        }
        low, high = layout.buckets[0].range_of(place)
        buffers.append(torch.zeros(high - low))
        return reshardable_state(layout, place, {"m": buffers}, model), layers[list(numbers)].flatten()[low:high]

    def save(group: object) -> None:
        buffers: list[torch.Tensor] = []
        found, expected = state(group.rank, 2, 3, buffers)
        buffers[0].copy_(expected)
        gs.save(found, store, process_group=group)

    def load(group: object) -> None:
        buffers: list[torch.Tensor] = []
        wanted, expected = state(group.rank, 4, 2, buffers)
        gs.load(wanted, store, process_group=group)
        assert torch.equal(buffers[0], expected)

    run_ranks(6, save)
    assert np.array_equal(gs.open_checkpoint(store)["optimizer.state.m.layers.w"][...], layers.numpy())
    run_ranks(8, load)


def test_plain_tensors_are_parameters_that_nothing_cuts_and_state_of_whole_ones_may_have_their_shape() -> None:
    """As torch's ZeroRedundancyOptimizer has it: each rank the whole state of some parameters."""
    shapes, owner = {"a": (4, 3), "b": (5,), "c": (2, 2)}, {"a": 0, "b": 1, "c": 0}
    layout = lay_out_whole([FlatParameter(name, shape, "float32") for name, shape in shapes.items()], 2, owner)
    model = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    store, values = MemoryStore("whole"), {name: torch.rand(shape) for name, shape in shapes.items()}

    def state(rank: int, value: float | None) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
        held = {name: one.clone() if value is None else torch.full_like(one, value) for name, one in values.items()}
        mine = {name: tensor for name, tensor in held.items() if owner[name] == rank}
        return reshardable_state(layout, rank, {"exp_avg": mine}, model), mine

    run_ranks(2, lambda group: gs.save(state(group.rank, None)[0], store, process_group=group))
    assert gs.open_checkpoint(store).keys() == [f"optimizer.state.exp_avg.{name}" for name in shapes]

    def load(group: object) -> None:
        wanted, mine = state(group.rank, 0.0)
        gs.load(wanted, store, process_group=group)
        assert all(torch.equal(tensor, values[name]) for name, tensor in mine.items())

    run_ranks(2, load)


def _distributed(rank: int, path: str) -> dict[str, bool]:
    """Two tensor-parallel by two data-parallel processes; parameters are DTensors over the former."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tensor_parallel, place = mesh["tp"], mesh["dp"].get_local_rank()
    values = {"row": torch.arange(24.0).view(6, 4), "column": torch.arange(35.0).view(5, 7), "same": torch.arange(9.0)}
    placements = {"row": [Shard(0)], "column": [Shard(1)], "same": [Replicate()]}
    values["strided"] = torch.arange(40.0).view(8, 5)
    model = {name: distribute_tensor(values[name], tensor_parallel, where) for name, where in placements.items()}
    strided = values["strided"].view(2, 2, 2, 5)[:, tensor_parallel.get_local_rank()].reshape(4, 5)
    model["strided"] = DTensor.from_local(
        strided, tensor_parallel, [_StridedShard(0, split_factor=2)], run_check=False, shape=(8, 5), stride=(5, 1)
    )
    local = {name: tensor.to_local() for name, tensor in model.items()}
    layout = lay_out([FlatParameter(name, tuple(one.shape), "float32") for name, one in local.items()], 2)
    flat = torch.cat([one.flatten() for one in local.values()])
    low, high = layout.buckets[0].range_of(place)
    buffer = torch.zeros(high - low)
    buffer[: min(high, len(flat)) - low] = flat[low:high]
    gs.save(reshardable_state(layout, place, {"m": [buffer]}, model), path)
    stored = gs.open_checkpoint(path)
    return {name: np.array_equal(stored[f"optimizer.state.m.{name}"][...], value.numpy()) for name, value in values.items()}


def test_parameters_may_be_dtensors_over_tensor_parallel_ranks(tmp_path: Path) -> None:
    found = results(run_processes(4, _distributed, str(tmp_path / "step")))
    assert found == [dict.fromkeys(("row", "column", "same", "strided"), True)] * 4


# Wrong calls.


def one_rank(**changes: object) -> dict[str, object]:
    layout = lay_out(
        [FlatParameter("w", (4, 3), "float32"), FlatParameter("b", (3,), "float32")], 2, BucketRules(max_elements=12)
    )
    model = {name: gs.ShardedTensor.from_rank_offsets(name, torch.zeros(shape)) for name, shape in (("w", (4, 3)), ("b", (3,)))}
    given = {"layout": layout, "rank": 0, "states": {"m": [torch.zeros(6), torch.zeros(2)]}, "model": model, **changes}
    return reshardable_state(given.pop("layout"), given.pop("rank"), given.pop("states"), given.pop("model"), **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": {"m": [torch.zeros(6)]}}, "state 'm': 1 tensors for 2 buckets"),
        (
            {"states": {"m": [torch.zeros(7), None]}},
            r"state 'm', bucket 0: rank 0 owns elements 0:6: expected .* \(6,\), found \(7,\)",
        ),
        ({"states": {"m": [torch.zeros(12)[::2], None]}}, "expected a contiguous tensor"),
        ({"states": {"m": {"w": torch.zeros(5)}}}, "state 'm' of parameter 'w': rank 0 owns elements 0:6"),
        ({"states": {"m": {"v": torch.zeros(5)}}}, "of parameter 'v' has 5 elements, but rank 0 owns nothing of such"),
        ({"states": {"m": {"v": 5}}}, "of parameter 'v' has type int, but rank 0 owns nothing of such"),
        ({"states": {"m": {"w": 5}}}, "state 'm' of parameter 'w': rank 0 owns .* found int"),
        ({"rank": 2}, "rank 2 must be an int from 0 to 1"),
        ({"instance": -1}, "instance -1"),
        ({"model": {}}, "parameter 'w' of the flat layout: expected .* found nothing"),
        ({"model": {"w": [1.0]}}, "found a list"),
        ({"model": {"w": torch.zeros(3, 4)}}, r"has shape \(4, 3\) in the flat layout, the model's 'w' has \(3, 4\)"),
        (
            {"model": {"w": gs.ShardedTensor.from_rank_offsets("w", torch.zeros(2, 3), (0, 0, 2))}},
            r"\(4, 3\) .* 'w' has \(2, 3\)",
        ),
        (
            {"model": {"w": gs.ShardedTensor.from_rank_offsets_flat("w", torch.zeros(2), (4, 3), flattened_range=slice(0, 2))}},
            "is flattened itself",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(BadArgumentError, match=message):
        one_rank(**changes)


def test_state_that_some_parameters_lack_may_be_none_by_name_too() -> None:
    found = one_rank(states={"m": {"w": torch.zeros(6), "b": None, "elsewhere": None}})
    assert list(found["m"]) == ["w"]  # type: ignore[call-overload]


def test_replicas_that_single_numbers_cannot_tell_apart_are_an_error_on_save() -> None:
    """A norm that two tensor-parallel ranks have, with replica ids 0 and 1: as data-parallel copies both are main."""

    def state(rank: int) -> dict[str, object]:
        layout = lay_out([FlatParameter("norm", (4,), "float32")], 1)
        model = {"norm": gs.ShardedTensor.from_rank_offsets("norm", torch.zeros(4), replica_id=rank)}
        return reshardable_state(layout, 0, {"m": [torch.zeros(4)]}, model)

    with pytest.raises(CoverageError):
        check_coverage([state(0), state(1)])


def test_state_that_an_optimizer_state_saved_loads_into_flat_buffers(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.rand(4, 3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.rand(4, 3)
    optimizer.step()
    model = {"w": gs.ShardedTensor.from_rank_offsets("w", weight)}
    gs.save({"model": model, "optimizer": OptimizerState(optimizer, model)}, tmp_path / "c")
    layout = lay_out([FlatParameter("w", (4, 3), "float32")], 2)

    def load(group: Any) -> torch.Tensor:
        buffers = {name: empty_buffers(layout, group.rank, torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        wanted = {"optimizer": {"state": reshardable_state(layout, group.rank, buffers, model)}}
        gs.load(wanted, tmp_path / "c", process_group=group, strict=gs.StrictHandling.RAISE_UNEXPECTED)
        return buffers["exp_avg"][0]

    assert torch.equal(torch.cat(run_ranks(2, load)).view(4, 3), optimizer.state[weight]["exp_avg"])
