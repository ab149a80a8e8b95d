"""Where copies lie: every data file in as many failure domains as asked for, and as much as can be without sending."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import giantstep as gs
from giantstep.errors import BadArgumentError, DisagreementError
from giantstep.testing.ranks import RanksFailedError, run_ranks
from giantstep.tiers.hosts import HostMap, Ring, Standing
from giantstep.tiers.node_store import NodeStore, Protection
from tiers.clusters import Cluster, Layout, one_error


def domains_of_files(cluster: Cluster) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for host, files in enumerate(cluster.held()):
        for name in files:
            found.setdefault(name, set()).add(cluster.domains[host])
    return found


@pytest.mark.parametrize("replicas", [0, 1, 2])
@pytest.mark.parametrize(
    ("ranks", "domains"),
    [
        ([2, 2, 2], ["a", "b", "c"]),
        ([1, 2, 1, 2], ["a", "a", "b", "c"]),
        ([3, 1, 2, 1, 1], ["a", "b", "b", "c", "a"]),
        ([1] * 6, ["a", "b", "c", "c", "b", "a"]),
    ],
    ids=["even", "one rack of two", "uneven", "racks of two"],
)
@pytest.mark.parametrize("layout", [Layout(), Layout(2, (1, 3)), Layout(3, (2, 0, 1))], ids=["plain", "halves", "thirds"])
def test_every_data_file_lies_in_as_many_domains_as_copies_were_asked_for(
    tmp_path: Path, ranks: list[int], domains: list[str], replicas: int, layout: Layout
) -> None:
    cluster = Cluster(tmp_path, ranks, domains=domains, protection=Protection(replicas))
    cluster.save(layout)
    found = domains_of_files(cluster)
    assert {f"data/{name}" for name in found} == {file.name for file in cluster.record().files}
    assert {name: domains for name, domains in found.items() if len(domains) < 1 + replicas} == {}
    # Copies are equal, and there is no more of them.
    copies = Counter(name for files in cluster.held() for name in files)
    assert set(copies.values()) <= {1 + replicas}
    for name in found:
        assert len({files[name] for files in cluster.held() if name in files}) == 1


def test_commit_record_and_index_are_on_every_host(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, [2, 1, 1])
    cluster.save(Layout())
    tops = [{path.name: path.read_bytes() for path in cluster.folder(host).iterdir() if path.is_file()} for host in range(3)]
    assert tops[0] == tops[1] == tops[2]
    assert len(tops[0]) == 2


def test_copies_stay_within_a_circle(tmp_path: Path) -> None:
    circles = ["east", "west", "east", "west", "east"]
    cluster = Cluster(tmp_path, [1] * 5, circles=circles)

    def work(group: Any) -> None:
        own = gs.ShardedTensor.from_rank_offsets("x", torch.full((400, 5), float(group.rank)), (0, group.rank, 5))
        state = {"x": own, "shared": torch.arange(3000.0)}
        report = gs.save(state, cluster.store(group.rank), process_group=group)

        assert report.bytes_spared >= 12_000

    run_ranks(5, work)
    held: dict[str, set[str]] = {}
    for host, files in enumerate(cluster.held()):
        for name in files:
            held.setdefault(name, set()).add(circles[host])
    assert held
    # Twins are of the writer's circle, too, and objects that all ranks hold of rank 0's.
    assert all(len(found) == 1 for found in held.values())


@pytest.mark.parametrize("replicas", [1, 2])
def test_what_all_hosts_hold_is_written_by_twins_and_only_objects_are_sent(tmp_path: Path, replicas: int) -> None:
    cluster = Cluster(tmp_path, [1, 1, 1], protection=Protection(replicas))

    def work(group: Any) -> gs.SaveReport:
        tensors = {f"t{number}": torch.arange(5000.0) * number for number in range(6)}
        return gs.save({**tensors, "common": 7}, cluster.store(group.rank), process_group=group)

    reports = run_ranks(3, work)
    assert sum(report.bytes_written for report in reports) >= 6 * 20_000 * (1 + replicas)
    assert reports[0].bytes_spared >= 6 * 20_000 * replicas
    assert len({report.bytes_spared for report in reports}) == 1
    assert sum(report.bytes_sent for report in reports) < 5_000 * replicas
    # The work is divided: nobody writes twice what another does.
    written = [report.bytes_written for report in reports]
    assert max(written) < 2 * min(written)


def test_what_one_host_holds_alone_is_sent(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, [2, 2])

    def work(group: Any) -> gs.SaveReport:
        part = torch.full((1000, 10), float(group.rank))
        state = {"x": gs.ShardedTensor.from_rank_offsets("x", part, (0, group.rank, 4))}
        return gs.save(state, cluster.store(group.rank), process_group=group)

    reports = run_ranks(4, work)
    assert all(report.bytes_sent >= 40_000 for report in reports)
    assert reports[0].bytes_spared == 0
    assert sum(report.bytes_written for report in reports) == reports[0].bytes


def test_replicas_that_diverged_are_noticed_and_the_owner_s_are_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Cluster(tmp_path, [1, 1])

    def work(group: Any) -> gs.SaveReport:
        other = gs.ShardedTensor.from_rank_offsets("other", torch.full((2000,), float(group.rank)), replica_id=group.rank)
        return gs.save({"same": torch.arange(3000.0), "other": other}, cluster.store(group.rank), process_group=group)

    run_ranks(2, work)
    assert any("different values" in record.message for record in caplog.records)
    first, second = cluster.held()
    assert first == second
    loaded = []
    for host in range(2):
        alone = Cluster(tmp_path, [1], names=[f"h{host}"])
        state = {"same": torch.zeros(3000), "other": torch.zeros(2000)}
        found = gs.load(state, alone.store(0))
        assert torch.equal(found["same"], torch.arange(3000.0))
        loaded.append(found["other"])
    assert torch.equal(loaded[0], loaded[1])
    assert loaded[0].unique().tolist() in ([0.0], [1.0])


def test_parity_costs_its_share_and_lies_on_other_hosts_than_its_data(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, [1] * 5, protection=Protection(0, (4, 1)))

    def work(group: Any) -> gs.SaveReport:
        part = torch.full((8000, 10), float(group.rank))
        state = {"x": gs.ShardedTensor.from_rank_offsets("x", part, (0, group.rank, 5))}
        return gs.save(state, cluster.store(group.rank), process_group=group)

    run_ranks(5, work)
    stored = [sum(map(len, files.values())) for files in cluster.held()]
    assert sum(stored) < 5 * 320_000 * 1.3
    assert max(stored) < 1.1 * min(stored)
    assert set(Counter(name for files in cluster.held() for name in files).values()) == {1}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=2, max_size=9), st.integers(1, 3), st.data())
def test_the_ring_finds_hosts_of_further_domains_for_every_rank(
    hosts: list[tuple[int, int]], need: int, data: st.DataObject
) -> None:
    standings = [Standing(f"h{number}", f"d{domain}") for number, (domain, count) in enumerate(hosts) for _ in range(count)]
    found = HostMap.of(data.draw(st.permutations(standings)))
    ring, domains = Ring(found), {domain for domain, _ in hosts}
    for rank in range(len(standings)):
        targets = ring.targets(rank, (), need)
        where = [found.domain[found.host[target]] for target in (rank, *targets)]
        assert len(set(where)) == len(where) == 1 + min(need, len(domains) - 1)
        taken = {where[1]} if targets else set()
        again = ring.targets(rank, taken, need)
        assert not taken & {found.domain[found.host[target]] for target in again}


def test_hosts_equal_in_number_and_domains_take_equally_many_copies() -> None:
    hosts = HostMap.of([Standing(f"h{number}", f"d{number % 3}") for number in range(6)])
    taken = Counter(target for rank in range(6) for target in Ring(hosts).targets(rank, (), 1))
    assert set(taken.values()) == {1}


@pytest.mark.parametrize(
    ("protection", "names", "told"),
    [
        (Protection(2), ["a", "b"], "failure domains"),
        (Protection(1), ["a"], "failure domains"),
        (Protection(0, (2, 2)), ["a", "b"], "parity"),
    ],
    ids=["two copies on two hosts", "a copy on one host", "two of parity on two hosts"],
)
def test_protection_that_the_hosts_cannot_give_is_refused_before_anything_is_written(
    tmp_path: Path, protection: Protection, names: list[str], told: str
) -> None:
    cluster = Cluster(tmp_path, [1] * len(names), names=names, protection=protection)
    with pytest.raises(RanksFailedError) as failed:
        cluster.save(Layout())
    one_error(failed.value.errors, BadArgumentError, told)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_ranks_of_one_host_that_say_two_domains_are_told_so(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, [2, 1])

    def work(group: Any) -> None:
        store = cluster.store(group.rank)
        if group.rank == 1:
            store = NodeStore(store.here, store.name, Standing("h0", "elsewhere"), store.protection)
        gs.save({"x": 1}, store, process_group=group)

    with pytest.raises(RanksFailedError) as failed:
        run_ranks(3, work)
    one_error(failed.value.errors, DisagreementError, "ranks 0 and 1", "'h0'", "'elsewhere'")


@pytest.mark.parametrize(
    "arguments",
    [
        {"replicas": -1},
        {"replicas": 17},
        {"replicas": True},
        {"replicas": 1.0},
        {"replicas": 0, "parity": (0, 1)},
        {"replicas": 0, "parity": (4, 0)},
        {"replicas": 0, "parity": (200, 56)},
        {"replicas": 0, "parity": [4, 1]},
        {"replicas": 0, "parity": (True, 1)},
        {"replicas": 1, "parity": (4, 1)},
        {"run": 3},
    ],
    ids=str,
)
def test_senseless_protection_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(BadArgumentError, match="cannot be"):
        Protection(**arguments)
