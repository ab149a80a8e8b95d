"""Whether every host has room for the steps of a tier, before there are any. Called by `LocalTier`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from giantstep.errors import StoreError
from giantstep.group.base import Group, Parts, consult_parts
from giantstep.mapping.describe import describe
from giantstep.reports import size_text
from giantstep.tiers.hosts import HostMap, Standing
from giantstep.tiers.node_store import NodeStore
from giantstep.tiers.room import most_bytes


def check_room(group: Group, root: NodeStore, steps: int, state_dict: dict[Any, Any], timeout_secs: float) -> None:
    """Collective. Raise unless every host has room for so many steps of states like this one.

    Raises (the same on all ranks):
        StoreError: some host has not.
    """

    def look() -> Parts:
        described = describe(state_dict, for_load=False)
        here = sum(view.numel() * view.element_size() for view in described.views if view is not None)
        free = root.free_bytes()
        return root.standing.encode(), str(here).encode(), b"" if free is None else str(free + _used(root)).encode()

    def decide(reports: Sequence[Parts]) -> list[Parts]:
        hosts = HostMap.of([Standing.decode(report[0]) for report in reports])
        protection = root.protection
        most = most_bytes([int(report[1]) for report in reports], hosts, protection.replicas, protection.parity)
        for number, lead in enumerate(hosts.leads):
            free, need = reports[lead][2], most[number] * steps
            if free and int(free) < need:
                raise StoreError(
                    f"host {hosts.standings[number].host} has {size_text(int(free))} of room in its place, and {steps} "
                    f"steps of such states, with what it keeps of other hosts, take up to {size_text(need)}: give it more, "
                    "keep fewer steps, or ask for less protection"
                )
        return [()] * len(reports)

    consult_parts(group, "manage", timeout_secs, look, decide)


def _used(root: NodeStore) -> int:
    total = 0
    for name in root.folders():
        place = root.folder(name)
        total += sum(place.size(file) for folder in ("", "data") for file in place.names(folder))
    return total
