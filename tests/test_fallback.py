"""A step that is damaged is passed over by all ranks alike, if they say so; nothing of it is left in the state."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import BadArgumentError, CorruptionError, DisagreementError, IncompleteError, KeyMismatchError
from giantstep.group.threads import ThreadGroup
from giantstep.steps import step_name
from giantstep.storage.memory import MemoryStore
from giantstep.testing.ranks import RanksFailedError, run_ranks

RANKS = 3


def state_of(rank: int, ranks: int, value: float, extra: bool) -> dict[str, Any]:
    state: dict[str, Any] = {
        "w": gs.ShardedTensor.from_rank_offsets("w", torch.full((60 // ranks, 40), value), (0, rank, ranks)),
        "value": value,
    }
    if extra:
        state["new"] = torch.full((30_000,), value)
    return state


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1 to 4 of two ranks; "new" is in 3 and 4 alone."""

    def save(group: ThreadGroup) -> None:
        for step in (1, 2, 3, 4):
            state = state_of(group.rank, group.size, float(step), extra=step > 2)
            gs.save(state, tmp_path / step_name(step), process_group=group)

    run_ranks(2, save)
    return tmp_path


def load(root: Path, step: int, *, extra: bool = False, ranks: int = RANKS, **settings: Any) -> list[Any]:
    def rank(group: ThreadGroup) -> Any:
        settings.setdefault("on_corrupt", "fallback")
        settings.setdefault("strict", gs.StrictHandling.RAISE_UNEXPECTED)
        state = state_of(group.rank, group.size, -1.0, extra)
        found = gs.load(state, root / step_name(step), process_group=group, **settings)
        values = {*found["w"].flatten().tolist(), found["value"]}
        new = sorted(set(found["new"].tolist())) if extra else []
        return values, new, found.report.passed_over

    return run_ranks(ranks, rank)


def flip(step: Path) -> None:
    for data in (step / "data").iterdir():
        content = bytearray(data.read_bytes())
        content[-1000] ^= 1
        data.write_bytes(content)


def lose_data(step: Path) -> None:
    next((step / "data").iterdir()).unlink()


def lose_record(step: Path) -> None:
    (step / "checkpoint.json").unlink()


def damage_record(step: Path) -> None:
    record = step / "checkpoint.json"
    record.write_bytes(record.read_bytes()[:-200])


def damage_index(step: Path) -> None:
    (index,) = step.glob("*.index.safetensors")
    content = bytearray(index.read_bytes())
    content[100] ^= 1
    index.write_bytes(content)


def lose_all(step: Path) -> None:
    for path in sorted(step.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
    step.rmdir()


HARMS = [flip, lose_data, lose_record, damage_record, damage_index, lose_all]


@pytest.mark.parametrize("harm", HARMS)
def test_all_ranks_load_the_newest_older_step_and_the_report_says_what_was_passed_over(
    root: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    harm(root / step_name(4))
    with caplog.at_level(logging.WARNING, "giantstep"):
        for values, _, passed in load(root, 4):
            assert values == {3.0}
            (reason,) = passed
            assert reason.startswith(f"{step_name(4)}: ")
    assert "is loaded instead of" in caplog.text
    flip(root / step_name(3))
    for values, _, passed in load(root, 4):
        assert values == {2.0}
        assert [reason[:13] for reason in passed] == [step_name(4), step_name(3)]


def test_a_step_that_loads_is_loaded_and_newer_ones_are_no_alternative(root: Path) -> None:
    flip(root / step_name(2))
    assert [(values, passed) for values, _, passed in load(root, 3)] == [({3.0}, ())] * RANKS
    assert {tuple(values) for values, _, _ in load(root, 2)} == {(1.0,)}


@pytest.mark.parametrize("strict", [gs.StrictHandling.LOG_ALL, gs.StrictHandling.IGNORE_ALL, gs.StrictHandling.RETURN_ALL])
def test_nothing_of_a_damaged_step_is_left_in_what_an_older_one_does_not_have(root: Path, strict: gs.StrictHandling) -> None:
    """ "new" is undamaged in step 4, and not in step 2: it must stay as it was."""
    for step in (4, 3):
        flip(root / step_name(step))
    for values, new, _ in load(root, 4, extra=True, strict=strict):
        assert values == {2.0}
        assert new == [-1.0]


def test_where_none_loads_all_ranks_raise_what_is_wrong_with_the_one_asked_for(root: Path) -> None:
    for step in (1, 2, 3):
        lose_data(root / step_name(step))
    flip(root / step_name(4))
    with pytest.raises(RanksFailedError) as caught:
        load(root, 4)
    assert [type(error) for error in caught.value.errors] == [CorruptionError] * RANKS
    assert len({str(error) for error in caught.value.errors}) == 1
    assert all(step_name(1) in "".join(error.__notes__) for error in caught.value.errors if error)


def test_by_default_a_damaged_step_raises_and_what_does_not_fit_is_never_passed_over(root: Path) -> None:
    lose_data(root / step_name(4))
    with pytest.raises(RanksFailedError) as caught:
        load(root, 4, on_corrupt="raise")
    assert all(isinstance(error, IncompleteError) for error in caught.value.errors)
    with pytest.raises(RanksFailedError) as caught:
        load(root, 2, extra=True)
    assert all(isinstance(error, KeyMismatchError) for error in caught.value.errors)


def test_paths_that_are_no_steps_and_other_policies_are_refused(root: Path) -> None:
    with pytest.raises(BadArgumentError, match="needs the path of a step"):
        gs.load({}, root, on_corrupt="fallback")
    with pytest.raises(BadArgumentError, match="on_corrupt='retry'"):
        gs.load({}, root / step_name(4), on_corrupt="retry")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "on_corrupt", "error"),
    [
        (step_name(4), "raise", DisagreementError),
        (step_name(4), "retry", BadArgumentError),
        (".", "fallback", BadArgumentError),
        ("", "fallback", BadArgumentError),
    ],
)
@pytest.mark.parametrize("odd", range(RANKS))
def test_one_rank_that_asks_for_something_else_is_the_same_error_on_all(
    root: Path, odd: int, path: str, on_corrupt: Any, error: type[Exception]
) -> None:
    def rank(group: ThreadGroup) -> None:
        mine = group.rank == odd
        place, policy = (str(root / path) if path else "", on_corrupt) if mine else (str(root / step_name(4)), "fallback")
        gs.load(state_of(group.rank, group.size, -1.0, False), place, process_group=group, on_corrupt=policy)

    flip(root / step_name(4))
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(RANKS, rank)
    assert [type(found) for found in caught.value.errors] == [error] * RANKS
    assert len({str(found) for found in caught.value.errors}) == 1


def test_steps_in_memory_fall_back_too() -> None:
    store = MemoryStore("fallback")
    for step in (1, 2):
        gs.save({"w": torch.full((4,), float(step))}, store.folder(step_name(step)))
    (name,) = store.folder(step_name(2)).names("data")
    store.folder(step_name(2)).delete(name)
    found = gs.load({"w": torch.zeros(4)}, f"memory://fallback/{step_name(2)}", on_corrupt="fallback")
    assert found["w"].tolist() == [1.0] * 4
