"""Asynchronous saves in which something fails, is cancelled, interrupted or comes to its end too early."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import giantstep as gs
import giantstep.async_saving
import giantstep.saving
from giantstep.errors import CancelledError, GiantstepError, PeerFailureError, PhaseTimeoutError, StoreError
from giantstep.group.threads import ThreadGroup
from giantstep.group.torch_group import group_of
from giantstep.saver import Saver, saver_of
from giantstep.storage.memory import _MEDIA
from giantstep.testing.ranks import run_ranks, run_ranks_collecting
from processes import DIED, results, run_processes
from slow_store import GatedStore, SlowStore

RANKS = 3


def state_of(rank: int, step: int = 1) -> dict[str, Any]:
    part = torch.full((50, 4), float(step))
    return {
        "w": gs.ShardedTensor.from_rank_offsets("w", part, (0, rank, RANKS)),
        "b": torch.full((9,), float(step)),
        "step": step,
    }


def broken(code: int) -> Any:
    """Makes the writer of rank 1 fail."""

    def fail(name: str) -> None:
        if "r00001" in name:
            raise OSError(code, os.strerror(code))

    return fail


def value_at(store: Any) -> int:
    return int(gs.open_checkpoint(store).common["step"])


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failing_writer_is_the_same_error_on_all_ranks_and_the_checkpoint_before_stays(code: int) -> None:
    store = SlowStore()

    def run(group: ThreadGroup) -> str:
        gs.async_save(state_of(group.rank), store, process_group=group).result()
        if group.rank == 0:
            store.fail = broken(code)
        pending = gs.async_save(state_of(group.rank, 2), store, process_group=group)
        with pytest.raises(StoreError) as caught:
            pending.result()
        assert pending.exception() is caught.value
        assert pending.done()
        assert "failed" in repr(pending)
        return str(caught.value)

    (message,) = set(run_ranks(RANKS, run))
    assert message.startswith("[rank 1, phase write] ")
    assert os.strerror(code) in message
    assert value_at(store) == 1
    # What the others wrote of it is gone: one file per rank and an index for the checkpoint in force, and its record.
    assert len(_MEDIA[store.location.removeprefix("memory://")]) == RANKS + 2


def test_a_failure_that_nobody_asked_about_is_raised_by_the_next_save_which_is_not_begun() -> None:
    store = SlowStore()

    def run(group: ThreadGroup) -> tuple[str, str]:
        if group.rank == 0:
            store.fail = broken(errno.EIO)
        first = gs.async_save(state_of(group.rank), store, process_group=group)
        if group.rank == 2:
            # One rank knows already; the others must raise all the same.
            first.exception()
        with pytest.raises(StoreError) as caught:
            gs.async_save(state_of(group.rank, 2), store, process_group=group)
        store.fail = lambda name: None
        gs.async_save(state_of(group.rank, 3), store, process_group=group).result()
        gs.async_save(state_of(group.rank, 4), store, process_group=group).result()
        return str(caught.value), caught.value.__notes__[-1]

    ((message, note),) = set(run_ranks(RANKS, run))
    assert message.startswith("[rank 1, phase write] ")
    assert store.location in note
    assert "was not begun" in note
    assert value_at(store) == 4


def test_a_failure_is_raised_on_all_ranks_also_if_only_one_has_heard_of_it_so_far() -> None:
    """The other ranks' threads still write when the next save is called."""
    store, gated = SlowStore(), GatedStore()

    def run(group: ThreadGroup) -> str:
        options = gs.SaveOptions(max_pending=4)
        if group.rank == 0:
            store.fail = broken(errno.EIO)
        gs.async_save(state_of(group.rank), store, process_group=group, options=options)
        behind = gs.async_save(state_of(group.rank, 2), gated, process_group=group, options=options)
        gated.waiting.wait(30)
        with pytest.raises(StoreError) as caught:
            gs.async_save(state_of(group.rank, 3), store, process_group=group, options=options)
        gated.gate.set()
        assert behind.result().objects == 1
        return str(caught.value)

    assert len(set(run_ranks(RANKS, run))) == 1
    assert value_at(gated) == 2


