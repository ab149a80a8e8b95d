"""Objects per rank or position: stored once each, given back to the right one; and local ones, which are not stored."""

from __future__ import annotations

import logging
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import giantstep as gs
from giantstep.errors import (
    BadArgumentError,
    CoverageError,
    DisagreementError,
    KeyMismatchError,
    ShapeMismatchError,
    UnexpectedError,
    UnsupportedTypeError,
)
from giantstep.shards.object_keys import ObjectPosition, position_of
from giantstep.testing.ranks import run_ranks, run_ranks_collecting


def per_rank(group: Any, data: Any, key: str = "rng") -> gs.ShardedObject:
    return gs.ShardedObject(key, data, (group.size,), (group.rank,))


@given(
    st.text(min_size=1),
    st.lists(st.integers(1, 10**4), max_size=4).flatmap(
        lambda shape: st.tuples(st.just(tuple(shape)), st.tuples(*(st.integers(0, size - 1) for size in shape)))
    ),
)
def test_a_unique_key_says_where_an_object_stands(key: str, grid: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    shape, offset = grid
    position = ObjectPosition(key, shape, offset)
    assert position_of(position.unique_key) == position
    given_back = gs.ShardedObject.empty_from_unique_key(position.unique_key, replica_id=(0, 1))
    assert (given_back.key, given_back.global_shape, given_back.global_offset) == (key, shape, offset)
    assert given_back.unique_key == gs.ShardedObject(key, 5, shape, offset).unique_key


def test_unique_keys_are_those_of_megatron() -> None:
    assert gs.ShardedObject("ObjB", None, (1, 8), (0, 3)).unique_key == "ObjB/shard_0.3_1.8"
    assert gs.ShardedObject("k", None, (1,), (0,)).unique_key == "k/shard_0_1"


@pytest.mark.parametrize(
    "text", ["", "k", "k/shard_0", "k/shard_1_1", "k/shard_0.0_1", "k/shard_01_2", "k/shard_0_1.", "/shard_0_1"]
)
def test_what_is_no_unique_key(text: str) -> None:
    assert position_of(text) is None
    with pytest.raises(BadArgumentError, match="is not the unique key"):
        gs.ShardedObject.empty_from_unique_key(text)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("", 0, (1,), (0,)), "not empty"),
        ((5, 0, (1,), (0,)), "not empty"),
        (("k", 0, (2,), (2,)), "no position"),
        (("k", 0, (2,), (-1,)), "no position"),
        (("k", 0, (2, 2), (0,)), "no position"),
        (("k", 0, (0,), (0,)), "no position"),
        (("k", 0, "ab", (0,)), "global_shape"),
        (("k", 0, (1,), (0,), -1), "replica_id"),
        (("k", 0, (2**40, 2**40), (0, 0)), "too many positions"),
    ],
)
def test_objects_that_cannot_be(arguments: tuple[Any, ...], problem: str) -> None:
    with pytest.raises(BadArgumentError, match=problem):
        gs.ShardedObject(*arguments)


def test_the_same_key_from_every_rank_returns_to_the_right_rank(tmp_path: Path) -> None:
    def save(group: Any) -> None:
        gs.save(
            {"rng": per_rank(group, {"seed": group.rank, "state": torch.tensor([group.rank])})}, tmp_path, process_group=group
        )

    def load(group: Any) -> Any:
        return gs.load({"rng": per_rank(group, None)}, tmp_path, process_group=group)

    run_ranks(8, save)
    for rank, loaded in enumerate(run_ranks(8, load)):
        assert loaded["rng"]["seed"] == rank
        assert loaded["rng"]["state"].tolist() == [rank]
        assert loaded.report.objects == 1
    assert sorted(gs.open_checkpoint(tmp_path).objects()) == [f"rng/shard_{rank}_8" for rank in range(8)]


def test_the_value_saved_wins_over_the_one_in_the_request(tmp_path: Path) -> None:
    gs.save({"a": [gs.ShardedObject("k", BytesIO(b"saved"), (1,), (0,)), 5]}, tmp_path)
    loaded = gs.load({"a": [gs.ShardedObject("k", BytesIO(b"local"), (1,), (0,)), 6]}, tmp_path)
    assert loaded["a"][0].read() == b"saved"
    assert loaded["a"][1] == 5


def test_an_object_that_is_a_container_is_put_in_place_whole(tmp_path: Path) -> None:
    gs.save({"a": {"x": gs.ShardedObject("k", {"b": [1, {}]}, (), ()), "y": 1}}, tmp_path)
    loaded = gs.load({"a": {"x": gs.ShardedObject("k", {"c": 1, "d": torch.ones(1)}, (), ())}}, tmp_path)
    assert loaded == {"a": {"x": {"b": [1, {}]}, "y": 1}}


