"""What users do to tensors, processes and threads while a save is in flight, and what must not come of it."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.collection import collected, uncollected
from giantstep.errors import BadArgumentError
from giantstep.group.torch_group import group_of
from giantstep.saver import saver_of
from slow_store import GatedStore, SlowStore

BACKGROUND = gs.SaveOptions(staging="background", max_pending=2)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("length", [1, 4, 1 << 20])
def test_tensors_that_are_given_other_memory_before_they_are_staged_are_stored_as_they_were(rounds: int, length: int) -> None:
    for _ in range(rounds):
        gated, store = GatedStore(), SlowStore()
        flat = torch.ones(64)
        weights = [flat[8 * number : 8 * number + 8] for number in range(8)]
        gs.async_save({"busy": torch.ones(1)}, gated, options=BACKGROUND)
        pending = gs.async_save({f"w{n}": weight for n, weight in enumerate(weights)}, store, options=BACKGROUND)
        for weight in weights:
            weight.data = torch.full((length,), 7.0)
        del flat
        gc.collect()
        gated.gate.set()
        pending.result()
        stored = gs.open_checkpoint(store)
        assert all(stored[f"w{n}"][...].tolist() == [1.0] * 8 for n in range(8))


def test_memory_that_another_thread_replaces_during_a_blocking_save_or_load_is_not_touched_after_it_is_freed() -> None:
    store = GatedStore()
    weights = {f"w{number}": torch.ones(1 << 16) for number in range(16)}
    saving = threading.Thread(target=gs.save, args=(weights, store))
    saving.start()
    assert store.waiting.wait(30)
    for weight in weights.values():
        weight.data = torch.full((1 << 16,), 7.0)
    gc.collect()
    store.gate.set()
    saving.join(60)
    stored = gs.open_checkpoint(store)
    assert all(float(stored[key][...].min()) == float(stored[key][...].max()) == 1.0 for key in weights)


@pytest.mark.parametrize("call", [gs.save, gs.async_save])
@pytest.mark.parametrize("known", [False, True])
def test_a_tensor_whose_memory_was_freed_is_refused_by_name(call: Any, known: bool) -> None:
    store = SlowStore()
    weight, other = torch.ones(1000), torch.ones(1000)
    if known:
        gs.save({"w": weight, "x": other}, store)
    weight.untyped_storage().resize_(0)
    with pytest.raises(BadArgumentError, match="'w' has no memory for its elements"):
        call({"w": weight, "x": other}, store)
    with pytest.raises(BadArgumentError, match="'w' has no memory for its elements"):
        gs.load({"w": weight, "x": other}, store if known else _saved())


def _saved() -> SlowStore:
    store = SlowStore()
    gs.save({"w": torch.ones(1000), "x": torch.ones(1000)}, store)
    return store


def test_a_tensor_whose_memory_was_made_shorter_is_refused_by_name() -> None:
    store = _saved()
    weight = torch.ones(1000)
    weight.untyped_storage().resize_(2000)
    for call in (lambda: gs.save({"w": weight}, SlowStore()), lambda: gs.load({"w": weight, "x": torch.ones(1000)}, store)):
        with pytest.raises(BadArgumentError, match="'w' has no memory for its elements"):
            call()


def _work(numbers: Any) -> None:
    numbers.put((sum(range(1000)), gc.isenabled()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_that_are_forked_while_a_save_is_in_flight_end() -> None:
    """As torch's DataLoader forks them. In a process of its own, which has little else to fork."""
    script = """
import multiprocessing, sys, time, torch
sys.path.insert(0, sys.argv[1])
import giantstep as gs
from slow_store import GatedStore
from test_async_robust import _work
store = GatedStore()
pending = gs.async_save({"w": torch.ones(9)}, store)
store.waiting.wait(30)
context = multiprocessing.get_context("fork")
numbers = context.Queue()
worker = context.Process(target=_work, args=(numbers,))
worker.start()
print(numbers.get(timeout=30))
begin = time.monotonic()
worker.join(20)
print(worker.exitcode, time.monotonic() - begin < 10)
loader = torch.utils.data.DataLoader(list(range(8)), num_workers=2)
print(sum(int(item) for item in loader), time.monotonic() - begin < 20)
store.gate.set()
print(pending.result().tensors)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.splitlines() == ["(499500, True)", "0 True", "28 True", "1"], done.stderr


ENDING = """
import atexit, sys, time, torch
import giantstep as gs
path, how = sys.argv[1:]
gs.async_save({"w": torch.zeros(4)}, path + "/first").result()
def last():
    if how == "blocking":
        gs.save({"w": torch.ones(1 << 20)}, path + "/last")
    else:
        gs.async_save({"w": torch.ones(4)}, path + "/last")