def test_with_warn_training_goes_on_and_the_checkpoint_before_stays_the_latest(caplog: pytest.LogCaptureFixture) -> None:
    store = SlowStore()
    options = gs.SaveOptions(on_error="warn")

    def run(group: ThreadGroup) -> None:
        gs.async_save(state_of(group.rank), store, process_group=group, options=options).result()
        if group.rank == 0:
            store.fail = broken(errno.ENOSPC)
        gs.async_save(state_of(group.rank, 2), store, process_group=group, options=options)
        saver_of(group).wait(30)
        if group.rank == 0:
            assert value_at(store) == 1
            store.fail = lambda name: None
        gs.async_save(state_of(group.rank, 3), store, process_group=group, options=options).result()

    with caplog.at_level(logging.WARNING, "giantstep"):
        run_ranks(RANKS, run)
    assert value_at(store) == 3
    assert any("No space left" in record.message and "stays the latest" in record.message for record in caplog.records)


def test_finish_saves_waits_for_all_and_raises_what_nobody_was_told() -> None:
    store = SlowStore(0.05)
    store.fail = lambda name: (_ for _ in ()).throw(OSError(errno.EIO, "gone"))
    pending = gs.async_save({"w": torch.ones(3)}, store)
    with pytest.raises(StoreError, match="gone"):
        gs.finish_saves()
    assert pending.done()
    gs.finish_saves()


@pytest.mark.parametrize("when", ["queued", "writing"])
def test_one_rank_cancels_and_nobody_commits(when: str) -> None:
    first, second = GatedStore(), SlowStore()
    options = gs.SaveOptions(max_pending=2)

    def run(group: ThreadGroup) -> str:
        pending = gs.async_save(state_of(group.rank), first, process_group=group, options=options)
        if when == "queued":
            pending = gs.async_save(state_of(group.rank), second, process_group=group, options=options)
        else:
            first.waiting.wait(30)
        if group.rank == 2:
            assert pending.cancel()
            first.gate.set()
        with pytest.raises(CancelledError) as caught:
            pending.result()
        assert not pending.cancel()
        # Nothing is left of it for the next save.
        gs.async_save(state_of(group.rank, 7), second, process_group=group, options=options).result()
        return str(caught.value)

    ((message),) = set(run_ranks(RANKS, run))
    assert "rank 2" in message
    assert value_at(second) == 7
    if when == "writing":
        assert _MEDIA[first.location.removeprefix("memory://")] == {}