def test_objects_under_stateful_ones_and_beside_tensors(tmp_path: Path) -> None:
    class Loader:
        def __init__(self, position: int) -> None:
            self.position = position

        def state_dict(self) -> dict[str, Any]:
            return {"position": gs.ShardedObject("loader", self.position, (1,), (0,)), "w": torch.full((2,), self.position)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.position = state["position"]

    gs.save({"loader": Loader(7)}, tmp_path)
    loader = Loader(0)
    assert gs.load({"loader": loader}, tmp_path)["loader"] is loader
    assert loader.position == 7


def test_a_position_without_a_main_replica_with_two_or_that_nobody_holds(tmp_path: Path) -> None:
    def save(group: Any, offset: int, replica: int) -> None:
        gs.save({"o": gs.ShardedObject("o", 1, (3,), (offset,), replica)}, tmp_path, process_group=group)

    for layout, problem in (
        ([(0, 0), (1, 0), (1, 0)], r"object 'o/shard_1_3' has several main replicas: it is held by rank 1, 2\."),
        ([(0, 0), (1, 0), (2, 1)], r"object 'o/shard_2_3' has no main replica: it is held by rank 2\."),
        ([(0, 0), (1, 0), (1, 1)], r"object 'o' with global shape \(3,\): no rank saves position \(2,\)\."),
    ):
        _, errors = run_ranks_collecting(3, lambda group, layout=layout: save(group, *layout[group.rank]))
        assert {type(error) for error in errors} == {CoverageError}
        assert len({str(error) for error in errors}) == 1
        with pytest.raises(CoverageError, match=problem):
            raise errors[0]  # type: ignore[misc]


def test_a_huge_grid_with_gaps_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(CoverageError, match=r"position \(0, 1\), \(0, 2\), .* and 999999999994 more"):
        gs.save({"o": gs.ShardedObject("o", 1, (10**6, 10**6), (0, 0))}, tmp_path)


def test_grids_of_two_shapes_are_a_disagreement(tmp_path: Path) -> None:
    def save(group: Any) -> None:
        gs.save({"o": gs.ShardedObject("o", 1, (1 + group.rank,), (0,))}, tmp_path, process_group=group)

    _, errors = run_ranks_collecting(2, save)
    assert {type(error) for error in errors} == {DisagreementError}
    assert "(1,) on rank 0, (2,) on rank 1" in str(errors[0])


def test_one_position_twice_on_one_rank_is_refused(tmp_path: Path) -> None:
    twice = {"a": gs.ShardedObject("o", 1, (1,), (0,)), "b": gs.ShardedObject("o", 2, (1,), (0,))}
    with pytest.raises(BadArgumentError, match=r"two objects .* at 'a' and 'b'"):
        gs.save(twice, tmp_path)
    gs.save({"a": gs.ShardedObject("o", 1, (1,), (0,))}, tmp_path)
    assert gs.load(twice, tmp_path) == {"a": 1, "b": 1}


def test_replicas_that_differ_are_named_with_paths_and_ranks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def save(group: Any, how: Any) -> None:
        value = {"seed": group.rank // 2, "same": [1, 2]}
        item = gs.ShardedObject("sched", value, (1,), (0,), replica_id=(0, (group.rank + 1) % 4))
        options = gs.SaveOptions(on_object_difference=how)
        gs.save({"sched": item}, tmp_path, process_group=group, options=options)

    with caplog.at_level(logging.WARNING):
        run_ranks(4, lambda group: save(group, "warn"))
    expected = "object 'sched/shard_0_1' differs from rank 3's at 'seed' (ranks 0, 1)"
    assert expected in caplog.text
    assert len(caplog.records) == 1
    assert gs.open_checkpoint(tmp_path).objects() == {"sched/shard_0_1": {"seed": 1, "same": [1, 2]}}
    _, errors = run_ranks_collecting(4, lambda group: save(group, "raise"))
    assert {type(error) for error in errors} == {DisagreementError}
    assert expected in str(errors[2])


def test_a_type_that_cannot_be_stored_is_named_with_the_path_in_the_state_dict(tmp_path: Path) -> None:
    class Mine:
        pass

    state = {"a": {"b": gs.ShardedObject("o", {"c": [Mine()]}, (1,), (0,))}}
    with pytest.raises(UnsupportedTypeError, match=r"'a\.b\.c\.0' .*Mine.*register_type"):
        gs.save(state, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_another_number_of_ranks_follows_the_declared_policy(tmp_path: Path, ranks: int) -> None:
    run_ranks(4, lambda group: gs.save({"o": per_rank(group, 10 * group.rank, "pos")}, tmp_path, process_group=group))

    def load(group: Any, options: gs.LoadOptions) -> Any:
        return gs.load({"o": per_rank(group, "local", "pos")}, tmp_path, process_group=group, options=options)

    _, errors = run_ranks_collecting(ranks, lambda group: load(group, gs.LoadOptions()))
    assert {type(error) for error in errors} == {ShapeMismatchError}
    assert f"pos: stored (4,), requested ({ranks},)" in str(errors[0])
    assert "on_object_reshard" in str(errors[0])

    dropped = run_ranks(ranks, lambda group: load(group, gs.LoadOptions(on_object_reshard={"po": "drop", "": "raise"})))
    assert [loaded["o"] for loaded in dropped] == ["local"] * ranks
    assert dropped[0].report.dropped == ("pos",)
    assert dropped[0].report.missing == ()

    def total(key: str, stored: dict[tuple[int, ...], int], shape: tuple[int, ...], offset: tuple[int, ...]) -> Any:
        return key, sum(stored.values()), stored[(3,)], shape, offset

    made = run_ranks(ranks, lambda group: load(group, gs.LoadOptions(on_object_reshard=total)))
    assert [loaded["o"] for loaded in made] == [("pos", 60, 30, (ranks,), (rank,)) for rank in range(ranks)]


def test_what_the_users_function_raises_comes_before_any_tensor_is_touched(tmp_path: Path) -> None:
    gs.save({"o": gs.ShardedObject("o", 1, (1,), (0,)), "w": torch.ones(2)}, tmp_path)

    def fail(*_: Any) -> Any:
        raise RuntimeError("cannot")

    target = torch.zeros(2)
    with pytest.raises(UnexpectedError, match=r"phase plan\] RuntimeError: cannot"):
        gs.load(
            {"o": gs.ShardedObject("o", 1, (2,), (0,)), "w": target}, tmp_path, options=gs.LoadOptions(on_object_reshard=fail)
        )
    assert not target.any()


def test_objects_count_in_strictness(tmp_path: Path) -> None:
    run_ranks(2, lambda group: gs.save({"o": per_rank(group, 1, "stored")}, tmp_path, process_group=group))
    with pytest.raises(KeyMismatchError, match=r"other\b[\s\S]*stored"):
        gs.load({"o": gs.ShardedObject("other", 1, (1,), (0,))}, tmp_path)
    loaded = gs.load({"o": gs.ShardedObject("other", "local", (1,), (0,))}, tmp_path, strict=gs.StrictHandling.RETURN_ALL)
    assert loaded == {"o": "local"}
    assert loaded.report.unexpected == ("other",)
    assert loaded.report.missing == ("stored",)
    with pytest.raises(KeyMismatchError, match="stored as a sharded object, not as a tensor"):
        gs.load({"stored": torch.zeros(1)}, tmp_path)


def test_some_positions_of_a_grid_can_be_loaded(tmp_path: Path) -> None:
    run_ranks(4, lambda group: gs.save({"o": per_rank(group, group.rank, "k")}, tmp_path, process_group=group))
    assert gs.load({"o": gs.ShardedObject("k", None, (4,), (2,))}, tmp_path) == {"o": 2}


def test_a_local_object_is_never_stored_and_comes_back_as_it_is(tmp_path: Path) -> None:
    handle = object()
    state = {"a": [gs.LocalNonpersistentObject(handle), 1], "b": gs.LocalNonpersistentObject({"x": {}}), "c": torch.ones(1)}
    gs.save(state, tmp_path)
    assert gs.metadata.load_common_state_dict(tmp_path).keys() == {"a"}
    loaded = gs.load(state, tmp_path)
    assert loaded["a"][0] is handle
    assert loaded["a"][1] == 1
    assert loaded["b"] is state["b"].unwrap()
    assert gs.open_checkpoint(tmp_path).objects() == {}


def test_a_local_object_wins_over_what_an_earlier_save_stored_there(tmp_path: Path) -> None:
    gs.save({"a": {"x": 1, "y": {"z": 2}}}, tmp_path)
    local = {"a": {"x": gs.LocalNonpersistentObject("mine"), "y": gs.LocalNonpersistentObject({"w": 3})}}
    assert gs.load(local, tmp_path) == {"a": {"x": "mine", "y": {"w": 3}}}


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ({"a.b": 1, "a": {"b": 2}}, {"a.b": 9, "a": {"b": 2}}),
        ({1: 5, "1": 6}, {1: 5, "1": 7}),
        ([1, 2], (1, 2)),
        ({0: 1}, [1]),
        ({1: 5}, {"1": 5}),
        ({True: 5}, {1: 5}),
    ],
)
def test_differences_that_read_alike_are_noticed(tmp_path: Path, here: Any, there: Any) -> None:
    def save(group: Any) -> None:
        options = gs.SaveOptions(on_object_difference="raise")
        gs.save({"x": there if group.rank else here}, tmp_path, process_group=group, options=options)

    _, errors = run_ranks_collecting(2, save)
    assert {type(error) for error in errors} == {DisagreementError}
