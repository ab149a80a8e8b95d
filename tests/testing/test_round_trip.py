"""`round_trip`: passes where every bit comes back, and names what did not where it does not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import giantstep as gs
import giantstep.testing.roundtrip
from giantstep.errors import (
    BadArgumentError,
    CoverageError,
    DisagreementError,
    DtypeMismatchError,
    KeyMismatchError,
    UnsupportedTypeError,
)
from giantstep.storage.memory import _MEDIA
from giantstep.testing import RanksFailedError, RoundTripError, round_trip
from layouts import DTYPES, Case, bits, cases, cut, random_tensor, strided, zeros_like

WHOLE = torch.arange(48.0).reshape(8, 6)


def rows(ranks: int, whole: torch.Tensor = WHOLE, key: str = "w", copies: int = 1) -> list[dict[str, Any]]:
    parts = [part.clone() for part in torch.chunk(whole, ranks)]
    return [
        {key: gs.ShardedTensor.from_rank_offsets(key, parts[rank % ranks], (0, rank % ranks, ranks), replica_id=rank // ranks)}
        for rank in range(ranks * copies)
    ]


def columns(ranks: int, whole: torch.Tensor = WHOLE, key: str = "w") -> list[dict[str, Any]]:
    parts = torch.chunk(whole, ranks, dim=1)
    return [{key: gs.ShardedTensor.from_rank_offsets(key, part.clone(), (1, rank, ranks))} for rank, part in enumerate(parts)]


def flat(*cuts: int) -> list[dict[str, Any]]:
    """Ranges of the flattened tensor, of any length."""
    shards = []
    for start, stop in zip((0, *cuts), (*cuts, WHOLE.numel()), strict=True):
        data = WHOLE.reshape(-1)[start:stop].clone()
        shards.append({"w": gs.ShardedTensor.from_rank_offsets_flat("w", data, (8, 6), flattened_range=slice(start, stop))})
    return shards


def allocated(states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{path: replace(leaf, data=None) for path, leaf in state.items()} for state in states]


LAYOUTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "one rank": lambda: [{"w": WHOLE.clone()}],
    "rows": lambda: rows(4),
    "rows and copies": lambda: rows(2, copies=3),
    "columns": lambda: columns(3),
    "flat": lambda: flat(7, 7, 31),
    "replicated": lambda: [{"w": WHOLE.clone()} for _ in range(3)],
}


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_layout_under_every_other(source: str, target: str) -> None:
    targets = LAYOUTS[target]()
    loaded = round_trip(LAYOUTS[source](), targets)
    assert len(loaded) == len(targets)
    for state, asked in zip(loaded, targets, strict=True):
        assert state["w"] is (asked["w"].data if isinstance(asked["w"], gs.ShardedTensor) else asked["w"])
        assert state.report.tensors == 1
    assert not [name for name in _MEDIA if name.startswith("round-trip")]


def test_what_is_allocated_is_compared_too() -> None:
    loaded = round_trip(rows(4), allocated(columns(2)))
    assert torch.equal(loaded[1]["w"], WHOLE[:, 3:])
    loaded = round_trip(rows(4), [{"w": torch.empty(8, 6, device="meta")}])
    assert torch.equal(loaded[0]["w"], WHOLE)


def test_states_may_be_their_own_targets() -> None:
    states = rows(4)
    round_trip(states, states)
    assert torch.equal(torch.cat([state["w"].data for state in states]), WHOLE)


def test_a_path_keeps_the_checkpoint(tmp_path: Path) -> None:
    round_trip(rows(2), columns(3), path=tmp_path)
    assert (gs.open_checkpoint(tmp_path)["w"][...] == WHOLE.numpy()).all()


def test_sixty_four_ranks_to_forty_eight() -> None:
    whole = torch.randn(192, 8)
    round_trip(rows(64, whole), rows(48, whole))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_compared_by_its_bits(dtype: torch.dtype) -> None:
    whole = random_tensor((6, 8), dtype, 5)
    states = [
        {"w": gs.ShardedTensor("w", cut(whole, shard), dtype, shard.size, (6, 8), shard.offset, None)} for shard in _halves(0)
    ]
    targets = [
        {"w": gs.ShardedTensor("w", strided(zeros_like(cut(whole, shard)), 2), dtype, shard.size, (6, 8), shard.offset, None)}
        for shard in _halves(1)
    ]
    loaded = round_trip(states, targets)
    assert [bits(state["w"]) for state in loaded] == [bits(cut(whole, shard)) for shard in _halves(1)]


def _halves(axis: int) -> list[Any]:
    from giantstep.shards.region import Region

    if axis == 0:
        return [Region((0, 0), (3, 8)), Region((3, 0), (3, 8))]
    return [Region((0, 0), (6, 5)), Region((0, 5), (6, 3))]


def test_casts_are_expected_as_torch_makes_them() -> None:
    options = gs.LoadOptions(cast="floating")
    whole = torch.randn(8, 6)
    round_trip(rows(2, whole), columns(2, whole.to(torch.bfloat16)), load_options=options)
    with pytest.raises(DtypeMismatchError):
        round_trip(rows(2, whole), columns(2, whole.to(torch.bfloat16)))


@pytest.mark.parametrize("length", [5, 8, 12])
def test_padded_targets_hold_what_was_saved_and_zeros(length: int) -> None:
    target = gs.ShardedTensor("w", torch.ones(length, 6), torch.float32, (length, 6), (length, 6), (0, 0), None, 0, 0, True)
    loaded = round_trip(rows(4), [{"w": target}])
    assert torch.equal(loaded[0]["w"][:8], WHOLE[:length])
    assert not loaded[0]["w"][8:].any()


def gated(rank: int, ranks: int, gate: torch.Tensor, up: torch.Tensor) -> gs.ShardedTensorFactory:
    """A fused weight: each rank's rows of the gate above its rows of the other half."""
    data = torch.cat([torch.chunk(half, ranks)[rank] for half in (gate, up)])

    def build(key: str, data: torch.Tensor, replica: Any, flattened: slice | None) -> dict[str, Any]:
        assert flattened is None
        return {
            name: gs.ShardedTensor.from_rank_offsets(f"{key}.{name}", half, (0, rank, ranks), replica_id=replica)
            for name, half in zip(("gate", "up"), torch.chunk(data, 2), strict=True)
        }

    return gs.ShardedTensorFactory("mlp", data, build, lambda parts: torch.cat([parts["gate"], parts["up"]]))