atexit.register(last)
"""


@pytest.mark.parametrize("how", ["blocking", "async"])
def test_functions_for_the_end_of_the_interpreter_can_save_and_are_told_if_not_in_the_background(
    tmp_path: Path, how: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDING, str(tmp_path), how], capture_output=True, text=True, timeout=60, check=False
    )
    if how == "blocking":
        assert gs.open_checkpoint(tmp_path / "last")["w"][...].sum() == 1 << 20, done.stderr
    else:
        assert "BadArgumentError" in done.stderr
        assert "the interpreter is ending" in done.stderr


def test_ctrl_c_at_the_end_is_a_failure_to_whoever_started_the_program(tmp_path: Path) -> None:
    script = """
import signal, sys, threading, time, torch
import giantstep as gs
import giantstep.saving
signal.signal(signal.SIGINT, signal.default_int_handler)
real = giantstep.saving.write
def write(*arguments):
    print("writing", flush=True)
    time.sleep(4)
    return real(*arguments)
giantstep.saving.write = write
gs.async_save({"w": torch.zeros(4)}, sys.argv[1])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=50)
    assert "not committed" in stderr
    assert process.returncode == 1


def test_errors_that_are_kept_keep_no_copies_of_the_state() -> None:
    store, kept, copies = SlowStore(), [], []
    real = saver_of(group_of()).memory.views

    def views(*arguments: Any) -> Any:
        found = real(*arguments)
        copies.extend(weakref.ref(copy) for copy in found)
        return found

    def fail(name: str) -> None:
        raise OSError(28, "No space left on device", name)

    store.fail = fail
    memory = saver_of(group_of()).memory
    memory.views = views  # type: ignore[method-assign]
    try:
        for _ in range(3):
            pending = gs.async_save({"w": torch.ones(1000)}, store, options=gs.SaveOptions(on_error="warn"))
            kept.append((pending, pending.exception()))
            gs.finish_saves()
    finally:
        del memory.views
    gc.collect()
    assert len(copies) == 3
    assert all(copy() is None for copy in copies)


def test_memory_is_used_again_also_where_little_is_allowed() -> None:
    store = SlowStore()
    state = {"w": torch.ones(1 << 16)}
    options = gs.SaveOptions(staging_bytes=(1 << 18) + 64)
    gs.finish_saves()
    arenas: set[int] = set()
    memory = saver_of(group_of()).memory
    for _ in range(5):
        gs.async_save(state, store, options=options).result()
        arenas |= {id(arena) for arena in memory.arenas(locked=False)._free}
    assert len(arenas) == 1
    gs.finish_saves()


def test_a_thread_that_cannot_be_started_takes_no_memory_along(monkeypatch: pytest.MonkeyPatch) -> None:
    gs.finish_saves()
    memory, store = saver_of(group_of()).memory, SlowStore()
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "giantstep-save":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for _ in range(3):
        pending = gs.async_save({"w": torch.ones(1000)}, store, options=gs.SaveOptions(on_error="warn"))
        assert "start new thread" in str(pending.exception())
        del pending
    gc.collect()
    assert memory.taken_bytes == 0


def test_keys_that_are_equal_without_being_the_same_are_told_apart() -> None:
    for keys in (((1,), (True,)), (0.0, -0.0)):
        for key in keys:
            store = SlowStore()
            gs.save({key: torch.ones(1)}, store)
            fresh = SlowStore()
            gs.save({key: torch.ones(1), "n": 1}, fresh)
            assert gs.open_checkpoint(store).keys() == gs.open_checkpoint(fresh).keys()


def test_an_optimizer_that_never_steps_keeps_no_handles() -> None:
    store = SlowStore()
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    handles = []
    for _ in range(10):
        pending = gs.async_save({"w": weight}, store).guard(optimizer)
        pending.result()
        handles.append(weakref.ref(pending))
    del pending
    gc.collect()
    assert sum(handle() is not None for handle in handles) <= 1


def test_the_collector_works_while_a_rank_waits_for_long() -> None:
    assert gc.isenabled()
    with uncollected():
        assert not gc.isenabled()
        with collected():
            assert gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected(), collected():
            assert not gc.isenabled(), "whoever has switched it off wants it off"
    finally:
        gc.enable()
