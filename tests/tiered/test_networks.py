"""Hosts with addresses of their own: steps go from one to the other, and a link that is cut ends a call and spoils nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import Host, Job, hosts_in, run
from namespaces import Network, needs_namespaces
from tier_work import DECIDED, Stop, meet_trouble, meet_trouble_restoring, meet_without_interface, restore_and_save

COPIES: dict[str, Any] = {"replicas": 1}
PARITY: dict[str, Any] = {"parity": (3, 1)}
PATIENCE_SECS = 2.0
PEER_ERRORS = {"PeerFailureError", "PhaseTimeoutError"}


@pytest.fixture
def network() -> Iterator[Network]:
    needs_namespaces()
    with Network(4) as made:
        yield made


@pytest.fixture
def hosts(tmp_path: Path, network: Network) -> list[Host]:
    return hosts_in(tmp_path, ["a", "b", "c", "d"], network)


def ends_of_job_with_cut(
    hosts: list[Host], network: Network, function: Any, arguments: tuple[Any, ...], cut: int, stopping: int
) -> list[str]:
    """What ranks, one on each host, come to when a host's link is cut as one of them has stopped."""
    with Job(hosts, function, *arguments) as job:
        job.await_stop(stopping)
        network.cut(cut)
        job.let_go(stopping)
        outcomes = job.outcomes()
    network.mend(cut)
    assert [kind for kind, _ in outcomes] == ["ok"] * len(hosts)
    return [found for _, found in outcomes]


def cut_while_saving(
    hosts: list[Host], network: Network, settings: dict[str, Any], cut: int, stopping: int, stop: Stop
) -> None:
    arguments = (10, settings, {stopping: stop}, PATIENCE_SECS)
    assert set(ends_of_job_with_cut(hosts, network, meet_trouble, arguments, cut, stopping)) <= PEER_ERRORS


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
    cut_while_saving(hosts, network, settings, cut, cut, ("copy", 1))
    assert [host.committed() for host in hosts] == [[5]] * 4
    # Renumbered hosts are the same hosts.
    assert run([hosts[number] for number in (2, 0, 3, 1)], restore_and_save, [11], settings) == [5] * 4
    assert [host.committed() for host in hosts] == [[5, 11]] * 4


def test_a_host_that_does_not_hear_of_the_commit_takes_part_in_restoring_that_step(hosts: list[Host], network: Network) -> None:
    cut_while_saving(hosts, network, COPIES, 2, 0, (DECIDED, 0))
    assert [host.committed() for host in hosts] == [[5, 10], [5, 10], [5], [5, 10]]
    assert run(hosts, restore_and_save, [], COPIES) == [10] * 4


def test_a_link_cut_while_restoring_ends_it_and_the_next_try_restores(hosts: list[Host], network: Network) -> None:
    assert run(hosts, restore_and_save, [5], COPIES) == [0] * 4
    hosts[3].lose()
    ends = ends_of_job_with_cut(
        hosts, network, meet_trouble_restoring, (COPIES, {3: ("gather", 1)}, PATIENCE_SECS), cut=3, stopping=3
    )
    assert set(ends) <= PEER_ERRORS
    assert run(hosts, restore_and_save, [], COPIES) == [5] * 4


def test_a_host_killed_while_copying_is_replaced_by_one_at_another_address(
    tmp_path: Path, hosts: list[Host], network: Network
) -> None:
    with Job(hosts, meet_trouble, 10, COPIES, {0: ("copy", 1)}, PATIENCE_SECS) as job:
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
