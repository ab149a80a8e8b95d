"""The collector of cyclic garbage rests in a block and is afterwards as it was."""

from __future__ import annotations

import contextlib
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.collection import uncollected
from giantstep.errors import KeyMismatchError


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


class _Watcher:
    """A Stateful object that notes whether the collector rests while it is loaded."""

    def __init__(self) -> None:
        self.enabled: list[bool] = []

    def state_dict(self) -> dict[str, Any]:
        return {"value": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {"value": 1}
        self.enabled.append(gc.isenabled())


def test_the_collector_rests_during_a_load_and_never_after(tmp_path: Path) -> None:
    watcher = _Watcher()
    gs.save({"a": watcher, "t": torch.arange(4.0)}, tmp_path)
    assert gc.isenabled()
    gs.load({"a": watcher, "t": torch.zeros(4)}, tmp_path)
    assert watcher.enabled == [False]
    assert gc.isenabled()
    with pytest.raises(KeyMismatchError):
        gs.load({"missing": torch.zeros(4)}, tmp_path)
    assert gc.isenabled()
