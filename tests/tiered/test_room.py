"""`LocalTier.check_space`: what each host is to have room for, where hosts are not alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import StoreError
from giantstep.storage.memory import MemoryStore
from giantstep.testing.ranks import run_ranks_collecting

ELEMENTS = 1000  # of four bytes, per rank


class Small(MemoryStore):
    """Has room for so many bytes."""

    def __init__(self, name: str, free: int) -> None:
        super().__init__(name)
        self.free = free

    def free_bytes(self) -> int:
        return self.free


def errors_with(hosts: str, small: str, free: int, **protection: Any) -> list[Any]:
    """What ranks raise if the host called `small` has so much room, and keeps 1 step, so 2 at times."""
    stores = {host: Small(host, free if host == small else 1 << 30) for host in hosts}

    def run(group: Any) -> None:
        host = hosts[group.rank]
        with gs.LocalTier(stores[host], host=host, keep=1, process_group=group, **protection) as opened:
            shard = torch.zeros(1, ELEMENTS)
            opened.check_space({"w": gs.ShardedTensor.from_rank_offsets("w", shard, (0, group.rank, len(hosts)))})

    return run_ranks_collecting(len(hosts), run)[1]


@pytest.mark.parametrize(
    ("hosts", "small", "shares", "protection"),
    [
        ("ab", "a", 2, {"replicas": 1}),
        # Its own share, and copies of three others.
        ("abbb", "a", 4, {"replicas": 1}),
        ("abcd", "a", 2, {"replicas": 1}),
        ("abcd", "a", 3, {"replicas": 2}),
        # Two hosts are a group of one data block and one of parity each, whatever k is.
        ("ab", "a", 2, {"parity": (3, 1)}),
        ("abbb", "a", 4, {"parity": (3, 1)}),
    ],
)
def test_a_host_has_room_for_its_own_and_for_what_it_keeps_of_others(
    hosts: str, small: str, shares: int, protection: dict[str, Any]
) -> None:
    needed = 2 * shares * 4 * ELEMENTS
    found = errors_with(hosts, small, needed - 1, **protection)
    assert {type(error) for error in found} == {StoreError}
    assert f"host {small}" in str(found[0])
    assert errors_with(hosts, small, needed + 4096, **protection) == [None] * len(hosts)
