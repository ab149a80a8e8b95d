"""The collector of cyclic garbage rests in a block and is afterwards as it was."""

from __future__ import annotations

import contextlib
import gc
import threading

import pytest

from giantstep.collection import uncollected


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_rests_inside_and_is_as_before_afterwards(enabled: bool) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with contextlib.suppress(KeyError), uncollected(), uncollected():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()


def test_blocks_of_two_threads_may_overlap_in_any_order() -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with uncollected():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with uncollected():
        thread.start()
        entered.wait(30)
    assert not gc.isenabled(), "the other thread is still inside"
    leave.set()
    thread.join()
    assert gc.isenabled()
