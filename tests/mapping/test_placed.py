"""Leaves that are told where they stand and, on load, what there is; objects that ranks hold alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import CoverageError, DisagreementError, KeyMismatchError
from giantstep.mapping.placed import PlacedState, StoredNames
from giantstep.mapping.sharded_object import SharedObject
from giantstep.shards.object_keys import ObjectPosition
from giantstep.testing.ranks import RanksFailedError, run_ranks


class Moments(PlacedState):
    """As many tensors as were saved; notes what it is asked."""

    def __init__(self, count: int = 0) -> None:
        self.moments = [torch.full((2,), float(n)) for n in range(count)]
        self.places: list[str] = []
        self.seen: list[Any] = []
        self.unwanted: tuple[str, ...] = ()

    def state_at(self, place: str) -> Any:
        self.places.append(f"save {place}")
        count = SharedObject(f"{place}.count", len(self.moments), (), ())
        return {"count": count, "moments": {str(n): moment for n, moment in enumerate(self.moments)}}

    def state_for_load(self, place: str, stored: StoredNames) -> Any:
        self.places.append(f"load {place}")
        assert stored.grid(f"{place}.count") == ()
        (count,) = stored.objects([ObjectPosition(f"{place}.count", (), ())])
        self.seen = [stored.tensor(f"{place}.moments.{n}") for n in range(count + 1)]
        for key in self.unwanted:
            stored.settle(f"{place}.moments.{key}")
        made = {str(n): torch.empty(2) for n in range(count) if str(n) not in self.unwanted}
        return {"count": SharedObject(f"{place}.count", None, (), ()), "moments": made}

    def load_state_dict(self, state_dict: Any) -> None:
        assert state_dict["count"] >= len(state_dict["moments"])
        self.moments = list(state_dict["moments"].values())


def test_a_leaf_learns_its_place_and_what_is_stored(tmp_path: Path) -> None:
    saved, loaded = Moments(3), Moments()
    gs.save({"a": {"b": saved}}, tmp_path / "c")
    gs.load({"a": {"b": loaded}}, tmp_path / "c")
    assert saved.places == ["save a.b"]
    assert loaded.places == ["load a.b"], "before the checkpoint is open it is not asked"
    assert loaded.seen == [((2,), torch.float32)] * 3 + [None]
    assert [float(moment[0]) for moment in loaded.moments] == [0, 1, 2]


def test_what_it_is_told_has_the_requested_names(tmp_path: Path) -> None:
    gs.save({"old": Moments(2)}, tmp_path / "c")
    loaded = Moments()
    options = gs.LoadOptions(rename=lambda key: key.replace("new", "old"))
    gs.load({"new": loaded}, tmp_path / "c", options=options)
    assert [float(moment[0]) for moment in loaded.moments] == [0, 1]


def test_what_it_settles_is_not_missing(tmp_path: Path) -> None:
    gs.save({"a": Moments(3)}, tmp_path / "c")
    loaded = Moments()
    loaded.unwanted = ("1",)
    assert gs.load({"a": loaded}, tmp_path / "c").report.missing == ()
    assert [float(moment[0]) for moment in loaded.moments] == [0, 2]


def test_a_load_that_is_refused_leaves_it_as_it_was(tmp_path: Path) -> None:
    gs.save({"a": Moments(3)}, tmp_path / "c")
    loaded = Moments()
    with pytest.raises(KeyMismatchError):
        gs.load({"a": loaded, "other": torch.ones(3)}, tmp_path / "c")
    assert loaded.moments == []


@pytest.mark.parametrize("holders", [(1,), (0, 2), (0, 1, 2)])
def test_a_shared_object_is_stored_by_any_of_its_holders(holders: tuple[int, ...], tmp_path: Path) -> None:
    def save(group: Any) -> None:
        state = {"x": SharedObject("x", {"n": 7}, (), ())} if group.rank in holders else {}
        gs.save(state, tmp_path / "c", process_group=group)

    run_ranks(3, save)
    assert gs.open_checkpoint(tmp_path / "c").objects() == {"x/shard__": {"n": 7}}
    assert gs.load({"x": gs.ShardedObject("x", None, (), ())}, tmp_path / "c")["x"] == {"n": 7}


def test_a_shared_object_that_differs_is_an_error_under_every_policy(tmp_path: Path) -> None:
    def save(group: Any) -> None:
        options = gs.SaveOptions(on_object_difference="warn")
        gs.save({"x": SharedObject("x", group.rank, (), ())}, tmp_path / "c", process_group=group, options=options)

    with pytest.raises(RanksFailedError) as caught:
        run_ranks(2, save)
    assert all(isinstance(error, DisagreementError) for error in caught.value.errors)
    assert "'x/shard__'" in str(caught.value.errors[1])


def test_a_grid_of_shared_objects_must_be_complete(tmp_path: Path) -> None:
    with pytest.raises(CoverageError, match="no rank saves position"):
        gs.save({"x": SharedObject("x", 1, (2,), (0,))}, tmp_path / "c")


def test_common_state_that_differs_still_is_a_matter_of_policy(tmp_path: Path) -> None:
    def save(group: Any) -> None:
        gs.save({"x": SharedObject("x", 1, (), ()), "rank": group.rank}, tmp_path / "c", process_group=group)

    run_ranks(2, save)
    assert gs.load({}, tmp_path / "c", strict=gs.StrictHandling.IGNORE_ALL) == {"rank": 0}
