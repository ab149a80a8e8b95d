"""Plans of loads, and indices, that are used again: what they save, what ends them, and that bytes stay right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from counting_store import CountingStore, counting_store
from giantstep.group.base import Answer, Parts
from giantstep.group.threads import ThreadGroup
from giantstep.testing.ranks import run_ranks

RANKS = 4
State = dict[str, Any]
SMALL = gs.SaveOptions(block_bytes=4096, buffer_bytes=4096)


class Noted:
    """A group that notes the phase and the size of every report that this rank sends."""

    def __init__(self, group: ThreadGroup) -> None:
        self._group = group
        self.rank, self.size = group.rank, group.size
        self.transfer, self.withdraw = group.transfer, group.withdraw
        self.reports: list[tuple[str, int]] = []

    def exchange(self, report: Parts, answer: Answer, phase: str, timeout_secs: float) -> Parts:
        self.reports.append((phase, sum(map(len, report))))
        return self._group.exchange(report, answer, phase, timeout_secs)


def state_of(rank: int, ranks: int, step: float, axis: int = 0) -> State:
    full = torch.arange(64.0 * 64).reshape(64, 64) + step
    part = full.chunk(ranks, dim=axis)[rank].clone()
    return {
        "w": gs.ShardedTensor.from_rank_offsets("w", part, (axis, rank, ranks)),
        "copy": torch.full((5000,), step),
        "rng": gs.ShardedObject("rng", [rank, step], (ranks,), (rank,)),
        "step": step,
    }


def empty(state: State) -> State:
    state["w"].data.zero_()
    state["copy"].zero_()
    return state


def save(folder: Any, step: float, axis: int = 0) -> None:
    run_ranks(RANKS, lambda group: gs.save(state_of(group.rank, RANKS, step, axis), folder, process_group=group, options=SMALL))


def load(group: ThreadGroup, store: Any, cache: gs.PlanCache | None, step: float, **more: Any) -> tuple[gs.LoadReport, Noted]:
    """Load step `step` by columns and check every value."""
    noted = Noted(group)
    options = gs.LoadOptions(plan_cache=cache, **{"exchange": range(group.size), **more})
    wanted = empty(state_of(group.rank, group.size, step, axis=1))
    found = gs.load(wanted, store, process_group=noted, options=options)
    expected = state_of(group.rank, group.size, step, axis=1)
    if not torch.equal(found["w"], expected["w"].data) or not torch.equal(found["copy"], expected["copy"]):
        raise AssertionError(f"rank {group.rank} has other values")
    if found["rng"] != [group.rank, step] or found["step"] != step:
        raise AssertionError(f"rank {group.rank} has other objects: {found['rng']}, {found['step']}")
    return found.report, noted


def caches() -> list[gs.PlanCache]:
    return [gs.PlanCache() for _ in range(RANKS)]


@pytest.mark.parametrize("exchange", ["group", "auto", "none"])
def test_a_second_load_of_the_same_checkpoint_plans_nothing_and_reads_no_index(exchange: str) -> None:
    with counting_store() as store:
        save(store, 1.0)
        kept = caches()
        more = {} if exchange == "group" else {"exchange": exchange}
        first = run_ranks(RANKS, lambda group: load(group, store, kept[group.rank], 1.0, **more))
        store.forget()
        second = run_ranks(RANKS, lambda group: load(group, store, kept[group.rank], 1.0, **more))
        assert [report.plan_reused for report, _ in first] == [False] * RANKS
        assert [report.plan_reused for report, _ in second] == [True] * RANKS
        assert not any(name.endswith("index.safetensors") for name in store.other_reads)
        for _, noted in second:
            sizes = [size for phase, size in noted.reports if phase == "plan"]
            # The status, the kind of report, and the number of the plan.
            assert sizes == [1 + 1 + 8]


def test_a_later_checkpoint_of_the_same_structure_is_loaded_by_the_plan_of_the_one_before(tmp_path: Path) -> None:
    for step in (1.0, 2.0):
        save(tmp_path / str(step), step)
    kept = caches()

    def run(group: ThreadGroup, step: float) -> bool:
        return load(group, tmp_path / str(step), kept[group.rank], step)[0].plan_reused

    assert [run_ranks(RANKS, lambda group, step=step: run(group, step)) for step in (1.0, 2.0, 1.0)] == [
        [False] * RANKS,
        [True] * RANKS,
        [True] * RANKS,
    ]


def test_an_overwritten_checkpoint_is_read_anew(tmp_path: Path) -> None:
    kept = caches()
    for step in (1.0, 2.0):
        save(tmp_path / "c", step)
        run_ranks(RANKS, lambda group, step=step: load(group, tmp_path / "c", kept[group.rank], step))


def test_a_checkpoint_of_another_layout_is_planned_anew(tmp_path: Path) -> None:
    save(tmp_path / "rows", 1.0)
    save(tmp_path / "columns", 2.0, axis=1)
    kept = caches()

    def run(group: ThreadGroup, name: str, step: float) -> bool:
        return load(group, tmp_path / name, kept[group.rank], step)[0].plan_reused

    assert run_ranks(RANKS, lambda group: run(group, "rows", 1.0)) == [False] * RANKS
    assert run_ranks(RANKS, lambda group: run(group, "columns", 2.0)) == [False] * RANKS
    assert run_ranks(RANKS, lambda group: run(group, "rows", 1.0)) == [True] * RANKS


@pytest.mark.parametrize("rank", [0, 2])
def test_a_request_that_changes_on_one_rank_is_noticed_by_all(tmp_path: Path, rank: int) -> None:
    save(tmp_path / "c", 1.0)
    kept = caches()

    def run(group: ThreadGroup, change: bool) -> bool:
        wanted = empty(state_of(group.rank, group.size, 1.0, axis=1))
        if change and group.rank == rank:
            del wanted["copy"]
        options = gs.LoadOptions(plan_cache=kept[group.rank], exchange=range(group.size))
        found = gs.load(wanted, tmp_path / "c", process_group=group, options=options)
        expected = state_of(group.rank, group.size, 1.0, axis=1)
        if not torch.equal(found["w"], expected["w"].data) or (
            "copy" in found and not torch.equal(found["copy"], expected["copy"])
        ):
            raise AssertionError("other values")
        return found.report.plan_reused

    turns = [
        run_ranks(RANKS, lambda group, change=change: run(group, change)) for change in (False, False, True, True, False, False)
    ]
    assert turns == [[reused] * RANKS for reused in (False, True, False, True, False, True)]


def test_a_rank_that_lost_its_cache_makes_all_plan_anew(tmp_path: Path) -> None:
    save(tmp_path / "c", 1.0)
    kept = caches()
    run: Callable[[ThreadGroup], Any] = lambda group: load(group, tmp_path / "c", kept[group.rank], 1.0)  # noqa: E731
    run_ranks(RANKS, run)
    kept[3].clear()
    assert [report.plan_reused for report, _ in run_ranks(RANKS, run)] == [False] * RANKS
    assert [report.plan_reused for report, _ in run_ranks(RANKS, run)] == [True] * RANKS


@pytest.mark.parametrize("rank", [0, 3])
def test_one_rank_reads_the_index_when_one_lost_its_cache(rank: int) -> None:
    with counting_store() as store:
        save(store, 1.0)
        kept = caches()
        run_ranks(RANKS, lambda group: load(group, store, None, 1.0))
        alone = reads_of_index(store)
        run_ranks(RANKS, lambda group: load(group, store, kept[group.rank], 1.0))
        kept[rank].clear()
        store.forget()
        run_ranks(RANKS, lambda group: load(group, store, kept[group.rank], 1.0))
        assert 0 < reads_of_index(store) <= alone


def reads_of_index(store: CountingStore) -> int:
    return sum(count for name, count in store.other_reads.items() if name.endswith("index.safetensors"))


def test_other_groups_to_exchange_in_are_planned_anew(tmp_path: Path) -> None:
    save(tmp_path / "c", 1.0)
    kept = caches()

    def run(*groups: list[int]) -> set[bool]:
        mine = {rank: members for members in groups for rank in members}
        return set(
            run_ranks(
                RANKS,
                lambda group: load(group, tmp_path / "c", kept[group.rank], 1.0, exchange=mine[group.rank])[0].plan_reused,
            )
        )

    turns = [run([0, 1], [2, 3]), run([0, 2], [1, 3]), run([0, 1], [2, 3]), run([0, 1, 2, 3])]
    assert turns == [{False}, {False}, {True}, {False}]


def test_another_number_of_ranks_or_other_options_are_planned_anew(tmp_path: Path) -> None:
    save(tmp_path / "c", 1.0)
    kept = caches()

    def run(ranks: int, **more: Any) -> set[bool]:
        def one(group: ThreadGroup) -> bool:
            wanted = {"w": empty(state_of(group.rank, ranks, 1.0))["w"]}
            options = gs.LoadOptions(plan_cache=kept[group.rank], **more)
            found = gs.load(wanted, tmp_path / "c", strict=gs.StrictHandling.IGNORE_ALL, process_group=group, options=options)
            if not torch.equal(found["w"], state_of(group.rank, ranks, 1.0)["w"].data):
                raise AssertionError("other values")
            return found.report.plan_reused

        return set(run_ranks(ranks, one))

    assert [run(4), run(2), run(4), run(4, verify="never"), run(2)] == [{False}, {False}, {True}, {False}, {True}]


def test_damage_is_found_by_a_load_that_reuses_everything(tmp_path: Path) -> None:
    save(tmp_path / "c", 1.0)
    kept = caches()
    run_ranks(RANKS, lambda group: load(group, tmp_path / "c", kept[group.rank], 1.0))
    for file in (tmp_path / "c" / "data").iterdir():
        data = bytearray(file.read_bytes())
        data[4096 + 100] ^= 1
        file.write_bytes(data)

    def run(group: ThreadGroup) -> str:
        with pytest.raises(gs.errors.CorruptionError) as caught:
            load(group, tmp_path / "c", kept[group.rank], 1.0)
        return str(caught.value)

    assert len(set(run_ranks(RANKS, run))) == 1


def test_common_state_that_the_caller_changes_does_not_reach_the_next_load(tmp_path: Path) -> None:
    gs.save({"w": torch.ones(3), "config": {"list": [1, 2]}}, tmp_path / "c")
    options = gs.LoadOptions(plan_cache=gs.PlanCache())
    for _ in range(3):
        state = gs.load({"w": torch.zeros(3)}, tmp_path / "c", options=options)
        assert state["config"] == {"list": [1, 2]}
        state["config"]["list"].append(3)


def test_without_a_cache_nothing_is_kept(tmp_path: Path) -> None:
    with counting_store() as store:
        save(store, 1.0)
        for _ in range(2):
            store.forget()
            reports = run_ranks(RANKS, lambda group: load(group, store, None, 1.0))
            assert not any(report.plan_reused for report, _ in reports)
            assert any(name.endswith("index.safetensors") for name in store.other_reads)
