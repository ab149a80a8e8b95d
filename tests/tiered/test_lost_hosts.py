"""Hosts that die in the middle of a save: the newest complete step is restored without them, by any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fleet import Host, Job, hosts_in, run
from tier_work import Stops, meet_trouble, restore_and_save

from processes import DIED

COPIES: dict[str, Any] = {"replicas": 1}
PARITY: dict[str, Any] = {"parity": (3, 1)}
SIGKILLED = -9


def seats(hosts: list[Host], each: int) -> list[Host]:
    """By rank, its host: so many neighbouring ranks on each."""
    return [host for host in hosts for _ in range(each)]


def kill_while_copying(hosts: list[Host], victim: int, number: int, settings: dict[str, Any]) -> None:
    """Save step 5 on two ranks a host, then kill a host in the middle of saving step 10; all others hear of it."""
    stopping = 2 * victim
    with Job(seats(hosts, 2), meet_trouble, settings, Stops(one_rank=(stopping, ("copy", number)))) as job:
        job.await_stop(stopping)
        job.kill(hosts[victim].name)
        outcomes = job.outcomes()
    for rank, outcome in enumerate(outcomes):
        assert outcome == ((DIED, SIGKILLED) if rank // 2 == victim else ("ok", "PeerFailureError"))
    assert [host.committed() for host in hosts] == [[5]] * 4
    hosts[victim].lose()


def go_on(hosts: list[Host], folder: Path, victim: int, each: int, settings: dict[str, Any]) -> None:
    """Another host takes the place of the one that is lost. Its ranks may be the first, or the last."""
    (other,) = hosts_in(folder, ["other"])
    left = [other if number == victim else host for number, host in enumerate(hosts)]
    assert run(seats(left, each), restore_and_save, [11], settings) == [5] * each * 4
    assert [host.committed() for host in left] == [[5, 11]] * 4


@pytest.mark.parametrize(("settings", "victim"), [(COPIES, 2), (PARITY, 0)], ids=["copies", "parity-first-host"])
def test_a_host_killed_while_copying_is_replaced(tmp_path: Path, settings: dict[str, Any], victim: int) -> None:
    hosts = hosts_in(tmp_path, ["a", "b", "c", "d"])
    kill_while_copying(hosts, victim, 1, settings)
    go_on(hosts, tmp_path, victim, 1, settings)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [COPIES, PARITY], ids=["copies", "parity"])
@pytest.mark.parametrize("victim", range(4))
@pytest.mark.parametrize("number", [0, 2])
def test_any_host_killed_in_any_round_is_replaced(tmp_path: Path, settings: dict[str, Any], victim: int, number: int) -> None:
    hosts = hosts_in(tmp_path, ["a", "b", "c", "d"])
    kill_while_copying(hosts, victim, number, settings)
    go_on(hosts, tmp_path, victim, 1 + victim % 3, settings)


def test_fewer_hosts_than_before_restore_in_another_order(tmp_path: Path) -> None:
    hosts = hosts_in(tmp_path, ["a", "b", "c", "d"])
    assert run(hosts, restore_and_save, [5], COPIES) == [0] * 4
    hosts[1].lose()
    left = [hosts[3], hosts[0], hosts[2]]
    assert run(left, restore_and_save, [], COPIES) == [5] * 3