class _CancellingStore(SlowStore):
    """Cancels a save when a data file has got its third write; counts the bytes that are written."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: gs.PendingSave | None = None
        self.begun = threading.Event()
        self.writes = 0

    def create(self, name: str, size: int, *, direct: bool) -> Any:
        handle = super().create(name, size, direct=direct)
        real = handle.write_parts

        def write_parts(offset: int, parts: Any) -> None:
            self.begun.wait(30)
            real(offset, parts)
            self.writes += 1
            if self.writes == 3 and self.pending is not None:
                self.pending.cancel()

        handle.write_parts = write_parts
        return handle


def test_a_save_that_is_cancelled_while_it_writes_stops_writing() -> None:
    store = _CancellingStore()
    options = gs.SaveOptions(block_bytes=4096, buffer_bytes=4096, writer_threads=1)
    store.pending = gs.async_save({"w": torch.ones(1 << 18)}, store, options=options)
    store.begun.set()
    with pytest.raises(CancelledError):
        store.pending.result()
    assert 3 <= store.writes < 20
    assert _MEDIA[store.location.removeprefix("memory://")] == {}
    gs.finish_saves()


def test_a_cancelled_save_is_no_failure_for_the_next_one_to_tell_of() -> None:
    gated, store = GatedStore(), SlowStore()
    options = gs.SaveOptions(max_pending=3, staging="background")
    gs.async_save({"w": torch.ones(3)}, gated, options=options)
    changed = torch.ones(3)
    cancelled = gs.async_save({"w": changed}, store, options=options)
    cancelled.cancel()
    changed.add_(1)
    gated.gate.set()
    assert saver_of(group_of()).wait(30)
    gs.async_save({"w": torch.ones(3), "step": 3}, store, options=options).result()
    assert isinstance(cancelled.exception(), CancelledError)
    gs.finish_saves()
    assert value_at(store) == 3


@pytest.mark.parametrize("after", ["the agreement", "the agreement is taken note of"])
def test_a_rank_that_is_interrupted_before_it_hands_off_never_mixes_two_saves(
    after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, interrupted = SlowStore(), threading.Event()
    owner, name = (
        (Saver, "submit") if after == "the agreement is taken note of" else (giantstep.async_saving._AsyncSave, "_agree")
    )
    real = getattr(owner, name)

    def interrupting(self: Any, *arguments: Any, **settings: Any) -> Any:
        hit = threading.current_thread().name == "rank-2" and not interrupted.is_set()
        if owner is Saver and hit:
            interrupted.set()
            raise KeyboardInterrupt
        found = real(self, *arguments, **settings)
        if hit:
            interrupted.set()
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(owner, name, interrupting)
    options = gs.SaveOptions(max_pending=4, on_error="warn")

    def run(group: ThreadGroup) -> list[str]:
        pending = []
        for step in range(3):
            try:
                pending.append(gs.async_save(state_of(group.rank, step), store, process_group=group, options=options))
            except KeyboardInterrupt:
                continue
        return [str(found.exception(60)) for found in pending]

    first, second, third = run_ranks(RANKS, run)
    assert third == ["None", "None"]
    assert first == second
    assert first[1:] == third
    expected = "KeyboardInterrupt ended the call" if after == "the agreement" else "rank 2 has no part in this save"
    assert first[0].startswith(f"[rank 2, phase describe] {expected}")
    assert set(gs.open_checkpoint(store)["w"][...].reshape(-1).tolist()) == {2.0}


def test_an_interrupt_while_a_call_waits_for_earlier_saves_is_told_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    gated, store = GatedStore(), SlowStore()
    real = Saver.wait_for

    def wait_for(self: Any, ready: Any) -> None:
        if threading.current_thread().name == "rank-1" and self._jobs and not gated.gate.is_set():
            gated.gate.set()
            raise KeyboardInterrupt
        real(self, ready)

    monkeypatch.setattr(Saver, "wait_for", wait_for)

    def run(group: ThreadGroup) -> str:
        gs.async_save(state_of(group.rank), gated, process_group=group)
        try:
            gs.async_save(state_of(group.rank, 2), store, process_group=group)
        except KeyboardInterrupt:
            told = "interrupted"
        except PeerFailureError as error:
            told = str(error)
        gs.async_save(state_of(group.rank, 3), store, process_group=group).result()
        return told

    found = run_ranks(RANKS, run)
    assert found.pop(1) == "interrupted"
    assert set(found) == {"[rank 1, phase describe] KeyboardInterrupt ended the call"}
    assert value_at(gated) == 1
    assert value_at(store) == 3


def test_a_process_that_can_start_no_thread_fails_the_save_on_all_ranks_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    store, refused = SlowStore(), threading.Event()
    real = threading.Thread.start

    def start(self: threading.Thread) -> None:
        if self.name == "giantstep-save" and threading.current_thread().name == "rank-1" and not refused.is_set():
            refused.set()
            raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)

    def run(group: ThreadGroup) -> str:
        error = gs.async_save(state_of(group.rank), store, process_group=group).exception(60)
        gs.async_save(state_of(group.rank, 2), store, process_group=group).result()
        return str(error)

    (message,) = set(run_ranks(RANKS, run))
    assert message.startswith("[rank 1, phase stage] ")
    assert "can't start new thread" in message
    assert value_at(store) == 2


def test_to_cancel_a_save_that_is_committed_does_nothing() -> None:
    store = SlowStore()
    pending = gs.async_save({"w": torch.ones(3), "step": 1}, store)
    pending.result()
    assert not pending.cancel()
    assert pending.result().tensors == 1
    assert value_at(store) == 1


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_a_rank_that_cannot_copy_fails_the_save_on_all_ranks_and_the_next_one_works(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SlowStore()
    real, broken_once = torch._foreach_copy_, threading.Event()

    def copy(copies: Any, tensors: Any) -> None:
        if threading.current_thread().name == "rank-1" and not broken_once.is_set():
            broken_once.set()
            raise kind("no more")
        real(copies, tensors)

    monkeypatch.setattr(torch, "_foreach_copy_", copy)

    def run(group: ThreadGroup) -> str:
        told = ""
        try:
            told = str(gs.async_save(state_of(group.rank), store, process_group=group).exception())
        except KeyboardInterrupt:
            told = "interrupted"
            # The failed save has not been asked about on this rank, so it would be told of by the next one.
            saver_of(group).wait(30)
        with_failure = 0
        try:
            gs.async_save(state_of(group.rank, 2), store, process_group=group).result()
        except GiantstepError:
            with_failure = 1
            gs.async_save(state_of(group.rank, 2), store, process_group=group).result()
        return f"{with_failure} {told}"

    found = run_ranks(RANKS, run)
    if kind is KeyboardInterrupt:
        assert found.pop(1) == "1 interrupted"
        assert set(found) == {"1 [rank 1, phase stage] KeyboardInterrupt ended the call"}
    else:
        assert set(found) == {"0 [rank 1, phase stage] MemoryError: no more"}
    assert value_at(store) == 2


def test_a_rank_that_does_not_call_is_named_in_time() -> None:
    store = SlowStore()

    def run(group: ThreadGroup) -> None:
        if group.rank == 1:
            time.sleep(3)
            return
        gs.async_save(state_of(group.rank), store, process_group=group, options=gs.SaveOptions(timeout_secs=0.5))

    _, errors = run_ranks_collecting(RANKS, run)
    assert errors[1] is None
    assert all(isinstance(errors[rank], PhaseTimeoutError) and errors[rank].rank == 1 for rank in (0, 2))


# Whole processes.


def _die_in_the_background(rank: int, path: str, what: str) -> tuple[str, str]:
    """Save once; then rank 2's writer dies or sleeps, while all main threads go on."""

    options = gs.SaveOptions(timeout_secs=3.0 if what == "sleep" else 60.0)
    gs.async_save(state_of(rank), path, options=options).result()
    real = giantstep.saving.write

    def write(*arguments: Any) -> Any:
        if rank == 2:
            if what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(8)
        return real(*arguments)

    giantstep.saving.write = write
    pending = gs.async_save(state_of(rank, 2), path, options=options)
    begin = time.monotonic()
    error = pending.exception(timeout=50)
    assert time.monotonic() - begin < 40
    return type(error).__name__, str(error)


