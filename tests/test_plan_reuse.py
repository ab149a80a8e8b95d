"""Plans of saves that are used again: what they cost, what ends them, and what is kept on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.group.base import Answer, Parts
from giantstep.group.threads import ThreadGroup
from giantstep.testing.ranks import run_ranks
from giantstep.writers import Balanced, LowestRank

RANKS = 4
State = dict[str, Any]


class Counted:
    """A group that notes every report that this rank sends."""

    def __init__(self, group: ThreadGroup) -> None:
        self._group = group
        self.rank, self.size = group.rank, group.size
        self.transfer, self.withdraw = group.transfer, group.withdraw
        self.reports: list[tuple[str, Parts]] = []

    def exchange(self, report: Parts, answer: Answer, phase: str, timeout_secs: float) -> Parts:
        self.reports.append((phase, report))
        return self._group.exchange(report, answer, phase, timeout_secs)


def state_of(rank: int, step: int) -> State:
    return {
        "w": gs.ShardedTensor.from_rank_offsets("w", torch.full((3, 4), float(rank + step)), (0, rank, RANKS)),
        "bias": torch.full((8,), float(step)),
        "rng": gs.ShardedObject("rng", {"seed": rank * 100 + step}, (RANKS,), (rank,)),
        "step": step,
    }


def save_twice(
    folder: Path, change: Callable[[State, int], State] = lambda state, rank: state, **second: Any
) -> list[tuple[gs.SaveReport, list[tuple[str, Parts]]]]:
    """Save step 1, then step 2 after `change`, with one cache per rank; the second save's reports and messages."""
    caches = [gs.PlanCache() for _ in range(RANKS)]

    def run(group: ThreadGroup) -> tuple[gs.SaveReport, list[tuple[str, Parts]]]:
        options = gs.SaveOptions(plan_cache=caches[group.rank])
        first = gs.save(state_of(group.rank, 1), folder / "1", process_group=group, options=options)
        assert not first.plan_reused
        counted = Counted(group)
        options = gs.SaveOptions(plan_cache=caches[group.rank], **second)
        report = gs.save(change(state_of(group.rank, 2), group.rank), folder / "2", process_group=counted, options=options)
        return report, counted.reports

    return run_ranks(RANKS, run)


def test_a_second_save_of_the_same_structure_costs_one_agreement_of_sixteen_bytes(tmp_path: Path) -> None:
    heads = set()
    for report, messages in save_twice(tmp_path):
        assert report.plan_reused
        phases = [phase for phase, _ in messages]
        assert phases == ["describe", "write"]
        status, call, kind, token = messages[0][1]
        assert (len(status), len(kind), len(token)) == (1, 1, 16)
        heads.add(call)
    # What says which call this is has the same bytes on all ranks: it travels once.
    assert len(heads) == 1
    found = gs.open_checkpoint(tmp_path / "2")
    assert found["w"][:].tolist() == [[rank + 2.0] * 4 for rank in range(RANKS) for _ in range(3)]
    assert found["bias"][:].tolist() == [2.0] * 8
    assert found.common == {"step": 2}
    assert [found.object(f"rng/shard_{rank}_{RANKS}")["seed"] for rank in range(RANKS)] == [2, 102, 202, 302]
    assert found.verify().ok


def _rename(state: State) -> State:
    return {("v" if key == "bias" else key): value for key, value in state.items()}


