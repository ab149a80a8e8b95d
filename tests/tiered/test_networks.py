"""Hosts with addresses of their own: steps go from one to the other, and a link that is cut ends a call and spoils nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import Host, Job, hosts_in, run
from namespaces import Network, needs_namespaces
from tier_work import (
    DECIDED,
    Stops,
    meet_trouble,
    meet_trouble_restoring,
    meet_without_interface,
    restore_and_save,
    save_until_saved,
)

COPIES: dict[str, Any] = {"replicas": 1}
PARITY: dict[str, Any] = {"parity": (3, 1)}
PEER_ERRORS = {"PeerFailureError", "PhaseTimeoutError"}


@pytest.fixture
def network() -> Iterator[Network]:
    needs_namespaces()
    with Network(4) as made:
        yield made


@pytest.fixture
def hosts(tmp_path: Path, network: Network) -> list[Host]:
    return hosts_in(tmp_path, ["a", "b", "c", "d"], network)


def ends_when_cut(hosts: list[Host], network: Network, work: Any, settings: dict[str, Any], stops: Stops, cut: int) -> set[str]:
    """What ranks, one on each host, come to when a host's link is cut as they have stopped."""
    with Job(hosts, work, settings, stops) as job:
        job.all_stop()
        if stops.one_rank is None:
            network.cut(cut)
            job.all_go()
        else:
            job.all_go()
            job.await_stop(stops.one_rank[0])
            network.cut(cut)
            job.let_go(stops.one_rank[0])
        outcomes = job.outcomes()
    network.mend(cut)
    assert [kind for kind, _ in outcomes] == ["ok"] * len(hosts)
    return {found for _, found in outcomes}


CUTS = [
    pytest.param(COPIES, 0, id="copies-first-host"),
    pytest.param(PARITY, 1, id="parity"),
    *(pytest.param(COPIES, cut, id=f"copies-{cut}", marks=pytest.mark.slow) for cut in (1, 2, 3)),
    *(pytest.param(PARITY, cut, id=f"parity-{cut}", marks=pytest.mark.slow) for cut in (0, 2, 3)),
]


@pytest.mark.parametrize(("settings", "cut"), CUTS)
def test_a_link_cut_while_copying_ends_the_save_and_the_step_before_is_restored(
    hosts: list[Host], network: Network, settings: dict[str, Any], cut: int
) -> None:
    stops = Stops(all_ranks=("copy", 1))
    assert ends_when_cut(hosts, network, meet_trouble, settings, stops, cut) <= PEER_ERRORS
    assert [host.committed() for host in hosts] == [[5]] * 4
    # Renumbered hosts are the same hosts.
    assert run([hosts[number] for number in (2, 0, 3, 1)], restore_and_save, [11], settings) == [5] * 4
    assert [host.committed() for host in hosts] == [[5, 11]] * 4


def test_a_host_that_does_not_hear_of_the_commit_takes_part_in_restoring_that_step(hosts: list[Host], network: Network) -> None:
    stops = Stops(all_ranks=("agree copy", 0), one_rank=(0, (DECIDED, 0)), patience_secs=3.0)
    assert ends_when_cut(hosts, network, meet_trouble, COPIES, stops, cut=2) <= PEER_ERRORS
    assert [host.committed() for host in hosts] == [[5, 10], [5, 10], [5], [5, 10]]
    assert run(hosts, restore_and_save, [], COPIES) == [10] * 4


def test_a_link_cut_while_restoring_ends_it_and_the_next_try_restores(hosts: list[Host], network: Network) -> None:
    assert run(hosts, restore_and_save, [5], COPIES) == [0] * 4
    hosts[3].lose()
    # All hosts have agreed on the step, and the fourth is being sent what it lacks.
    stops = Stops(all_ranks=("agree gather", 3), one_rank=(3, ("read", 0)), patience_secs=4.0)
    assert ends_when_cut(hosts, network, meet_trouble_restoring, COPIES, stops, cut=3) <= PEER_ERRORS
    assert run(hosts, restore_and_save, [], COPIES) == [5] * 4


@pytest.mark.slow
@pytest.mark.parametrize("cut", [0, 2])
def test_the_same_processes_save_again_once_the_link_is_back(hosts: list[Host], network: Network, cut: int) -> None:
    with Job(hosts, save_until_saved) as job:
        job.all_stop()
        network.cut(cut)
        job.all_go()
        job.all_stop()
        network.mend(cut)
        job.all_go()
        outcomes = job.outcomes(120)
    for kind, ends in outcomes:
        assert (kind, ends[-1]) == ("ok", "saved")
        assert {*ends[:-1]} <= PEER_ERRORS
        assert len(ends) > 1


def test_a_host_killed_while_copying_is_replaced_by_one_at_another_address(
    tmp_path: Path, hosts: list[Host], network: Network
) -> None:
    with Job(hosts, meet_trouble, COPIES, Stops(one_rank=(0, ("copy", 1)))) as job:
        job.await_stop(0)
        job.kill("a")
        outcomes = job.outcomes()
    assert [value for _, value in outcomes[1:]] == ["PeerFailureError"] * 3
    hosts[0].lose()
    number = network.add()
    other = Host("other", str(tmp_path / "other"), network.path(number), network.address(number))
    left = [other, *hosts[1:]]
    assert run(left, restore_and_save, [11], COPIES) == [5] * 4
    assert [host.committed() for host in left] == [[5, 11]] * 4


def test_ranks_find_each_other_where_host_names_lead_to_loopback(hosts: list[Host]) -> None:
    assert run(hosts, meet_without_interface) == [b"0123"] * 4


def test_networks_leave_nothing_behind() -> None:
    needs_namespaces()
    with Network(1) as network:
        paths = [Path(network.path(network.add())), Path(network.path(0))]
        assert all(path.exists() for path in paths)
    assert not any(path.exists() for path in paths)