@pytest.mark.parametrize("what", ["die", "sleep"])
def test_a_rank_that_dies_or_sleeps_in_the_background_is_named_by_all_others(tmp_path: Path, what: str) -> None:
    found = run_processes(RANKS, _die_in_the_background, str(tmp_path), what)
    last = found.pop(2)
    ((kind, message),) = set(results(found))
    if what == "die":
        assert last == (DIED, -signal.SIGKILL)
        assert kind == PeerFailureError.__name__
    else:
        assert kind == PhaseTimeoutError.__name__
    assert message.startswith("[rank 2, phase write] rank 2 ")
    assert value_at(tmp_path) == 1


def _leave(rank: int, path: str, how: str) -> str:
    """Begin a save and leave; `how` says how."""
    pending = gs.async_save(state_of(rank, 5), path)
    if how == "destroy first":
        dist.destroy_process_group()
        gs.finish_saves(timeout=60)
        return str(pending.done())
    if how == "destroy and wait on the handle":
        dist.destroy_process_group()
        return str(pending.result(timeout=60).objects == 1)
    return "left"


@pytest.mark.parametrize("how", ["destroy first", "destroy and wait on the handle", "just leave"])
@pytest.mark.parametrize("tcp", [False, True])
def test_a_save_in_flight_is_committed_when_ranks_leave(tmp_path: Path, how: str, tcp: bool) -> None:
    found = results(run_processes(RANKS, _leave, str(tmp_path), how, tcp=tcp))
    assert set(found) <= {"True", "left"}
    assert value_at(tmp_path) == 5


