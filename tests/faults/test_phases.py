"""A rank that raises, sleeps or dies in any phase of a save or a load: all ranks are told the same in time, and go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from troubles import LOAD_PLACES, SAVE_PLACES, MineError, Trouble, die, raise_eio, raise_mine, sleeping

import giantstep as gs
from giantstep.errors import GiantstepError, PeerError, PeerFailureError, PhaseTimeoutError, StoreError, UnexpectedError
from giantstep.storage.memory import MemoryStore
from giantstep.testing.ranks import run_ranks_collecting
from processes import DIED, results, run_processes

RANKS = 3
CALLS = ["save", "async_save", "load"]
CASES = [(call, place) for call in CALLS for place in (LOAD_PLACES if call == "load" else SAVE_PLACES)]
# A rank sleeps longer than anybody waits for rank 0, which is twice this.
PATIENCE_SECS, SLEEP_SECS = 0.7, 3.0


def state_of(rank: int, value: float) -> dict[str, Any]:
    part = torch.full((50, 4), value)
    return {"w": gs.ShardedTensor.from_rank_offsets("w", part, (0, rank, RANKS)), "b": torch.full((9,), value), "value": value}


def call_once(call: str, group: Any, rank: int, path: Any, value: float, timeout_secs: float) -> None:
    if call == "load":
        options = gs.LoadOptions(timeout_secs=timeout_secs, verify="before")
        found = gs.load(state_of(rank, 0.0), path, process_group=group, options=options)
        assert (found["value"], found["w"].unique().tolist(), found["b"].unique().tolist()) == (value, [value], [value])
        return
    options = gs.SaveOptions(timeout_secs=timeout_secs)
    if call == "save":
        gs.save(state_of(rank, value), path, process_group=group, options=options)
    else:
        gs.async_save(state_of(rank, value), path, process_group=group, options=options).result(60)


@pytest.fixture
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    store = MemoryStore(f"phases-{request.node.name}")
    yield store.location
    store.clear()


def places_of(call: str) -> dict[str, Any]:
    return LOAD_PLACES if call == "load" else SAVE_PLACES


def all_meet(group: Any) -> None:
    group.exchange((b"",), lambda reports: [(b"",)] * len(reports), "ready", 30)


def with_trouble(call: str, trouble: Trouble, path: str, timeout_secs: float) -> tuple[list[Any], float]:
    """What each rank raised, and after how many seconds the last did. Afterwards all save and load again."""
    raised: list[BaseException | None] = [None] * RANKS
    seconds = [0.0] * RANKS

    def rank(group: Any) -> None:
        call_once("save", group, group.rank, path, 1.0, 30)
        all_meet(group)
        if group.rank == trouble.victim:
            trouble.arm()
        begin = time.monotonic()
        try:
            call_once(call, group, group.rank, path, 1.0 if call == "load" else 2.0, timeout_secs)
        except BaseException as error:  # noqa: BLE001 - is compared by the caller
            raised[group.rank] = error
        seconds[group.rank] = time.monotonic() - begin
        call_once("save", group, group.rank, path, 3.0, 30)
        call_once("load", group, group.rank, path, 3.0, 30)

    with trouble:
        errors = run_ranks_collecting(RANKS, rank)[1]
    assert errors == [None] * RANKS
    assert trouble.met
    return raised, max(seconds)


@pytest.mark.parametrize(("call", "place"), CASES)
@pytest.mark.parametrize(("trouble", "kind"), [(raise_mine, UnexpectedError), (raise_eio, StoreError)])
def test_what_a_rank_raises_all_ranks_raise_with_its_cause_first_and_its_traceback_and_go_on(
    call: str, place: str, trouble: Callable[[], None], kind: type[GiantstepError], path: str
) -> None:
    # Rank 1 if it is not rank 0's alone.
    where = Trouble(places_of(call)[place], 1, trouble)
    raised, seconds = with_trouble(call, where, path, 20)
    assert {type(error) for error in raised} == {kind}
    (message,) = {str(error) for error in raised}
    cause = "MineError: mine" if kind is UnexpectedError else "OSError: [Errno 5] the disk is gone"
    begin = f"[rank 1, phase {where.phase}] " if where.victim else f"[phase {where.phase}] "
    assert message.startswith(begin + cause)
    for rank, error in enumerate(raised):
        assert isinstance(error, GiantstepError)
        if rank == where.victim:
            causes = [error.__cause__, getattr(error.__cause__, "__cause__", None)]
            assert any(isinstance(found, MineError | OSError) for found in causes), causes
        else:
            # The whole traceback of the rank where it began, also in what Python prints.
            assert error.remote_traceback is not None
            assert trouble.__name__ in error.remote_traceback
            assert f"Raised on rank {where.victim}:" in "".join(getattr(error, "__notes__", []))
    assert seconds < 20


QUICK = {("save", "write"), ("save", "commit"), ("async_save", "plan"), ("load", "describe"), ("load", "read")}


@pytest.mark.parametrize(
    ("call", "place"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_a_rank_that_sleeps_too_long_is_named_by_all_others_in_time_and_all_go_on(call: str, place: str, path: str) -> None:
    where = Trouble(places_of(call)[place], 1, sleeping(SLEEP_SECS))
    raised, seconds = with_trouble(call, where, path, PATIENCE_SECS)
    others = [error for rank, error in enumerate(raised) if rank != where.victim]
    assert {type(error) for error in others} == {PhaseTimeoutError}
    assert len({str(error) for error in others}) == 1
    assert others[0].rank == where.victim
    # The sleeper hears of it when it wakes up.
    assert isinstance(raised[where.victim], PeerError)
    assert seconds < 4 * SLEEP_SECS


@pytest.mark.parametrize(("call", "place"), [case for case in CASES if not places_of(case[0])[case[1]][2]])
def test_a_rank_that_is_late_but_in_time_harms_nothing(call: str, place: str, path: str) -> None:
    where = Trouble(places_of(call)[place], 2, sleeping(0.2))
    raised, _ = with_trouble(call, where, path, 20)
    assert raised == [None] * RANKS


# Whole processes.


def _die_at(rank: int, path: str, call: str, place: str) -> tuple[str, bool, float]:
    """Save once; then the victim is killed. What the others raise, and after how many seconds."""
    call_once("save", None, rank, path, 1.0, 60)
    begin = time.monotonic()
    with Trouble(places_of(call)[place], 1, die) as trouble:
        if rank == trouble.victim:
            trouble.arm()
        try:
            call_once(call, None, rank, path, 1.0 if call == "load" else 2.0, 60)
        except GiantstepError as error:
            return type(error).__name__, error.rank == trouble.victim, time.monotonic() - begin
    return "nothing", False, 0.0


@pytest.mark.parametrize(("call", "place"), CASES)
def test_a_process_that_is_killed_is_named_by_all_others_long_before_the_timeout(call: str, place: str, tmp_path: Path) -> None:
    victim = 0 if places_of(call)[place][2] else 1
    found = run_processes(RANKS, _die_at, str(tmp_path), call, place)
    assert found.pop(victim)[0] == DIED
    for name, named, seconds in results(found):
        assert (name, named) == (PeerFailureError.__name__, True)
        assert seconds < 30
    # Nobody had begun to commit.
    assert gs.open_checkpoint(tmp_path).common["value"] == 1.0
    gs.save({"w": torch.ones(3), "value": 4.0}, tmp_path)
    assert gs.open_checkpoint(tmp_path).verify().ok
