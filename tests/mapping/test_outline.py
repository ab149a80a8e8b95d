"""A state dict that looks like one before is taken apart by its outline: with the same result, and only if it does."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import giantstep as gs
from giantstep.describing import description_of
from giantstep.errors import BadArgumentError
from giantstep.kept_outlines import kept_outlines
from giantstep.mapping.describe import Described, describe
from giantstep.mapping.outline import Outline
from giantstep.testing.ranks import run_ranks

State = dict[Any, Any]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    place = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", store=dist.FileStore(str(place), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Holder:
    """A Stateful object."""

    def __init__(self, state: State) -> None:
        self.state = state

    def state_dict(self) -> State:
        return self.state

    def load_state_dict(self, state: State) -> None:
        self.state = state


def rich_state(mesh: DeviceMesh) -> State:
    """A state dict with a bit of everything."""
    tied = torch.rand(3, 4)
    whole = torch.rand(6, 4)
    distributed = DTensor.from_local(torch.rand(2, 3), mesh, [Shard(0)])
    return {
        "model": {
            "a": torch.rand(4, 2),
            "b": torch.nn.Parameter(torch.rand(3)),
            "tied": tied,
            "twin": tied,
            "none": torch.rand(0),
        },
        "optim": {
            "state": {0: {"step": torch.tensor(3.0), "m": torch.rand(4, 2)}, 1: {"m": torch.rand(3)}},
            "groups": [{"lr": 0.1}],
        },
        "mixed": [torch.rand(2), "text", (torch.rand(1), None)],
        "bare": OrderedDict(x=1, y={}, z=[]),
        "crooked": whole.t(),
        "half": torch.rand(4, dtype=torch.complex64).conj(),
        "wide": torch.rand(4).to(torch.bfloat16),
        "distributed": distributed,
        "shard": gs.ShardedTensor.from_rank_offsets("shard", torch.rand(2, 2), (0, 1, 2)),
        "layer": gs.ShardedTensor.from_rank_offsets("layer", torch.rand(2, 2), (0, 1, 2), prepend_axis_num=1),
        "flat": gs.ShardedTensor.from_rank_offsets_flat("flat", torch.rand(5), (3, 4), (0, 0, 2), flattened_range=slice(2, 7)),
        "object": gs.ShardedObject("object", {"n": 1}, (2,), (0,)),
        "local": gs.LocalNonpersistentObject(object()),
        "held": Holder({"w": torch.rand(2), "n": 3}),
        True: torch.rand(2),
        "plain": [1, "two", 3.0, None],
    }


def apart(described: Described) -> tuple[Any, ...]:
    """Everything that is made of a state dict, to be compared."""
    leaves = [
        (leaf.path, leaf.key, id(leaf.source), leaf.dtype, leaf.global_shape, leaf.role, leaf.mesh, leaf.allow_shape_mismatch)
        for leaf in described.leaves
    ]
    pieces = [
        (region, view is None or (view.data_ptr(), view.shape, view.stride(), view.dtype, view.is_conj(), view.requires_grad))
        for leaf in described.leaves
        for region, view in leaf.pieces
    ]
    objects = [(leaf.path, leaf.source) for leaf in described.objects]
    stored = [(name, repr(item.value), item.role, item.path) for name, item in described.stored.items()]
    views = [(name, view.data_ptr()) for name, view in zip(described.names, described.views, strict=True) if view is not None]
    named = [(name, id(source)) for name, source in described.named_sources()]
    told = list(description_of(described, 1, 1 << 20).encode())
    return leaves, pieces, objects, described.locals, stored, views, named, told


def outline_of(state: State) -> Outline:
    found = describe(state, for_load=False, known=())
    assert found.outline is not None
    description_of(found, 1, 1 << 20)
    return found.outline


def test_a_state_that_looks_the_same_is_taken_apart_by_its_outline_into_the_same(mesh: DeviceMesh) -> None:
    outline = outline_of(rich_state(mesh))
    state = rich_state(mesh)
    quick = describe(state, for_load=False, known=[outline])
    assert quick.outline is outline
    assert apart(quick) == apart(describe(state, for_load=False))


def test_an_outline_for_saves_is_none_for_loads(mesh: DeviceMesh) -> None:
    state = rich_state(mesh)
    state["half"] = torch.rand(2)
    assert describe(state, for_load=True, known=[outline_of(state)]).outline is not outline_of(state)
    overlapping = {"w": torch.rand(1).expand(3)}
    outline = outline_of(overlapping)
    with pytest.raises(BadArgumentError, match="expanded or overlaps itself"):
        describe(overlapping, for_load=True, known=[outline])


def set_data(state: State, value: torch.Tensor) -> None:
    state["model"]["b"].data = value


def rename(state: State, old: Any, new: Any) -> None:
    items = list(state.items())
    state.clear()
    state.update({new if key is old else key: value for key, value in items})


CHANGES: dict[str, Callable[[State, DeviceMesh], Any]] = {
    "another shape": lambda s, _: s["model"].update(a=torch.rand(2, 4)),
    "another dtype": lambda s, _: s["model"].update(a=torch.rand(4, 2).double()),
    "other data in the same parameter": lambda s, _: set_data(s, torch.rand(2, 2)),
    "another dtype in the same parameter": lambda s, _: set_data(s, torch.rand(3).half()),
    "another key": lambda s, _: rename(s["model"], "a", "c"),
    "a key of another class": lambda s, _: rename(s, True, 1),
    "a key more": lambda s, _: s["model"].update(c=torch.rand(1)),
    "a key less": lambda s, _: s["model"].pop("a"),
    "another order": lambda s, _: s["model"].update(b=s["model"].pop("b")),
    "tied no more": lambda s, _: s["model"].update(twin=torch.rand(3, 4)),
    "tied to another": lambda s, _: s["model"].update(twin=s["mixed"][0], tied=s["mixed"][0]),
    "tied now": lambda s, _: s["optim"]["state"][0].update(m=s["model"]["a"]),
    "a part of another": lambda s, _: s["optim"]["state"][1].update(m=s["model"]["a"].view(-1)[:3]),
    "other strides": lambda s, _: s.update(crooked=torch.rand(4, 6)),
    "other strides of the same shape": lambda s, _: s.update(crooked=torch.rand(4, 12)[:, ::2]),
    "no more conjugated": lambda s, _: s.update(half=torch.rand(4, dtype=torch.complex64)),
    "negated": lambda s, _: s["model"].update(b=torch.nn.Parameter(torch.rand(3, dtype=torch.complex64).conj().imag)),
    "another placement": lambda s, m: s.update(distributed=DTensor.from_local(torch.rand(2, 3), m, [Replicate()])),
    "another mesh": lambda s, m: s.update(
        distributed=DTensor.from_local(torch.rand(2, 3), DeviceMesh("cpu", [0], mesh_dim_names=("other",)), [Shard(0)])
    ),
    "a plain tensor for a distributed one": lambda s, _: s.update(distributed=torch.rand(2, 3)),
    "a shard elsewhere": lambda s, _: s.update(shard=gs.ShardedTensor.from_rank_offsets("shard", torch.rand(2, 2), (0, 0, 2))),
    "a shard with another key": lambda s, _: setattr(s["shard"], "key", "other"),
    "a further replica": lambda s, _: s.update(shard=replace(s["shard"], replica_id=1)),
    "another flat range": lambda s, _: s.update(
        flat=gs.ShardedTensor.from_rank_offsets_flat("flat", torch.rand(5), (3, 4), (0, 0, 2), flattened_range=slice(3, 8))
    ),
    "shapes may differ": lambda s, _: setattr(s["shard"], "allow_shape_mismatch", True),
    "a tensor for a value": lambda s, _: s.update(plain=[1, "two", torch.rand(1), None]),
    "a value for a tensor": lambda s, _: s["model"].update(a=5),
    "a tuple for a list": lambda s, _: s.update(mixed=tuple(s["mixed"])),
    "an ordered dict": lambda s, _: s.update(model=OrderedDict(s["model"])),
    "an object of another position": lambda s, _: s.update(object=gs.ShardedObject("object", {"n": 1}, (2,), (1,))),
    "an object less": lambda s, _: s.pop("object"),
    "other values": lambda s, _: s.update(plain=[2, "three", 4.0, None], bare=OrderedDict(x=2, y={}, z=[])),
    "a container with something in it": lambda s, _: s["bare"]["y"].update(w=torch.rand(1)),
    "another state of an object": lambda s, _: s.update(held=Holder({"w": torch.rand(2), "n": 3, "v": torch.rand(1)})),
    "another value of an object": lambda s, _: s.update(held=Holder({"w": torch.rand(2), "n": 4})),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_result_is_as_without_an_outline(mesh: DeviceMesh, change: str) -> None:
    outline = outline_of(rich_state(mesh))
    state = rich_state(mesh)
    CHANGES[change](state, mesh)
    assert apart(describe(state, for_load=False, known=[outline])) == apart(describe(state, for_load=False))


@pytest.mark.parametrize(
    "change", ["another mesh", "other strides of the same shape", "no more conjugated", "negated", "tied no more"]
)
def test_what_only_later_steps_ask_for_makes_another_outline(mesh: DeviceMesh, change: str) -> None:
    """Copies, ties and digests are worked out for an outline, from what its tensors have in memory."""
    outline = outline_of(rich_state(mesh))
    state = rich_state(mesh)
    CHANGES[change](state, mesh)
    found = describe(state, for_load=False, known=[outline]).outline
    assert found is not None
    assert found is not outline


def test_meshes_that_change_places_make_another_outline(mesh: DeviceMesh) -> None:
    other = DeviceMesh("cpu", [0], mesh_dim_names=("other",))

    def state(*meshes: DeviceMesh) -> State:
        return {str(number): DTensor.from_local(torch.rand(2), mesh, [Shard(0)]) for number, mesh in enumerate(meshes)}

    outline = outline_of(state(mesh, mesh, other))
    assert describe(state(mesh, mesh, other), for_load=False, known=[outline]).outline is outline
    assert describe(state(mesh, other, other), for_load=False, known=[outline]).outline is not outline
    assert describe(state(other, other, mesh), for_load=False, known=[outline]).outline is not outline


REFUSED: dict[str, Callable[[State], Any]] = {
    "sparse": lambda s: s["model"].update(a=torch.rand(4, 2).to_sparse()),
    "meta": lambda s: s["model"].update(a=torch.empty(4, 2, device="meta")),
    "two meanings of one key": lambda s: s.update({"model.a": torch.rand(4, 2)}),
    "no data": lambda s: setattr(s["shard"], "data", None),
    "data of another shape": lambda s: setattr(s["shard"], "data", torch.rand(3, 2)),
    "outside": lambda s: setattr(s["shard"], "global_offset", (3, 0)),
    "not unicode": lambda s: s.update({"\ud800": torch.rand(1)}),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_cannot_be_saved_is_refused_though_the_state_before_had_an_outline(mesh: DeviceMesh, change: str) -> None:
    outline = outline_of(rich_state(mesh))
    state = rich_state(mesh)
    REFUSED[change](state)
    with pytest.raises(BadArgumentError):
        describe(state, for_load=False, known=[outline])


def test_a_state_nested_too_deeply_is_refused() -> None:
    state: State = {"w": torch.rand(1)}
    outline = outline_of(state)
    state["self"] = state
    with pytest.raises(BadArgumentError, match="200 levels"):
        describe(state, for_load=False, known=[outline])


def test_an_outline_keeps_neither_tensors_nor_values_nor_meshes(mesh: DeviceMesh) -> None:
    state = rich_state(mesh)
    other = DeviceMesh("cpu", [0], mesh_dim_names=("other",))
    state["distributed"] = DTensor.from_local(torch.rand(2, 3), other, [Shard(0)])
    outline = outline_of(state)
    left = [
        weakref.ref(found) for found in (state["model"]["a"], state["distributed"], state["held"], state["flat"].data, other)
    ]
    del state, other
    gc.collect()
    assert [found() for found in left] == [None] * len(left)
    assert outline.keys


def test_saves_keep_outlines_and_store_what_there_is(tmp_path: Path) -> None:
    def rank_function(group: Any) -> None:
        for number in range(6):
            state = {
                "w": torch.full((3, 2), float(number)),
                "x": gs.ShardedTensor.from_rank_offsets(
                    "x", torch.full((2,), float(10 * number + group.rank)), (0, group.rank, 2)
                ),
                "n": number,
                "twin": torch.zeros(1),
            }
            if number % 2:
                state["w"] = state["w"].double()
            if number == 4:
                state["twin"] = state["w"]
            gs.save(state, tmp_path / str(number), process_group=group)
            wanted = {"w": torch.zeros_like(state["w"]), "twin": torch.zeros_like(state["twin"])}
            wanted["x"] = gs.ShardedTensor.from_rank_offsets("x", torch.zeros(2), (0, group.rank, 2))
            found = gs.load(wanted, tmp_path / str(number), process_group=group)
            assert found["n"] == number
            assert torch.equal(found["w"], state["w"])
            assert found["x"].tolist() == [10 * number + group.rank] * 2
            assert torch.equal(found["twin"], state["twin"])
        assert 2 <= len(kept_outlines(group)) <= 4

    run_ranks(2, rank_function)


def test_groups_that_cannot_be_referred_to_weakly_have_none(tmp_path: Path) -> None:
    class Lone:
        __slots__ = ()
        rank, size = 0, 1

        def exchange(self, report: Any, answer: Any, _phase: str, _timeout_secs: float) -> Any:
            return answer([report])[0]

        def transfer(self, *_: Any) -> None:
            raise AssertionError

        def withdraw(self, error: Any) -> Any:
            return error

        def beside(self) -> Lone:
            return self

    group = Lone()
    gs.save({"w": torch.ones(2)}, tmp_path, process_group=group)
    assert not kept_outlines(group)
    assert np.array_equal(gs.load({"w": torch.zeros(2)}, tmp_path, process_group=group)["w"], [1, 1])
