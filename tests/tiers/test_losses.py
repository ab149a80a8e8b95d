"""After any losses that the placement promises to survive, any other hosts and ranks load every bit."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import giantstep as gs
from giantstep.errors import IncompleteError
from giantstep.tiers.node_store import Protection
from tiers.clusters import Cluster, Layout, check_exact, flip, one_error

LAYOUTS = [Layout(), Layout(2), Layout(3, (2, 0, 1)), Layout(2, (0, 3)), Layout(1, (5, 1))]


@dataclass
class Case:
    """Hosts before and after, and what was lost."""

    ranks: list[int]
    domains: list[str]
    circles: list[str]
    protection: Protection
    layout: Layout
    then_ranks: list[int]
    # Of each host afterwards, which of those before it is; -1 for a new one.
    then_hosts: list[int]
    then_names: list[str]
    then_layout: Layout
    lost_files: list[tuple[int, float]]
    flipped: list[tuple[int, float, float]]
    exchange: str


@st.composite
def cases(draw: st.DrawFn) -> Case:
    hosts = draw(st.integers(2, 6))
    ranks = draw(st.lists(st.integers(1, 2), min_size=hosts, max_size=hosts))
    shared = draw(st.sampled_from([1, 1, 2])) if hosts > 3 else 1
    domains = draw(st.permutations([f"d{host // shared}" for host in range(hosts)]))
    count = len(set(domains))
    circles = [""] * hosts
    if shared == 1 and hosts >= 4 and draw(st.booleans()):
        circles = draw(st.permutations(["east", "west"] * 2 + ["west"] * (hosts - 4)))
        count = 2
    parity = None
    if draw(st.booleans()):
        m = draw(st.integers(1, min(2, count - 1)))
        parity = (draw(st.integers(1, 4)), m) if hosts // (m + 1) >= shared else None
    replicas = 0 if parity else draw(st.integers(0 if parity else 1, min(2, count - 1)))
    then_hosts = draw(st.permutations(range(hosts)))[: draw(st.integers(1, hosts))]
    then_hosts = draw(st.permutations([*then_hosts, *[-1] * draw(st.integers(0, 2))]))
    names = draw(st.permutations([f"h{number}" for number in range(8)]))[: len(then_hosts)]
    some = st.integers(0, hosts - 1)
    at = st.floats(0, 0.999)
    return Case(
        ranks,
        domains,
        circles,
        Protection(replicas, parity),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.lists(st.integers(1, 2), min_size=len(then_hosts), max_size=len(then_hosts))),
        then_hosts,
        names,
        draw(st.sampled_from(LAYOUTS)),
        draw(st.lists(st.tuples(some, at), max_size=2)),
        draw(st.lists(st.tuples(some, at, at), max_size=2)),
        draw(st.sampled_from(["auto", "auto", "none"])),
    )


def after(case: Case, before: Cluster) -> Cluster:
    """The hosts afterwards: some of those before, under any names, and new ones."""
    folders = [before.folders[old] if old >= 0 else f"new{number}" for number, old in enumerate(case.then_hosts)]
    return Cluster(before.root, case.then_ranks, case.then_names, folders=folders, protection=case.protection)


def damage(case: Case, before: Cluster) -> set[int]:
    """Lose and damage what the case says; return the hosts before that have suffered."""
    hurt = {host for host in range(len(case.ranks)) if host not in case.then_hosts}
    before.lose(*hurt)
    for host, at in case.lost_files:
        files = sorted((before.folder(host) / "data").glob("*"))
        if files:
            files[int(len(files) * at)].unlink()
            hurt.add(host)
    for host, at, place in case.flipped:
        files = sorted(before.folder(host).glob("data/*")) + sorted(before.folder(host).glob("*.*"))
        if files:
            flip(files[int(len(files) * at)], place)
            hurt.add(host)
    return hurt


def is_promised(case: Case, before: Cluster, hurt: set[int]) -> bool:
    if case.protection.parity is None:
        return len({case.domains[host] for host in hurt}) <= case.protection.replicas
    m = case.protection.parity[1]
    return all(len(hurt & {*group}) <= m for group in before.parity_groups())


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(cases())
def test_what_the_placement_promises_loads_exactly_and_all_else_fails_alike_on_all_ranks(case: Case) -> None:
    with tempfile.TemporaryDirectory() as root:
        before = Cluster(Path(root), case.ranks, (), case.domains, case.circles, protection=case.protection)
        before.save(case.layout)
        save_id = before.record().save_id
        hurt = damage(case, before)
        cluster = after(case, before)
        options = gs.LoadOptions(timeout_secs=20, exchange=case.exchange)  # type: ignore[arg-type]
        found, errors = cluster.load(case.then_layout, options)
        if is_promised(case, before, hurt):
            assert errors == [None] * cluster.size, errors
        if errors[0] is None:
            assert errors == [None] * cluster.size, errors
            check_exact(found, case.then_layout, 0)
            # What was found once is there on all hosts: it loads again.
            cluster.check_load(case.then_layout)
        else:
            error = one_error(errors, IncompleteError)
            named = save_id in str(error) and any(before.names[host] in str(error) for host in hurt)
            assert named or "none of the" in str(error), str(error)


@pytest.mark.parametrize("exchange", ["auto", "none"])
@pytest.mark.parametrize("victim", range(3))
def test_damage_found_while_files_are_rebuilt_is_passed_over_if_parity_suffices(
    tmp_path: Path, victim: int, exchange: str
) -> None:
    cluster = Cluster(tmp_path, [1] * 4, protection=Protection(0, (2, 2)))
    cluster.save(LAYOUTS[1])
    cluster.lose(0)
    # What is lost is rebuilt out of this host's files first, and is not what was written.
    for path in (cluster.folder(1 + victim) / "data").iterdir():
        flip(path, 0.99)
    options = gs.LoadOptions(timeout_secs=20, exchange=exchange)  # type: ignore[arg-type]
    cluster.check_load(LAYOUTS[1], options=options)


@pytest.mark.parametrize("exchange", ["auto", "none"])
def test_the_only_copy_is_rebuilt_out_of_parity_if_it_is_damaged_when_it_is_to_be_sent(tmp_path: Path, exchange: str) -> None:
    cluster = Cluster(tmp_path, [1] * 3, protection=Protection(0, (2, 1)))
    cluster.save(LAYOUTS[0])
    for path in (cluster.folder(0) / "data").iterdir():
        flip(path, 0.99)
    then = Cluster(tmp_path, [2, 1, 1], ["x", "y", "z"], folders=["h2", "h0", "h1"], protection=cluster.protection)
    options = gs.LoadOptions(timeout_secs=20, exchange=exchange)  # type: ignore[arg-type]
    found = then.check_load(LAYOUTS[2], options=options)
    assert any("damaged" in note and "host y" in note for note in found[0].report.notes)


def test_blocks_that_only_ranks_without_the_file_want_are_read_by_one_that_has_it(tmp_path: Path) -> None:
    before = Cluster(tmp_path, [1, 1])
    before.save(Layout(2))
    then = Cluster(tmp_path, [1, 1, 1], folders=["h0", "new1", "new2"])
    found = then.check_load(Layout(1, (1, 2, 1)), options=gs.LoadOptions(timeout_secs=20, exchange="auto"))
    # The files themselves are not sent besides.
    stored = sum(file.bytes for file in before.record().files)
    assert found[0].report.exchange == "all"
    assert sum(state.report.bytes_fetched for state in found) < stored
