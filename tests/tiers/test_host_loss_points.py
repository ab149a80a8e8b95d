"""A host that dies before or after any storage operation of a node-local save loses no step that was committed before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.group.threads import ThreadGroup
from giantstep.testing.faults import CrashError, CrashingStore, Loss
from giantstep.testing.ranks import run_ranks, run_ranks_collecting

HOSTS = 3
OPTIONS = gs.SaveOptions(timeout_secs=20, writer_threads=1)
PROTECTIONS: dict[str, dict[str, Any]] = {"copies": {"replicas": 1}, "parity": {"parity": (2, 1)}}


def state_of(rank: int, value: float) -> dict[str, Any]:
    own = torch.full((2, 3000), value + rank)
    return {
        "own": gs.ShardedTensor.from_rank_offsets("own", own, (0, rank, HOSTS)),
        "shared": torch.full((500,), value),
        "rng": gs.ShardedObject("rng", {"of": rank, "at": value}, (HOSTS,), (rank,)),
        "at": value,
    }


def tier_of(group: ThreadGroup, stores: list[CrashingStore], names: list[str], protection: dict[str, Any]) -> gs.LocalTier:
    return gs.LocalTier(
        stores[group.rank],
        host=names[group.rank],
        keep=2,
        asynchronous=False,
        process_group=group,
        save_options=OPTIONS,
        load_options=gs.LoadOptions(timeout_secs=20),
        **protection,
    )


NAMES = ["a", "b", "c"]


def save(stores: list[CrashingStore], step: int, protection: dict[str, Any]) -> list[BaseException | None]:
    def rank(group: ThreadGroup) -> None:
        with tier_of(group, stores, NAMES, protection) as tier:
            tier.save(step, state_of(group.rank, float(step)))

    return run_ranks_collecting(HOSTS, rank)[1]


def restored(stores: list[CrashingStore], names: list[str], protection: dict[str, Any]) -> set[int]:
    """The step that all ranks restore, whose values are checked."""

    def rank(group: ThreadGroup) -> int:
        with tier_of(group, stores, names, protection) as tier:
            found = tier.restore(state_of(group.rank, -1.0))
            assert found is not None
            state, value = found.state, float(found.step)
            assert state["own"].eq(value + group.rank).all()
            assert state["shared"].eq(value).all()
            assert (state["rng"], state["at"]) == ({"of": group.rank, "at": value}, value)
            return found.step

    return set(run_ranks(HOSTS, rank))


def committed(protection: dict[str, Any]) -> list[CrashingStore]:
    """Hosts of which each has step 1."""
    stores = [CrashingStore() for _ in range(HOSTS)]
    assert save(stores, 1, protection) == [None] * HOSTS
    return stores


def copies_of(stores: list[CrashingStore], loss: Loss) -> list[CrashingStore]:
    return [store.after_power_loss(loss) for store in stores]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", PROTECTIONS)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_dies_at_any_operation_leaves_the_step_or_the_one_before(kind: str, victim: int) -> None:
    protection = PROTECTIONS[kind]
    stores = committed(protection)
    stores[victim].arm(None)
    assert save(copies_of(stores, Loss.NOTHING), 2, protection) == [None] * HOSTS
    seen, point = set(), 0
    while True:
        tried = copies_of(stores, Loss.NOTHING)
        tried[victim].arm(point, after=point % 2 == 1)
        errors = save(tried, 2, protection)
        if not tried[victim].crashed:
            assert errors == [None] * HOSTS
            break
        others = [error for rank, error in enumerate(errors) if rank != victim]
        assert all(error is None or isinstance(error, gs.GiantstepError) for error in others)
        assert errors[victim] is None or isinstance(errors[victim], (CrashError, gs.GiantstepError))
        # The host never comes back: an empty one takes its place.
        left = copies_of(tried, Loss.NOTHING)
        left[victim] = CrashingStore()
        found = restored(left, ["x" if rank == victim else name for rank, name in enumerate(NAMES)], protection)
        assert found in ({1}, {2})
        # It comes back as it was; and all of them lose their power.
        for loss in Loss:
            again = restored(copies_of(tried, loss), NAMES, protection)
            assert again in ({1}, {2})
        seen |= found
        point += 1
    assert seen == {1, 2}
    assert point > 20
