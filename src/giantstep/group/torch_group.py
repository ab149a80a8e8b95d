"""Ranks of torch.distributed, over gloo connections of our own beside the user's groups.

Reports and answers travel point to point between rank 0 and the others, so that rank 0 knows exactly whose message is
missing. gloo closes all connections of a group when one wait times out; therefore a helper thread waits, and the
calling thread watches the clock and a notice board (names in the key-value store that started torch.distributed), on
which whoever finds a fault tells the others. After a fault the connections are closed and the next call makes new ones.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import json
import re
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from giantstep.errors import (
    BadArgumentError,
    GiantstepError,
    PeerFailureError,
    PhaseTimeoutError,
    error_from_wire,
    error_to_wire,
)
from giantstep.group.base import Answer, Group, Parcel, Parts
from giantstep.group.rendezvous import meet, withdraw
from giantstep.group.single import SingleGroup

_FIRST_LOOK_SECS = 0.5
_LOOK_EVERY_SECS = 1.0
_CONFIRM_SECS = 1.0
_JOIN_SECS = 10.0
_MESSAGE_TAG, _CLOSING_TAG = 0, 1

# Our group for each of the user's, so that its connections are made once. Forgotten with the user's group.
_OURS: weakref.WeakKeyDictionary[Any, TorchGroup] = weakref.WeakKeyDictionary()
_OURS_LOCK = threading.Lock()


def group_of(process_group: Any = None) -> Group:
    """The group for a caller's `process_group`: None means the default group, or one process without any.

    A `Group` is returned as it is.
    """
    if process_group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return SingleGroup()
        process_group = dist.group.WORLD
    if not isinstance(process_group, dist.ProcessGroup):
        if all(hasattr(process_group, name) for name in ("rank", "size", "exchange", "withdraw")):
            found: Group = process_group
            return found
        raise BadArgumentError(
            f"process_group must be a torch.distributed.ProcessGroup, a giantstep Group or None, not "
            f"{type(process_group).__name__}; if this rank is not in the group, do not call from it"
        )
    with _OURS_LOCK:
        ours = _OURS.get(process_group)
        if ours is None:
            ours = _OURS[process_group] = TorchGroup(process_group)
    return ours


class TorchGroup:
    """A `Group` over the ranks of a `ProcessGroup`. Calls from several threads take turns."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        ranks = dist.get_process_group_ranks(process_group)
        self._size = len(ranks)
        self._rank = dist.get_rank(process_group)
        # Groups of the same ranks made in the same order share a name: all their ranks do, so they meet rightly.
        name = f"{process_group.group_name}/{'.'.join(map(str, ranks))}"
        self._store = c10d.PrefixStore(f"giantstep/{name}", c10d._get_default_store())
        self._turn = threading.RLock()
        self._gloo: Any = None
        self._board: Any = None
        self._waits: list[_Wait] = []

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def exchange(self, report: Parts, answer: Answer, phase: str, timeout_secs: float) -> Parts:
        if self._size == 1:
            return answer([report])[0]
        with self._turn:
            try:
                self._connect(phase, timeout_secs)
                return self._exchange(report, answer, phase, timeout_secs)
            except GiantstepError:
                self._close()
                raise
            except BaseException as error:
                # An interrupt in the middle of a message: the others cannot go on either.
                self._tell(PeerFailureError(f"{type(error).__name__} ended the call", rank=self._rank, phase=phase))
                self._close()
                raise

    def transfer(self, sends: Sequence[Parcel], receives: Sequence[Parcel], phase: str, timeout_secs: float) -> None:
        raise NotImplementedError

    def withdraw(self, error: GiantstepError) -> None:
        if self._size > 1:
            with self._turn:
                if self._gloo is None:
                    withdraw(self._store, self._rank, error)
                else:
                    self._tell(error)
                    self._close()

    def _exchange(self, report: Parts, answer: Answer, phase: str, timeout_secs: float) -> Parts:
        if self._rank == 0:
            answers = answer([_unframed(found) for found in self._collect(_framed(report), phase, timeout_secs)])
            for rank in range(1, self._size):
                # A rank that is lost now is found by the next exchange; the others must get their answers.
                with contextlib.suppress(PeerFailureError, PhaseTimeoutError):
                    self._send(_framed(answers[rank]), rank, phase, timeout_secs)
            return answers[0]
        # Rank 0 waits up to the timeout for the last report and then speaks, if only to name who is late; it may
        # not take this rank's report before.
        patience_secs = 2 * timeout_secs + 10 * _CONFIRM_SECS
        self._send(_framed(report), 0, phase, patience_secs)
        return _unframed(self._receive(0, phase, patience_secs))

    # Making and ending connections.

    def _connect(self, phase: str, timeout_secs: float) -> None:
        if self._gloo is not None:
            return
        place = meet(self._store, self._rank, self._size, phase, timeout_secs)
        self._board = c10d.PrefixStore(place, self._store)
        timeout = dt.timedelta(seconds=max(10.0, timeout_secs))
        try:
            self._gloo = dist.ProcessGroupGloo(self._board, self._rank, self._size, timeout)
        except RuntimeError as error:
            raise PeerFailureError(f"the ranks met but could not connect: {_cause(str(error))}", phase=phase) from error

    def _close(self) -> None:
        """End the connections, and with them the threads that still wait on them.

        A thread inside gloo when the interpreter exits would end the process with SIGABRT.
        """
        gloo, self._gloo = self._gloo, None
        waits, self._waits = self._waits, []
        if gloo is None:
            return
        # gloo's own way to end all pending waits: a wait of which it is told that it took too long closes everything.
        # A peer whose connection is broken already fails at once, without that effect; so the next one is tried.
        for peer in range(self._size):
            try:
                if peer != self._rank:
                    gloo.recv([_bytes(1)], peer, _CLOSING_TAG).wait(dt.timedelta(milliseconds=1))
            except RuntimeError as error:
                if "Timed out" in str(error):
                    break
        for wait in waits:
            wait.join(_JOIN_SECS)

    # Rank 0's side.

    def _collect(self, report: bytes, phase: str, timeout_secs: float) -> list[bytes]:
        deadline = time.monotonic() + timeout_secs
        others = range(1, self._size)
        sizes = {rank: torch.zeros(1, dtype=torch.int64, device="cpu") for rank in others}
        self._receive_all(sizes, phase, deadline, timeout_secs)
        data = {rank: _bytes(int(sizes[rank])) for rank in others}
        self._receive_all({rank: part for rank, part in data.items() if len(part)}, phase, deadline, timeout_secs)
        return [report, *(data[rank].numpy().tobytes() for rank in others)]

    def _receive_all(self, targets: dict[int, torch.Tensor], phase: str, deadline: float, timeout_secs: float) -> None:
        """Fill one tensor from each rank, or announce who did not send."""
        waits: dict[int, _Wait] = {}
        gone: dict[int, str] = {}
        for rank, target in targets.items():
            try:
                waits[rank] = self._wait_for(self._gloo.recv([target], rank, _MESSAGE_TAG), deadline)
            except RuntimeError as error:
                gone[rank] = str(error)
        for rank, wait in waits.items():
            # Once a rank is lost the rest is not waited for: it may itself be stuck behind the lost one.
            self._watch(wait, deadline if not gone else min(deadline, time.monotonic() + _CONFIRM_SECS))
            if wait.failure is not None:
                gone[rank] = wait.failure
        if gone:
            notice = self._notice()
            if notice is not None:
                raise notice
            first = min(gone)
            self._announce(
                PeerFailureError(
                    f"rank {_listed(gone)} is gone: its connection broke ({_cause(gone[first])}). "
                    "Look for its own error, or for a kill by the system (out of memory).",
                    rank=first,
                    phase=phase,
                )
            )
        late = [rank for rank, wait in waits.items() if not wait.finished]
        if late:
            self._announce(
                PhaseTimeoutError(
                    f"rank {_listed(late)} did not report within {timeout_secs:g} s. "
                    "Look at what it does, or raise timeout_secs.",
                    rank=late[0],
                    phase=phase,
                )
            )

    # Both sides.

    def _send(self, data: bytes, to: int, phase: str, patience_secs: float) -> None:
        deadline = time.monotonic() + patience_secs
        parts = [torch.tensor([len(data)], dtype=torch.int64, device="cpu")]
        if data:
            part = _bytes(len(data))
            part.numpy().data[:] = data
            parts.append(part)
        for part in parts:
            self._transfer(lambda part=part: self._gloo.send([part], to, _MESSAGE_TAG), to, phase, deadline)  # type: ignore[misc]

    def _receive(self, source: int, phase: str, patience_secs: float) -> bytes:
        deadline = time.monotonic() + patience_secs
        size = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._transfer(lambda: self._gloo.recv([size], source, _MESSAGE_TAG), source, phase, deadline)
        data = _bytes(int(size))
        if len(data):
            self._transfer(lambda: self._gloo.recv([data], source, _MESSAGE_TAG), source, phase, deadline)
        return data.numpy().tobytes()

    def _transfer(self, start: Callable[[], Any], other: int, phase: str, deadline: float) -> None:
        """Run one send or receive with `other` to its end, watching clock and notice board."""
        try:
            wait = self._wait_for(start(), deadline)
        except RuntimeError as error:
            raise self._lost(other, phase, str(error)) from error
        self._watch(wait, deadline)
        if wait.failure is not None:
            raise self._lost(other, phase, wait.failure)
        if not wait.finished:
            raise self._notice() or PhaseTimeoutError(f"rank {other} did not answer in time", rank=other, phase=phase)

    def _wait_for(self, work: Any, deadline: float) -> _Wait:
        """A wait that `_close` knows of."""
        self._waits = [wait for wait in self._waits if not wait.finished]
        # gloo gets a little longer than our own clock, so that the fault is announced before connections close.
        wait = _Wait(work, max(0.0, deadline - time.monotonic()) + 30 * _CONFIRM_SECS)
        self._waits.append(wait)
        return wait

    def _watch(self, wait: _Wait, deadline: float) -> None:
        """Return when the transfer ended or the deadline passed; raise what the notice board says meanwhile."""
        wait.until(min(deadline, time.monotonic() + _FIRST_LOOK_SECS))
        while not wait.finished and time.monotonic() < deadline:
            notice = self._notice()
            if notice is not None:
                raise notice
            wait.until(min(deadline, time.monotonic() + _LOOK_EVERY_SECS))

    def _lost(self, other: int, phase: str, why: str) -> GiantstepError:
        """The error for a broken connection: what the notice board says, else that `other` is gone."""
        deadline = time.monotonic() + 2 * _CONFIRM_SECS
        while time.monotonic() < deadline:
            notice = self._notice()
            if notice is not None:
                return notice
            time.sleep(0.1)
        return PeerFailureError(f"rank {other} is gone: its connection broke ({_cause(why)})", rank=other, phase=phase)

    # The notice board.

    def _tell(self, error: GiantstepError) -> None:
        if self._board is not None:
            with contextlib.suppress(RuntimeError):
                self._board.set("fault", json.dumps(error_to_wire(error)))

    def _announce(self, error: GiantstepError) -> None:
        """Tell everybody, then raise."""
        self._tell(error)
        raise error

    def _notice(self) -> GiantstepError | None:
        try:
            if not self._board.check(["fault"]):
                return None
            wire = json.loads(self._board.get("fault"))
        except RuntimeError:
            # The board is gone with its host: the connections will tell.
            return None
        notice = error_from_wire(wire)
        # Whoever put it up has no traceback that would help here.
        notice.__notes__ = []
        return notice


