"""Going back in the same job, from memory: to the newest step, or to one before a given one; what came after is left behind."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import IncompleteError
from giantstep.group.threads import ThreadGroup
from giantstep.testing.ranks import run_ranks

RANKS = 3


def state_of(rank: int, value: float) -> dict[str, Any]:
    return {
        "own": gs.ShardedTensor.from_rank_offsets("own", torch.full((2, 40), value + rank), (0, rank, RANKS)),
        "shared": torch.full((30,), value),
        "at": value,
        "clock": gs.LocalNonpersistentObject(rank),
    }


def tier_of(group: ThreadGroup, run: str, keep: int) -> gs.LocalTier:
    place = f"memory://{run}-{group.rank}"
    return gs.LocalTier(place, host=str(group.rank), replicas=0, keep=keep, process_group=group)


def values(found: Any, rank: int) -> tuple[int, float, float, float, int]:
    state = found.state
    assert state["own"].eq(state["own"][0, 0]).all()
    return found.step, state["own"][0, 0].item() - rank, state["shared"][0].item(), state["at"], state["clock"]


def test_the_newest_step_comes_back_and_what_is_not_persistent_stays() -> None:
    run = uuid.uuid4().hex

    def rank(group: ThreadGroup) -> None:
        with tier_of(group, run, keep=2) as tier:
            for step in (10, 20):
                tier.save(step, state_of(group.rank, float(step)))
            found = tier.rewind(state_of(group.rank, float("nan")))
            assert values(found, group.rank) == (20, 20.0, 20.0, 20.0, group.rank)

    run_ranks(RANKS, rank)


def test_what_was_saved_after_the_step_comes_after_all_that_is_saved_from_then_on() -> None:
    run = uuid.uuid4().hex

    def rank(group: ThreadGroup) -> None:
        with tier_of(group, run, keep=4) as tier:
            for step in (10, 20, 30):
                tier.save(step, state_of(group.rank, float(step)))
            found = tier.rewind(state_of(group.rank, -1.0), before=30)
            assert values(found, group.rank)[:2] == (20, 20.0)
            tier.save(25, state_of(group.rank, 25.5))
            tier.settle()
            assert tier.steps() == [25, 30, 20, 10]
            restored = tier.restore(state_of(group.rank, -1.0))
            assert restored is not None
            assert values(restored, group.rank)[:2] == (25, 25.5)

    run_ranks(RANKS, rank)


def test_without_such_a_step_all_ranks_hear_which_there_are() -> None:
    run = uuid.uuid4().hex

    def rank(group: ThreadGroup) -> None:
        with tier_of(group, run, keep=2) as tier:
            with pytest.raises(IncompleteError, match="no host has a step of the run ''; steps: none"):
                tier.rewind(state_of(group.rank, 0.0))
            tier.save(10, state_of(group.rank, 10.0))
            with pytest.raises(IncompleteError, match="no host has a step before 10 of the run ''; steps: 10"):
                tier.rewind(state_of(group.rank, 0.0), before=10)

    run_ranks(RANKS, rank)
