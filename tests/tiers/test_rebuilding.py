"""Streams of lost hosts, rebuilt bit for bit out of what the others hold, in pieces of any length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from giantstep.planning.stripe_losses import Losses, Repair, losses
from giantstep.planning.stripes import Stream, Stripe, block_bytes, data_range, parity_groups, stripes_of
from giantstep.tiers.parity import encode, rebuild

Blocks = dict[tuple[int, int, int], np.ndarray]  # by group, number of the stripe, host


def pieces(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, length):
        yield first, min(first + length, stop)


@dataclass
class Hosts:
    """Files of hosts, as arrays, and the parity that each holds."""

    files: list[list[np.ndarray]]
    stripes: list[Stripe]
    parity: Blocks

    @property
    def streams(self) -> list[Stream]:
        return [Stream.of([len(file) for file in files]) for files in self.files]

    @property
    def lengths(self) -> list[int]:
        return [stream.stream_bytes for stream in self.streams]

    def read(self, host: int, start: int, stop: int) -> np.ndarray:
        parts = [self.files[host][part.file][part.offset :][: part.length] for part in self.streams[host].pieces(start, stop)]
        return np.concatenate([np.zeros(0, dtype=np.uint8), *parts])

    def write(self, host: int, start: int, content: np.ndarray) -> None:
        for part in self.streams[host].pieces(start, start + len(content)):
            self.files[host][part.file][part.offset :][: part.length] = content[: part.length]
            content = content[part.length :]

    def make_parity(self, piece: int) -> None:
        for stripe in self.stripes:
            length = block_bytes(stripe, self.lengths)
            for host in stripe.parity:
                self.parity[stripe.group, stripe.number, host] = np.zeros(length, dtype=np.uint8)
            for first, last in pieces(0, length, piece):
                blocks = []
                for host in stripe.data:
                    start, stop = data_range(stripe, host, self.lengths[host])
                    blocks.append(padded(self.read(host, min(start + first, stop), min(start + last, stop)), last - first))
                for host, made in zip(stripe.parity, encode(blocks, len(stripe.parity)), strict=True):
                    self.parity[stripe.group, stripe.number, host][first:last] = made

    def lose(self, hosts: Sequence[int]) -> None:
        for host in hosts:
            for file in self.files[host]:
                file[:] = 0xEE
        for (_, _, host), block in self.parity.items():
            if host in hosts:
                block[:] = 0xEE

    def mend(self, repair: Repair, piece: int) -> None:
        damage, stripe = repair.damage, repair.damage.stripe
        assert len(repair.sources) == len(stripe.data)
        for first, last in pieces(damage.start, damage.stop, piece):
            present = {}
            for source in repair.sources:
                start = min(source.start + first - damage.start, source.stop)
                stop = min(source.start + last - damage.start, source.stop)
                if source.block < len(stripe.data):
                    found = self.read(source.host, start, stop)
                else:
                    found = self.parity[stripe.group, stripe.number, source.host][start:stop]
                present[source.block] = padded(found, last - first)
            for block, made in rebuild(present, len(stripe.data), len(stripe.parity), damage.lost).items():
                host = stripe.hosts[block]
                if block < len(stripe.data):
                    self.write(host, data_range(stripe, host, self.lengths[host])[0] + first, made)
                else:
                    self.parity[stripe.group, stripe.number, host][first:last] = made


def padded(content: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([content, np.zeros(length - len(content), dtype=np.uint8)])


def copied(hosts: Hosts) -> tuple[list[list[np.ndarray]], Blocks]:
    return [[file.copy() for file in files] for files in hosts.files], {
        key: block.copy() for key, block in hosts.parity.items()
    }


def assert_equal(hosts: Hosts, files: list[list[np.ndarray]], parity: Blocks) -> None:
    for found, expected in zip(hosts.files, files, strict=True):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    for key, block in parity.items():
        np.testing.assert_array_equal(hosts.parity[key], block)


@st.composite
def groups_of_hosts(draw: st.DrawFn) -> tuple[Hosts, int]:
    """Hosts in some domains with files of very unequal sizes, and m."""
    m, k = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    count = draw(st.integers(m + 1, 12))
    domain_hosts = draw(st.integers(1, count // (m + 1)))
    domains = draw(st.permutations([host // domain_hosts for host in range(count)]))
    stripes = stripes_of(parity_groups(domains, k, m), m)
    sizes = st.lists(st.one_of(st.just(0), st.integers(1, 200), st.integers(1000, 2000)), max_size=4)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    files = [[random.integers(0, 256, size, dtype=np.uint8) for size in draw(sizes)] for _ in range(count)]
    return Hosts(files, stripes, {}), m


PIECES = st.sampled_from([50, 64, 333, 5000])


@settings(deadline=None)
@given(groups_of_hosts(), PIECES, PIECES, st.data())
def test_any_m_lost_hosts_of_each_group_are_rebuilt(
    case: tuple[Hosts, int], first: int, second: int, data: st.DataObject
) -> None:
    hosts, m = case
    hosts.make_parity(first)
    files, parity = copied(hosts)
    groups = {stripe.group: stripe.hosts for stripe in hosts.stripes}
    lost = [host for group in groups.values() for host in data.draw(st.permutations(group))[:m]]
    hosts.lose(lost)
    found = losses(hosts.stripes, hosts.lengths, lost)
    assert found.missing == ()
    for repair in found.repairs:
        assert all(source.host not in lost or source.start == source.stop for source in repair.sources)
        hosts.mend(repair, second)
    assert_equal(hosts, files, parity)


@settings(deadline=None)
@given(groups_of_hosts(), st.data())
def test_any_losses_are_rebuilt_or_named_as_missing(case: tuple[Hosts, int], data: st.DataObject) -> None:
    hosts, _ = case
    hosts.make_parity(1000)
    files, parity = copied(hosts)
    count = len(hosts.files)
    lost = data.draw(st.lists(st.integers(0, count - 1), max_size=count, unique=True))
    ranges: dict[int, list[tuple[int, int]]] = {}
    for host, stream in enumerate(hosts.streams):
        for file in data.draw(st.lists(st.integers(0, len(stream.ends) - 1), unique=True)) if stream.ends else []:
            ranges.setdefault(host, []).append(stream.range_of(file))
            hosts.files[host][file][:] = 0xEE
    lost_parity: dict[int, list[int]] = {}
    for (_, number, host), block in hosts.parity.items():
        if data.draw(st.booleans()):
            block[:] = 0xEE
            lost_parity.setdefault(host, []).append(number)
    hosts.lose(lost)
    found = losses(hosts.stripes, hosts.lengths, lost, ranges, lost_parity)
    for repair in found.repairs:
        hosts.mend(repair, 777)
    give_back(hosts, found, files, parity)
    assert_equal(hosts, files, parity)


def give_back(hosts: Hosts, found: Losses, files: list[list[np.ndarray]], parity: Blocks) -> None:
    """Put back what is missing, and nothing else; each of it is at bytes at which more blocks than m are lost."""
    whole = Hosts(files, hosts.stripes, parity)
    for damage in found.missing:
        assert len(damage.lost) > len(damage.stripe.parity)
        for host, start, stop in damage.lost_data(hosts.lengths):
            hosts.write(host, start, whole.read(host, start, stop))
        for block in damage.lost:
            if block >= len(damage.stripe.data):
                key = (damage.stripe.group, damage.stripe.number, damage.stripe.hosts[block])
                hosts.parity[key][damage.start : damage.stop] = parity[key][damage.start : damage.stop]