# On one rank alone or on all: what a new plan must be made for, and then stores.
CHANGES_OF_ONE: dict[str, Callable[[State], State]] = {
    "another key more": lambda state: {**state, "more": torch.ones(3)},
    "a replica less": lambda state: {key: value for key, value in state.items() if key != "bias"},
    "an object more": lambda state: {**state, "extra": gs.ShardedObject("extra", 1, (1,), (0,))},
}
CHANGES_OF_ALL: dict[str, Callable[[State], State]] = {
    "another key": _rename,
    "another shape": lambda state: {**state, "bias": torch.ones(9)},
    "another dtype": lambda state: {**state, "bias": state["bias"].to(torch.float64)},
    "another layout": lambda state: {
        **state,
        "bias": gs.ShardedTensor.from_rank_offsets("bias", torch.ones(2), (0, int(state["w"].global_offset[0]) // 3, RANKS)),
    },
}


@pytest.mark.parametrize("name", CHANGES_OF_ONE)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_change_on_one_rank_is_noticed_by_all_and_planned_anew(tmp_path: Path, name: str, rank: int) -> None:
    change = CHANGES_OF_ONE[name]
    for report, messages in save_twice(tmp_path, lambda state, mine: change(state) if mine == rank else state):
        assert not report.plan_reused
        assert [phase for phase, _ in messages] == ["describe", "describe", "write"]
    found = gs.open_checkpoint(tmp_path / "2")
    assert found.verify().ok
    assert found["w"][:].tolist() == [[other + 2.0] * 4 for other in range(RANKS) for _ in range(3)]
    if name == "another key more":
        assert found["more"][:].tolist() == [1.0] * 3


@pytest.mark.parametrize("name", CHANGES_OF_ALL)
def test_a_change_on_all_ranks_is_planned_anew_at_once(tmp_path: Path, name: str) -> None:
    change = CHANGES_OF_ALL[name]
    for report, messages in save_twice(tmp_path, lambda state, _rank: change(state)):
        assert not report.plan_reused
        assert [phase for phase, _ in messages] == ["describe", "write"]
    assert gs.open_checkpoint(tmp_path / "2").verify().ok


@pytest.mark.parametrize("rank", [0, 3])
def test_a_shape_that_one_rank_alone_changes_is_the_error_that_it_would_be_without_a_cache(tmp_path: Path, rank: int) -> None:
    def change(state: State, mine: int) -> State:
        return {**state, "bias": torch.ones(9)} if mine == rank else state

    with pytest.raises(AssertionError, match="tensor 'bias' is F32") as caught:
        save_twice(tmp_path, change)
    errors = caught.value.errors  # type: ignore[attr-defined]
    assert {str(error) for error in errors} == {str(errors[0])}
    assert all(isinstance(error, gs.errors.DisagreementError) for error in errors)
    with pytest.raises(gs.errors.OpenError):
        gs.open_checkpoint(tmp_path / "2")


def test_a_main_replica_that_moves_to_another_rank_ends_the_plan(tmp_path: Path) -> None:
    def run(group: ThreadGroup) -> list[bool]:
        options = gs.SaveOptions(plan_cache=gs.PlanCache())
        reused = []
        for main in (0, 0, 1):
            state = {"w": gs.ShardedTensor.from_rank_offsets("w", torch.ones(4), replica_id=int(group.rank != main))}
            reused.append(gs.save(state, tmp_path / "c", process_group=group, options=options).plan_reused)
        return reused

    assert run_ranks(2, run) == [[False, True, False]] * 2


@pytest.mark.parametrize("second", [{"writers": LowestRank()}, {"split_bytes": 1}, {"max_file_bytes": 1 << 30}])
def test_options_that_decide_who_writes_what_end_the_plan(tmp_path: Path, second: dict[str, Any]) -> None:
    assert not any(report.plan_reused for report, _ in save_twice(tmp_path, **second))
    assert all(report.plan_reused for report, _ in save_twice(tmp_path))


def test_another_number_of_ranks_is_planned_anew(tmp_path: Path) -> None:
    caches = [gs.PlanCache() for _ in range(3)]

    def run(group: ThreadGroup) -> bool:
        options = gs.SaveOptions(plan_cache=caches[group.rank])
        return gs.save({"w": torch.arange(100.0)}, tmp_path / "c", process_group=group, options=options).plan_reused

    assert [run_ranks(size, run) for size in (3, 3, 2, 2, 3)] == [[False] * 3, [True] * 3, [False] * 2, [True] * 2, [True] * 3]
    assert gs.open_checkpoint(tmp_path / "c")["w"][:].tolist() == list(range(100))


def test_common_state_that_becomes_different_on_one_rank_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def change(state: State, rank: int) -> State:
        return {**state, "step": 7 if rank == 2 else 2}

    with caplog.at_level(logging.WARNING, logger="giantstep"):
        assert not any(report.plan_reused for report, _ in save_twice(tmp_path, change))
    assert "common state differs from rank 0's at 'step' (rank 2)" in caplog.text
    assert gs.open_checkpoint(tmp_path / "2").common == {"step": 2}
    with pytest.raises(AssertionError, match="common state differs"):
        save_twice(tmp_path / "raise", change, on_object_difference="raise")


def test_values_that_two_objects_swap_on_one_rank_are_noticed(tmp_path: Path) -> None:
    """Sums over all objects of a rank must not hide that each of them differs."""

    def run(group: ThreadGroup) -> list[bool]:
        options = gs.SaveOptions(plan_cache=gs.PlanCache())
        reused = []
        for turn in range(3):
            values = (2, 1) if turn == 2 and group.rank == 1 else (1, 2)
            state = {
                name: gs.ShardedObject(name, value, (1,), (0,), replica_id=group.rank)
                for name, value in zip("ab", values, strict=True)
            }
            reused.append(gs.save(state, tmp_path / "c", process_group=group, options=options).plan_reused)
        return reused

    assert run_ranks(3, run) == [[False, True, False]] * 3


def test_objects_known_to_differ_are_warned_of_once_and_do_not_end_the_plan(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(group: ThreadGroup) -> list[bool]:
        options = gs.SaveOptions(plan_cache=gs.PlanCache())
        found = []
        for step in range(3):
            report = gs.save({"host": group.rank, "step": step}, tmp_path / "c", process_group=group, options=options)
            found.append(report.plan_reused)
        return found

    with caplog.at_level(logging.WARNING, logger="giantstep"):
        assert run_ranks(3, run) == [[False, True, True]] * 3
    assert caplog.text.count("common state differs") == 1
    assert gs.open_checkpoint(tmp_path / "c").common == {"host": 0, "step": 2}


def test_a_plan_kept_on_disk_serves_the_first_save_after_a_restart(tmp_path: Path) -> None:
    def run(group: ThreadGroup) -> bool:
        # A cache of its own each time: nothing is left in memory.
        options = gs.SaveOptions(plan_cache=gs.PlanCache(tmp_path / "plans"))
        step = 1 + len(list(tmp_path.glob("step*"))) if group.rank == 0 else 0
        step = int(group.exchange((str(step).encode(),), lambda reports: [reports[0]] * RANKS, "step", 10)[0])
        report = gs.save(state_of(group.rank, step), tmp_path / f"step{step}", process_group=group, options=options)
        return report.plan_reused

    assert [run_ranks(RANKS, run) for _ in range(3)] == [[False] * RANKS, [True] * RANKS, [True] * RANKS]
    for step in (1, 2, 3):
        found = gs.open_checkpoint(tmp_path / f"step{step}")
        assert found.verify().ok
        assert found["bias"][:].tolist() == [float(step)] * 8
    assert len(list((tmp_path / "plans").iterdir())) == RANKS


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other", "gone", "mixed"])
def test_a_kept_plan_that_is_damaged_lost_or_another_save_s_is_not_used(tmp_path: Path, victim: int, damage: str) -> None:
    def run(group: ThreadGroup, folder: str) -> bool:
        options = gs.SaveOptions(plan_cache=gs.PlanCache(tmp_path / folder))
        return gs.save(state_of(group.rank, 1), tmp_path / "c", process_group=group, options=options).plan_reused

    run_ranks(RANKS, lambda group: run(group, "plans"))
    file = tmp_path / "plans" / f"save-r{victim:05d}.plan.safetensors"
    kept = bytearray(file.read_bytes())
    if damage == "flip":
        kept[-20] ^= 1
    elif damage == "cut":
        del kept[-3:]
    elif damage == "empty":
        kept.clear()
    elif damage == "other":
        kept[:] = b"something else"
    elif damage == "mixed":
        # The plan of a save that was planned at another time: right in itself, but not the others'.
        run_ranks(RANKS, lambda group: run(group, "others"))
        kept[:] = (tmp_path / "others" / file.name).read_bytes()
    file.write_bytes(kept)
    if damage == "gone":
        file.unlink()
    assert run_ranks(RANKS, lambda group: run(group, "plans")) == [False] * RANKS
    assert gs.open_checkpoint(tmp_path / "c").verify().ok
    assert run_ranks(RANKS, lambda group: run(group, "plans")) == [True] * RANKS


def test_two_caches_share_nothing_and_one_forgets_what_was_used_least(tmp_path: Path) -> None:
    first, second = gs.PlanCache(max_plans=2), gs.PlanCache()
    states = [{"w": torch.zeros(size)} for size in (1, 2, 3)]

    def reused(cache: gs.PlanCache, state: State) -> bool:
        return gs.save(state, tmp_path / "c", options=gs.SaveOptions(plan_cache=cache)).plan_reused

    assert [reused(first, states[0]), reused(second, states[0]), reused(first, states[0])] == [False, False, True]
    assert [reused(first, state) for state in states] == [True, False, False]
    assert len(first) == 2
    assert not reused(first, states[0])
    first.clear()
    assert not reused(first, states[0])


def test_ranks_of_which_only_some_have_a_cache_make_different_calls(tmp_path: Path) -> None:
    def run(group: ThreadGroup) -> None:
        cache = gs.PlanCache() if group.rank else None
        with pytest.raises(gs.errors.DisagreementError, match="plan_cache"):
            gs.save({"w": torch.ones(1)}, tmp_path / "c", process_group=group, options=gs.SaveOptions(plan_cache=cache))

    run_ranks(2, run)


@pytest.mark.parametrize("arguments", [{"path": 3}, {"max_plans": 0}, {"max_plans": True}])
def test_a_cache_refuses_bad_settings(arguments: dict[str, Any]) -> None:
    with pytest.raises(gs.errors.BadArgumentError):
        gs.PlanCache(**arguments)
    with pytest.raises(gs.errors.BadArgumentError, match="plan_cache"):
        gs.SaveOptions(plan_cache={})  # type: ignore[arg-type]


def test_a_tie_that_ends_on_one_rank_is_noticed(tmp_path: Path) -> None:
    def run(group: ThreadGroup) -> list[bool]:
        options = gs.SaveOptions(plan_cache=gs.PlanCache())
        reused = []
        for turn in range(3):
            w = torch.full((4,), float(group.rank))
            other = w + 10 if turn == 2 and group.rank == 1 else w
            state = {
                key: gs.ShardedTensor.from_rank_offsets(key, value, (0, group.rank, 2))
                for key, value in (("a", w), ("b", other))
            }
            reused.append(gs.save(state, tmp_path / "c", process_group=group, options=options).plan_reused)
        return reused

    assert run_ranks(2, run) == [[False, True, False]] * 2
    assert gs.open_checkpoint(tmp_path / "c")["b"][:].tolist() == [0.0] * 4 + [11.0] * 4


def test_another_cell_of_the_same_policy_ends_the_plan(tmp_path: Path) -> None:
    def run(group: ThreadGroup) -> list[tuple[bool, int]]:
        cache = gs.PlanCache()
        found = []
        for over in ([0, 1], [group.rank]):
            options = gs.SaveOptions(plan_cache=cache, writers=Balanced(over=over))
            report = gs.save({"w": torch.ones(1 << 20)}, tmp_path / "c", process_group=group, options=options)
            found.append((report.plan_reused, report.bytes_written))
        return found

    assert [found[1] for found in run_ranks(2, run)] == [(False, 4 << 20), (False, 0)]


def test_a_plan_on_disk_of_another_structure_is_not_used(tmp_path: Path) -> None:
    def run(group: ThreadGroup, count: int) -> bool:
        options = gs.SaveOptions(plan_cache=gs.PlanCache(tmp_path / "plans"))
        return gs.save({"w": torch.full((count,), 3.0)}, tmp_path / "c", process_group=group, options=options).plan_reused

    turns = [run_ranks(2, lambda group, count=count: run(group, count)) for count in (50, 40, 40)]
    assert turns == [[False] * 2, [False] * 2, [True] * 2]
    assert gs.open_checkpoint(tmp_path / "c")["w"][:].tolist() == [3.0] * 40


def test_what_a_killed_process_left_of_a_plan_is_not_in_the_way(tmp_path: Path) -> None:
    left = tmp_path / "plans" / "save-r00000.plan.safetensors.0123456789abcdef.tmp"
    left.parent.mkdir()
    left.write_bytes(b"half a pl")
    (tmp_path / "plans" / "notes.txt").write_text("mine")

    def save() -> bool:
        options = gs.SaveOptions(plan_cache=gs.PlanCache(tmp_path / "plans"))
        return gs.save({"w": torch.ones(3)}, tmp_path / "c", options=options).plan_reused

    assert [save(), save()] == [False, True]
    assert sorted(file.name for file in (tmp_path / "plans").iterdir()) == ["notes.txt", "save-r00000.plan.safetensors"]


def test_many_thread_ranks_may_share_one_cache(tmp_path: Path) -> None:
    cache = gs.PlanCache(max_plans=1)

    def run(group: ThreadGroup) -> list[bool]:
        options = gs.SaveOptions(plan_cache=cache)
        return [
            gs.save({"w": torch.ones(9)}, tmp_path / "c", process_group=group, options=options).plan_reused for _ in range(2)
        ]

    assert run_ranks(20, run) == [[False, True]] * 20
