"""Who is named when nothing arrives."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch.distributed as dist

from giantstep.errors import GiantstepError, PhaseTimeoutError
from giantstep.group.connections import Link
from giantstep.group.faults import idle
from giantstep.group.notices import Board
from giantstep.group.watching import Watch


class Silent:
    """Connections over which nothing ever comes."""

    def __init__(self) -> None:
        self.changed = threading.Event()

    def part(self) -> None:
        """Nothing to do."""


def test_ranks_that_call_the_roll_at_the_same_time_do_not_name_each_other() -> None:
    """Rank 4 waits for 3 and 3 for 2, which is silent; 4 calls the roll a little before 3 does."""
    store: Any = dist.HashStore()
    found: dict[int, GiantstepError] = {}

    def wait(rank: int, peer: int, patience_secs: float) -> None:
        watch = Watch(rank, 5, Silent(), Board(store, rank), "move", idle)  # type: ignore[arg-type]
        try:
            watch.until([Link(peer)], patience_secs)
        except GiantstepError as error:
            found[rank] = error

    threads = [threading.Thread(target=wait, args=waiting) for waiting in ((4, 3, 0.6), (3, 2, 0.8))]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert time.monotonic() - begin < 10
    assert {rank: (type(error), error.rank) for rank, error in found.items()} == {
        3: (PhaseTimeoutError, 2),
        4: (PhaseTimeoutError, 2),
    }
