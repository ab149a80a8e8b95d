"""Which ranks share a host, and which hosts fail together."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from giantstep.errors import BadArgumentError, DisagreementError, PeerFailureError
from giantstep.shards.region import Int64s


@dataclass(frozen=True, slots=True)
class Standing:
    """Where one rank stands.

    Attributes:
        host: name of its host: ranks of one host share its place.
        domain: name of what fails together with it, such as a rack.
        circle: name of the hosts among which copies are placed; "" if all are one circle.
    """

    host: str
    domain: str
    circle: str = ""

    def encode(self) -> bytes:
        """As a message."""
        return json.dumps([self.host, self.domain, self.circle]).encode("ascii")

    @classmethod
    def decode(cls, data: bytes) -> Standing:
        """Inverse of `encode`."""
        found = json.loads(data)
        if not isinstance(found, list) or len(found) != 3 or not all(isinstance(text, str) for text in found):
            raise PeerFailureError("a rank said unreadably where it stands")
        return cls(*found)


@dataclass(frozen=True, slots=True)
class HostMap:
    """All ranks and hosts. Hosts are numbered in the order of their lowest ranks, which are their *leads*.

    Attributes:
        host: [ranks] number of the host of each.
        standings: [hosts].
        domain: [hosts] number of the failure domain of each.
    """

    host: tuple[int, ...]
    standings: tuple[Standing, ...]
    domain: tuple[int, ...]

    @classmethod
    def of(cls, standings: Sequence[Standing]) -> HostMap:
        """From what every rank says.

        Raises:
            DisagreementError: ranks of one host say that it stands in different places.
        """
        known: dict[str, tuple[int, int]] = {}
        host: list[int] = []
        found: list[Standing] = []
        for rank, standing in enumerate(standings):
            number, first = known.setdefault(standing.host, (len(known), rank))
            if standings[first] != standing:
                raise DisagreementError(
                    f"ranks {first} and {rank} are both on host {standing.host!r}, of which rank {first} says that it is in "
                    f"domain {standings[first].domain!r} and circle {standings[first].circle!r}, and rank {rank} "
                    f"{standing.domain!r} and {standing.circle!r}. Give them the same names."
                )
            if number == len(found):
                found.append(standing)
            host.append(number)
        numbers: dict[str, int] = {}
        domain = tuple(numbers.setdefault(standing.domain, len(numbers)) for standing in found)
        return cls(tuple(host), tuple(found), domain)

    @property
    def leads(self) -> list[int]:
        """[hosts] the lowest rank of each."""
        return [self.host.index(number) for number in range(len(self.standings))]

    def ranks_of(self, host: int) -> list[int]:
        """Ranks of a host."""
        return [rank for rank, number in enumerate(self.host) if number == host]

    def domain_of_ranks(self) -> Int64s:
        """[ranks] number of the failure domain of each."""
        return np.array([self.domain[number] for number in self.host], dtype=np.int64)

    def circle_of_ranks(self) -> Int64s:
        """[ranks] number of the circle of each."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(self.standings[host].circle, len(numbers)) for host in self.host], dtype=np.int64)

    def check_copies(self, copies: int) -> None:
        """Raise `BadArgumentError` unless every circle has so many failure domains besides each host's own."""
        circles: dict[str, set[int]] = {}
        for standing, domain in zip(self.standings, self.domain, strict=True):
            circles.setdefault(standing.circle, set()).add(domain)
        for circle, domains in circles.items():
            if len(domains) <= copies:
                where = f"in circle {circle!r} " if circle else ""
                raise BadArgumentError(
                    f"replicas={copies} needs {copies + 1} failure domains, and {where}there are {len(domains)}: "
                    f"{', '.join(sorted({self.standings[self.domain.index(one)].domain for one in domains})[:10])}. Ask for "
                    "fewer, or give hosts that fail independently different domains."
                )


class Ring:
    """In which order hosts take each other's copies: so that equal hosts in equal domains take equally many."""

    def __init__(self, hosts: HostMap) -> None:
        self._hosts = hosts
        seen: dict[int, int] = {}
        # The first host of every domain, then the second ones: so the next one is in another domain, as far as can be.
        turn = [(seen.setdefault(domain, 0), seen.update({domain: seen[domain] + 1}))[0] for domain in hosts.domain]
        self._order = sorted(range(len(hosts.domain)), key=lambda host: (turn[host], hosts.domain[host]))

    def targets(self, rank: int, taken: Collection[int], need: int) -> list[int]:
        """Ranks that take copies of a file of `rank`: on so many further hosts of its circle, each in another domain.

        `taken` are the domains that hold the file already. Fewer ranks if there are not so many.
        """
        hosts = self._hosts
        own = hosts.host[rank]
        place = hosts.ranks_of(own).index(rank)
        start = self._order.index(own)
        used = {hosts.domain[own], *taken}
        found: list[int] = []
        for other in (*self._order[start + 1 :], *self._order[:start]):
            if len(found) == need:
                break
            if hosts.domain[other] not in used and hosts.standings[other].circle == hosts.standings[own].circle:
                used.add(hosts.domain[other])
                ranks = hosts.ranks_of(other)
                found.append(ranks[place % len(ranks)])
        return found
