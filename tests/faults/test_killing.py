"""Processes that are killed while they save lose no checkpoint: real ones, at random moments."""

from __future__ import annotations

from pathlib import Path

import pytest
from killing import MODES, LostError, Mode, Result, Told, _check_path, _check_steps, run_rounds

import giantstep as gs
from giantstep.steps import step_name

ROUNDS = {"overwrite": 4, "overwrite-async": 3, "overwrite-in-flight": 3, "steps": 3, "steps-in-flight": 4}
ROUNDS |= {"processes-overwrite": 2, "processes-steps-in-flight": 1}
ELEMENTS = 1 << 18


def check(result: Result, rounds: int) -> None:
    assert result.problems == []
    assert (result.rounds, result.lost_checkpoints, result.hung) == (rounds, 0, 0)
    assert result.saves_begun >= rounds
    assert sum(result.kinds.values()) == rounds


def test_all_modes_are_tried() -> None:
    assert ROUNDS.keys() == MODES.keys()
    assert sum(ROUNDS.values()) == 20


@pytest.mark.parametrize("mode", MODES)
def test_processes_killed_while_they_save_lose_no_checkpoint_and_the_next_save_works(mode: str, tmp_path: Path) -> None:
    check(run_rounds(mode, ROUNDS[mode], 7, ELEMENTS, str(tmp_path)), ROUNDS[mode])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_hundreds_of_processes_killed_while_they_save_lose_no_checkpoint(mode: str, seed: int, tmp_path: Path) -> None:
    rounds = 10 if MODES[mode].processes else 30
    check(run_rounds(mode, rounds, seed, ELEMENTS, str(tmp_path)), rounds)


# What counts as lost.


def saved(place: Path, number: int, other: int | None = None) -> None:
    import torch
    from killing import values_of

    values = values_of(number if other is None else other, 100)
    gs.save({"w": torch.from_numpy(values), "number": number}, place)


def test_a_lost_an_older_a_newer_and_a_mixed_checkpoint_are_noticed(tmp_path: Path) -> None:
    mode, place = Mode(steps=False, in_flight=0), tmp_path / "checkpoint"
    told = Told(begun=4, done=3)
    with pytest.raises(gs.errors.OpenError):
        _check_path(tmp_path, mode, told, 0, 100)
    assert _check_path(tmp_path, mode, Told(begun=1), 0, 100) == "none yet"
    for number, kind in ((3, "old"), (4, "new")):
        saved(place, number)
        assert _check_path(tmp_path, mode, told, 0, 100) == kind
    for number in (2, 5):
        saved(place, number)
        with pytest.raises(LostError, match=f"save {number} is there; 3 was done, 4 begun"):
            _check_path(tmp_path, mode, told, 0, 100)
    saved(place, 3, other=4)
    with pytest.raises(LostError, match="is not what save 3 stored"):
        _check_path(tmp_path, mode, told, 0, 100)


def test_a_lost_and_a_damaged_step_are_noticed(tmp_path: Path) -> None:
    mode = Mode(steps=True, in_flight=0)
    told = Told(begun=4, done=3, all_done={1, 2, 3}, removing={1})
    saved(tmp_path / step_name(2), 2)
    with pytest.raises(LostError, match=r"steps \[3\] are gone"):
        _check_steps(tmp_path, mode, told, 0, 100)
    saved(tmp_path / step_name(3), 3)
    assert _check_steps(tmp_path, mode, told, 0, 100) == "old"
    saved(tmp_path / step_name(4), 4)
    assert _check_steps(tmp_path, mode, told, 0, 100) == "new"
    record = tmp_path / step_name(4) / "checkpoint.json"
    record.write_bytes(record.read_bytes()[:-20])
    with pytest.raises(LostError, match="damaged"):
        _check_steps(tmp_path, mode, told, 0, 100)