def test_factories_with_and_without_memory() -> None:
    sources = [{"mlp": gated(rank, 4, WHOLE, -WHOLE)} for rank in range(4)]
    targets = [{"mlp": gated(rank, 2, torch.zeros(8, 6), torch.zeros(8, 6))} for rank in range(2)]
    loaded = round_trip(sources, targets)
    assert torch.equal(loaded[1]["mlp"], torch.cat([WHOLE[4:], -WHOLE[4:]]))
    meta = torch.empty(8, 6, device="meta")
    round_trip(sources, [{"mlp": gated(rank, 8, meta, meta)} for rank in range(8)])


def test_a_factory_that_merges_wrongly_is_found() -> None:
    sources = [{"mlp": gated(rank, 2, WHOLE, -WHOLE)} for rank in range(2)]
    targets = [{"mlp": gated(rank, 2, WHOLE, -WHOLE)} for rank in range(2)]
    targets[1]["mlp"].merge_fn = lambda parts: torch.cat([parts["up"], parts["gate"]])
    with pytest.raises(RoundTripError, match=r"rank 1: tensor 'mlp.gate' at \[4, 0\]: loaded -24.0, expected 24.0") as found:
        round_trip(sources, targets)
    assert (found.value.key, found.value.rank, found.value.index) == ("mlp.gate", 1, (4, 0))


