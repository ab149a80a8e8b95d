"""Objects that refuse what is stored are asked before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import KeyMismatchError, MismatchError
from giantstep.mapping.checked_object import CheckedObject
from giantstep.storage.memory import MemoryStore
from giantstep.testing import RanksFailedError, run_ranks


def stored() -> MemoryStore:
    store = MemoryStore("conditions")

    def save(group: Any) -> None:
        made = gs.ShardedObject("made", {"rank": group.rank}, (2,), (group.rank,))
        gs.save({"made": made, "w": torch.ones(3)}, store, process_group=group)

    run_ranks(2, save)
    return store


def request(rank: int, ranks: int, seen: list[Any], refuses: Any = lambda value: False) -> dict[str, Any]:
    def check(value: Any, what: str) -> None:
        seen.append((value, what))
        if refuses(value):
            raise MismatchError(f"{what} is refused")

    return {"made": CheckedObject("made", None, (ranks,), (rank,), 0, check), "w": torch.zeros(3)}


def test_a_check_sees_the_value_of_its_position_and_lets_it_be_loaded() -> None:
    store, seen = stored(), [[], []]
    loaded = run_ranks(2, lambda group: gs.load(request(group.rank, 2, seen[group.rank]), store, process_group=group))
    assert seen == [[({"rank": rank}, f"object 'made/shard_{rank}_2' in {store.location}")] for rank in range(2)]
    assert [state["made"] for state in loaded] == [{"rank": 0}, {"rank": 1}]
    assert all(state["w"].sum() == 3 for state in loaded)


def test_a_refusal_on_one_rank_is_raised_on_all_before_a_tensor_is_touched() -> None:
    store, states = stored(), [request(rank, 2, [], lambda value: value["rank"] == 1) for rank in range(2)]
    with pytest.raises(RanksFailedError) as raised:
        run_ranks(2, lambda group: gs.load(states[group.rank], store, process_group=group))
    assert {str(error) for error in raised.value.errors} == {
        f"[rank 1, phase match] object 'made/shard_1_2' in {store.location} is refused"
    }
    assert all(isinstance(error, MismatchError) for error in raised.value.errors)
    assert not any(state["w"].any() for state in states)


def test_of_a_grid_of_another_shape_a_check_sees_some_position_before_the_shape_is_an_error() -> None:
    seen: list[Any] = []
    with pytest.raises(MismatchError, match="is refused"):
        gs.load(request(0, 1, seen, lambda value: True), stored())
    assert seen[0][0] == {"rank": 0}


def test_what_is_not_stored_or_left_out_is_not_checked() -> None:
    seen: list[Any] = []
    store = stored()
    absent = {**request(0, 2, seen), "other": CheckedObject("other", None, (), (), 0, lambda *_: pytest.fail("checked"))}
    with pytest.raises(KeyMismatchError, match="other"):
        gs.load(absent, store)
    left_out = gs.LoadOptions(rename={"made": None})
    seen.clear()
    gs.load(request(0, 2, seen, lambda value: True), store, strict=gs.StrictHandling.IGNORE_ALL, options=left_out)
    assert not seen


def test_a_renamed_object_is_checked_under_its_stored_name() -> None:
    seen: list[Any] = []
    wanted = request(1, 2, seen)
    wanted["made"].key = "new"
    gs.load(wanted, stored(), options=gs.LoadOptions(rename={"new": "made"}))
    assert seen[0][0] == {"rank": 1}