SCRIPT = """
import sys, time, torch
import giantstep as gs
from giantstep.storage.local import LocalStore
path, ending = sys.argv[1:]

class Slow(LocalStore):
    def create(self, name, size, *, direct):
        if name.startswith("data/"):
            print("writing", flush=True)
            time.sleep(1)
            if ending == "failing":
                raise OSError(5, "the disk is gone")
        return super().create(name, size, direct=direct)

import atexit
atexit.register(lambda: print("atexit of the user ran once"))
pending = gs.async_save({"w": torch.arange(1000.0), "step": 9}, Slow(path))
if ending == "exception":
    raise RuntimeError("training went wrong")
if ending == "sys.exit":
    sys.exit(3)
if ending == "closed":
    gs.finish_saves()
    gs.finish_saves()
"""


@pytest.mark.parametrize(("ending", "code"), [("plain", 0), ("exception", 1), ("sys.exit", 3), ("closed", 0)])
def test_the_end_of_the_interpreter_waits_for_the_save_in_flight(tmp_path: Path, ending: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), ending], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    assert value_at(tmp_path) == 9
    assert ("training went wrong" in done.stderr) == (ending == "exception")


def test_a_failure_that_nobody_was_told_is_logged_at_the_end_of_the_interpreter(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "failing"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "an asynchronous save failed: [rank 0, phase write]" in done.stderr
    assert "atexit of the user ran once" in done.stdout
    assert "the disk is gone" in done.stderr


def test_ctrl_c_while_the_end_waits_leaves_at_once_and_the_checkpoint_before_in_force(tmp_path: Path) -> None:
    gs.save({"w": torch.zeros(1000), "step": 1}, tmp_path)
    script = SCRIPT.replace("time.sleep(1)", "time.sleep(60)").replace("import sys", "import signal, sys", 1)
    script = script.replace("pending =", "signal.signal(signal.SIGINT, signal.default_int_handler)\npending =")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), "plain"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    time.sleep(0.5)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=50)
    assert time.monotonic() - begin < 40
    assert "not committed" in stderr
    assert value_at(tmp_path) == 1


def _one_sleeps_over_several_saves(rank: int, path: str) -> list[str]:
    """Rank 2's writer sleeps in the second save for longer than the others wait for it in that and in the next."""

    real, written = giantstep.saving.write, 0

    def write(*arguments: Any) -> Any:
        nonlocal written
        written += 1
        if (rank, written) == (2, 2):
            time.sleep(16)
        return real(*arguments)

    giantstep.saving.write = write
    options = gs.SaveOptions(timeout_secs=3.0, max_pending=8, on_error="warn")
    pending = []
    for step in range(6):
        pending.append(gs.async_save(state_of(rank, step), path, options=options))
        dist.barrier()
    return [str(found.exception(90)) for found in pending]


def test_a_rank_that_is_late_by_a_whole_save_does_not_put_it_together_with_the_next_one_of_the_others(tmp_path: Path) -> None:
    told = results(run_processes(RANKS, _one_sleeps_over_several_saves, str(tmp_path)))
    # All fail or succeed together, save by save, and they find each other again.
    assert len({tuple(message == "None" for message in messages) for messages in told}) == 1
    assert told[0][0] == told[0][-1] == "None"
    assert all(message == "None" or "did not report" in message for message in told[0])
    assert sum(message != "None" for message in told[0]) >= 2
    stored = gs.open_checkpoint(tmp_path)["w"][...]
    assert set(stored.reshape(-1).tolist()) == {5.0}


def test_an_agreement_of_which_one_rank_does_not_hear_is_no_save_for_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is lost on one rank after rank 0 has decided and others have begun."""
    store, lost = SlowStore(), threading.Event()
    real = giantstep.async_saving.consult_parts

    def consult_parts(group: Any, phase: str, *arguments: Any) -> Any:
        answer = real(group, phase, *arguments)
        if group.rank == 2 and not lost.is_set():
            lost.set()
            raise PeerFailureError("the connection broke", rank=0, phase=phase)
        return answer

    monkeypatch.setattr(giantstep.async_saving, "consult_parts", consult_parts)

    def run(group: ThreadGroup) -> str:
        try:
            error = gs.async_save(state_of(group.rank), store, process_group=group).exception(60)
        except PeerFailureError as fault:
            error = fault
        gs.async_save(state_of(group.rank, 2), store, process_group=group).result()
        return str(error)

    assert set(run_ranks(RANKS, run)) == {"[rank 0, phase describe] the connection broke"}
    assert value_at(store) == 2