def test_modules_optimizers_and_common_state() -> None:
    def trained(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=seed / 10)
        model(torch.randn(5, 4)).sum().backward()
        optimizer.step()
        return {"model": model, "optimizer": optimizer, "step": seed, "nested": [{"a": (1, math.nan)}, {}]}

    source, targets = trained(1), [trained(seed) for seed in (2, 3)]
    loaded = round_trip([source, copy.deepcopy(source)], targets)
    assert loaded[1]["model"] is targets[1]["model"]
    assert loaded[1]["step"] == 1
    assert torch.equal(targets[1]["model"][0].weight, source["model"][0].weight)
    assert targets[0]["optimizer"].param_groups[0]["lr"] == 0.1


def test_sharded_and_local_objects() -> None:
    def states(ranks: int, salt: str) -> list[dict[str, Any]]:
        return [
            {
                "rng": gs.ShardedObject("rng", {"seed": f"{salt}{rank}", "words": [rank]}, (ranks,), (rank,)),
                "all": gs.ShardedObject("all", salt, (), (), replica_id=rank),
                "local": gs.LocalNonpersistentObject([salt]),
                "mixed": [torch.full((2,), 3.0), salt, {"deep": gs.LocalNonpersistentObject(salt)}],
            }
            for rank in range(ranks)
        ]

    loaded = round_trip(states(3, "saved"), states(3, "local"))
    assert loaded[2]["rng"] == {"seed": "saved2", "words": [2]}
    assert loaded[2]["local"] == ["local"]
    assert loaded[0]["mixed"][1:] == ["saved", {"deep": "local"}]
    dropped = round_trip(states(3, "saved"), states(2, "local"), load_options=gs.LoadOptions(on_object_reshard={"rng": "drop"}))
    assert dropped[1]["rng"]["seed"] == "local1"

    def join(_key: str, stored: dict[tuple[int, ...], Any], _shape: Any, _offset: Any) -> str:
        return "+".join(value["seed"] for _, value in sorted(stored.items()))

    joined = round_trip(states(3, "s"), states(2, "t"), load_options=gs.LoadOptions(on_object_reshard={"rng": join}))
    assert joined[0]["rng"] == "s0+s1+s2"


def test_renamed_and_filtered_keys() -> None:
    targets = [state | {"more": torch.full((2,), 7.0)} for state in columns(2, key="new")]
    loaded = round_trip(
        [*rows(2), {"other": torch.ones(3)}],
        targets,
        strict=gs.StrictHandling.RAISE_UNEXPECTED,
        load_options=gs.LoadOptions(rename={"new": "w", "more": None}),
    )
    assert loaded[0]["more"].tolist() == [7, 7]
    with pytest.raises(KeyMismatchError, match="1 key is requested but not in the checkpoint"):
        round_trip(rows(2), [{"w": torch.zeros(8, 6), "more": torch.ones(2)}])
    round_trip(rows(2), [{"w": torch.zeros(8, 6), "more": torch.ones(2)}], strict=gs.StrictHandling.IGNORE_ALL)