class _Wait:
    """A thread that waits for one transfer, so that the caller can stop waiting without closing the group."""

    def __init__(self, work: Any, patience_secs: float) -> None:
        self.failure: str | None = None
        self.finished = False
        self._done = threading.Event()
        self._work = work
        self._patience = dt.timedelta(seconds=patience_secs)
        self._thread = threading.Thread(target=self._run, name="giantstep-wait", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work.wait(self._patience)
        except RuntimeError as error:
            self.failure = str(error) or "connection lost"
        self._work = None
        self.finished = True
        self._done.set()

    def join(self, patience_secs: float) -> None:
        """Return when the thread ended, or its patience did."""
        self._thread.join(patience_secs)

    def until(self, deadline: float) -> None:
        """Return when the transfer ended or the deadline passed."""
        self._done.wait(max(0.0, deadline - time.monotonic()))


def _framed(parts: Parts) -> bytes:
    return b"".join((len(parts).to_bytes(4, "little"), *(len(part).to_bytes(8, "little") for part in parts), *parts))


def _unframed(data: bytes) -> Parts:
    count = int.from_bytes(data[:4], "little")
    ends = list(
        itertools.accumulate(
            (int.from_bytes(data[4 + 8 * i : 12 + 8 * i], "little") for i in range(count)), initial=4 + 8 * count
        )
    )
    return tuple(data[start:stop] for start, stop in itertools.pairwise(ends))


def _bytes(count: int) -> torch.Tensor:
    # Always on the CPU, whatever the caller's default device is.
    return torch.empty(count, dtype=torch.uint8, device="cpu")


def _cause(message: str) -> str:
    """A message of gloo's without its source file and advice."""
    return re.sub(r"^\[[^\]]*\] *", "", message.splitlines()[0] if message else "").split(". ")[0]


def _listed(ranks: Any) -> str:
    found = sorted(ranks)
    return ", ".join(map(str, found[:20])) + (f" and {len(found) - 20} more" if len(found) > 20 else "")