class Quantised(torch.Tensor):
    """Bytes and a scale per row."""

    @staticmethod
    def __new__(cls: type, data: torch.Tensor, _scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self.qdata, self.scale = data, scale

    def __repr__(self, **_settings: Any) -> str:
        return f"Quantised({tuple(self.shape)})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["qdata", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], _context: Any, _size: Any, _stride: Any) -> Any:
        return cls(inner["qdata"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].qdata, args[0].scale)
        raise NotImplementedError(str(func))


def test_wrapper_tensors_are_compared_part_by_part() -> None:
    def states(ranks: int, fill: int | None) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for rank in range(ranks):
            size = 8 // ranks
            data = torch.arange(48, dtype=torch.int8).reshape(8, 6)[rank * size : (rank + 1) * size].clone()
            scale = torch.arange(8.0).reshape(8, 1)[rank * size : (rank + 1) * size].clone()
            if fill is not None:
                data.fill_(fill), scale.fill_(fill)
            found.append({"w": gs.ShardedTensor.from_rank_offsets("w", Quantised(data, scale), (0, rank, ranks))})
        return found

    loaded = round_trip(states(4, None), states(2, 9))
    assert loaded[1]["w"].scale.flatten().tolist() == [4, 5, 6, 7]


# What is wrong is found. The loader is right, so it is made wrong here.


def break_loading(monkeypatch: pytest.MonkeyPatch, breaking: Callable[[int, gs.LoadedState], Any]) -> None:
    load = giantstep.testing.roundtrip.load

    def broken(*arguments: Any, process_group: Any, **settings: Any) -> Any:
        state = load(*arguments, process_group=process_group, **settings)
        return breaking(process_group.rank, state) or state

    monkeypatch.setattr(giantstep.testing.roundtrip, "load", broken)


def test_one_wrong_bit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(rank: int, state: Any) -> None:
        if rank == 2:
            state["w"].view(torch.int32)[5, 1] ^= 1

    break_loading(monkeypatch, flip)
    with pytest.raises(RoundTripError) as found:
        round_trip(rows(4), columns(3))
    assert str(found.value) == (
        "rank 2: tensor 'w' at [5, 5]: loaded 35.000003814697266, expected 35.0 (bits 0x420c0001, expected 0x420c0000)"
    )
    assert (found.value.key, found.value.rank, found.value.index) == ("w", 2, (5, 5))


@pytest.mark.parametrize(
    ("dtype", "value", "wrong"),
    [(torch.float64, 0.0, -0.0), (torch.complex128, complex(0.0, 0.0), complex(0.0, -0.0))],
)
def test_the_sign_of_a_zero_counts(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, value: Any, wrong: Any) -> None:
    break_loading(monkeypatch, lambda _, state: state["w"].fill_(wrong) is None)
    with pytest.raises(RoundTripError, match=r"'w' at \[0\]: loaded .*bits 0x8000000000000000, expected 0x0"):
        round_trip([{"w": torch.full((3,), value, dtype=dtype)}], [{"w": torch.ones(3, dtype=dtype)}])


def test_nan_is_equal_to_itself() -> None:
    nan = torch.full((3,), complex(math.nan, 1.0), dtype=torch.complex128)
    round_trip([{"w": nan}], [{"w": torch.zeros(3, dtype=torch.complex128)}])


def test_a_tensor_that_is_never_filled_is_found_even_if_it_was_right_before(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = rows(2)

    def forget(*_arguments: Any, process_group: Any, **_settings: Any) -> Any:
        return gs.LoadedState({"w": targets[process_group.rank]["w"].data}, None)  # type: ignore[arg-type]

    monkeypatch.setattr(giantstep.testing.roundtrip, "load", forget)
    with pytest.raises(RoundTripError, match=r"rank 0: tensor 'w' at \[0, 0\]: loaded .*bits 0xa5a5a5a5"):
        round_trip(rows(4), targets)


@pytest.mark.parametrize(
    ("breaking", "told"),
    [
        (lambda state: state.update(w=state["w"].clone()), "the tensor at 'w' was not filled in place"),
        (lambda state: state.pop("w"), "nothing stands at 'w' after loading"),
        (lambda state: state.update(v=torch.zeros(2, device="meta")), "tensor 'v' was not loaded"),
        (
            lambda state: state.update(o=None),
            "object 'o/shard__' came back with another value at 'a.0', 'a.1': None, expected {'a': [1, 2]}",
        ),
        (lambda state: state["o"]["a"].append(3), "came back with another value at 'a.2': {'a': [1, 2, 3]}"),
        (lambda state: state.update(local=6), "the local object at 'local' is another one"),
        (lambda state: state.update(step=True), "common state at 'step' came back with another value"),
        (lambda state: state.pop("step"), "common state at 'step' was saved and did not come back"),
        (lambda state: state["list"].append(4), "common state at 'list.2' was not saved but came back"),
    ],
)
def test_whatever_comes_back_otherwise_is_named(
    monkeypatch: pytest.MonkeyPatch, breaking: Callable[[Any], Any], told: str
) -> None:
    def state(meta: bool = False) -> dict[str, Any]:
        return {
            "w": WHOLE.clone(),
            "v": torch.ones(2, device="meta" if meta else "cpu"),
            "o": gs.ShardedObject("o", {"a": [1, 2]}, (), ()),
            "local": gs.LocalNonpersistentObject(object()),
            "step": 1,
            "list": [1, torch.ones(1)],
        }

    target = state(meta=True)
    round_trip([state()], [target])

    def break_it(_rank: int, loaded: Any) -> None:
        breaking(loaded)

    break_loading(monkeypatch, break_it)
    with pytest.raises(RoundTripError) as found:
        round_trip([state()], [target])
    assert told in str(found.value)


def test_padding_that_is_not_zero_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    break_loading(monkeypatch, lambda _, state: state["w"][9].fill_(2) is None)
    target = gs.ShardedTensor.from_rank_offsets("w", torch.ones(12, 6), allow_shape_mismatch=True)
    with pytest.raises(RoundTripError, match=r"at \[9, 0\]: loaded 2.0, expected 0.0"):
        round_trip(rows(4), [{"w": target}])


def test_sources_that_do_not_fit_together_are_refused_before_anything_is_touched() -> None:
    targets = columns(2)
    with pytest.raises(CoverageError, match="no rank saves"):
        round_trip(rows(4)[1:], targets)
    with pytest.raises(BadArgumentError, match=r"rank 1, phase describe.*no data to save"):
        round_trip([rows(2)[0], allocated(rows(2))[1]], targets)
    with pytest.raises(UnsupportedTypeError):
        round_trip([{"x": object()}], targets)
    with pytest.raises(BadArgumentError, match=r"rank 0, phase describe.*has layout"):
        round_trip(rows(2), [{"w": WHOLE.to_sparse()}])
    with pytest.raises(BadArgumentError, match="dequantise"):
        round_trip(rows(2), targets, load_options=gs.LoadOptions(dequantise=True))
    with pytest.raises(BadArgumentError, match="at least one"):
        round_trip(rows(2), [])
    assert torch.equal(torch.cat([state["w"].data for state in targets], dim=1), WHOLE)


def test_a_copy_that_differs_inside_another_region_is_found() -> None:
    """The copy is whole, the main replicas are rows: no region is held twice, so digests of regions say nothing."""
    whole = WHOLE.clone()
    whole[6, 2] = 99
    states = [*rows(4), {"w": gs.ShardedTensor.from_rank_offsets("w", whole, replica_id=1)}]
    with pytest.raises(DisagreementError, match=r"tensor 'w': rank 4 holds at \[6, 2\] 99.0, expected 38.0"):
        round_trip(states, columns(2))


def test_ranks_that_fail_in_different_ways_are_all_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(rank: int, _state: Any) -> None:
        raise ValueError(f"rank {rank} stumbled")

    break_loading(monkeypatch, fail)
    with pytest.raises(RanksFailedError, match="rank 0: ValueError: rank 0 stumbled; rank 1: ValueError: rank 1 stumbled"):
        round_trip(rows(2), columns(2))
    assert not [name for name in _MEDIA if name.startswith("round-trip")]


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[list[Case], int, int]:
    saving, loading = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    keys = draw(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=3, unique=True))
    return [draw(cases(key, saving, loading)) for key in keys], saving, loading


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(checkpoints())
def test_any_layout_under_any_other(drawn: tuple[list[Case], int, int]) -> None:
    tensors, saving, loading = drawn
    states: list[dict[str, Any]] = [{} for _ in range(saving)]
    targets: list[dict[str, Any]] = [{} for _ in range(loading)]
    for case in tensors:
        for number, shard in enumerate(case.saved):
            data = strided(cut(case.value(), shard.region), shard.stride_kind)
            states[shard.rank][f"{case.key}/{number}"] = case.sharded(shard, data)
        for number, shard in enumerate(case.loaded):
            empty = strided(zeros_like(cut(case.value(), shard.region)), shard.stride_kind)
            targets[shard.rank][f"{case.key}/{number}"] = case.sharded(shard, empty if number % 2 else None)
    loaded = round_trip(states, targets)
    for case in tensors:
        for number, shard in enumerate(case.loaded):
            assert bits(loaded[shard.rank][f"{case.key}/{number}"]) == bits(cut(case.value(), shard.region))
