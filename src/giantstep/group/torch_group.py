"""Ranks of torch.distributed, over a gloo group of our own beside the user's.

Reports and answers travel point to point between rank 0 and the others, so that rank 0 knows exactly whose
message is missing. gloo closes every connection of a group when one wait times out; therefore waits have no
timeout of gloo's: a helper thread waits, and the calling thread watches the clock and a notice board (the
key-value store that started torch.distributed), on which whoever finds a fault tells the others. After a
fault the group is not used again; the next call makes a new one.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import re
import threading
import time
import weakref
from collections.abc import Callable
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
from giantstep.group.base import Answer, Group
from giantstep.group.single import SingleGroup

# What gloo is told to wait: for ever, as far as we are concerned. Our own clock ends every wait.
_GLOO_PATIENCE = dt.timedelta(days=7)
_FIRST_LOOK_SECS = 0.5
_LOOK_EVERY_SECS = 1.0
_CONFIRM_SECS = 1.0
_JOIN_SECS = 5.0

# Our group for each of the user's, so that its connections are made once. Forgotten with the user's group.
_OURS: weakref.WeakKeyDictionary[Any, TorchGroup] = weakref.WeakKeyDictionary()


def group_of(process_group: Any = None) -> Group:
    """The group for a caller's `process_group`: None means the default group, or one process without any.

    A `Group` is returned as it is.
    """
    if process_group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return SingleGroup()
        process_group = dist.group.WORLD
    if not isinstance(process_group, dist.ProcessGroup):
        if all(hasattr(process_group, name) for name in ("rank", "size", "exchange")):
            found: Group = process_group
            return found
        raise BadArgumentError(
            f"process_group must be a torch.distributed.ProcessGroup, a giantstep Group or None, not "
            f"{type(process_group).__name__}; if this rank is not in the group, do not call from it"
        )
    ours = _OURS.get(process_group)
    if ours is None:
        ours = _OURS[process_group] = TorchGroup(process_group)
    return ours


class TorchGroup:
    """A `Group` over the ranks of a `ProcessGroup`."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self._ranks = dist.get_process_group_ranks(process_group)
        self._rank = dist.get_rank(process_group)
        self._gloo: Any = None
        self._waits: list[_Wait] = []
        self._generation = 0

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._ranks)

    def exchange(self, report: bytes, answer: Answer, phase: str, timeout_secs: float) -> bytes:
        if self.size == 1:
            return bytes(answer([report])[0])
        try:
            self._connect(phase, timeout_secs)
            if self._rank == 0:
                answers = answer(self._collect(report, phase, timeout_secs))
                self._distribute(answers, phase, timeout_secs)
                return bytes(answers[0])
            # Rank 0 waits up to the timeout for the last report and then speaks, if only to name who is late; it may
            # not take this rank's report before.
            patience_secs = 2 * timeout_secs + 10 * _CONFIRM_SECS
            self._send(report, 0, phase, patience_secs)
            return self._receive(0, phase, patience_secs)
        except GiantstepError:
            self._abandon()
            raise

    def _connect(self, phase: str, timeout_secs: float) -> None:
        if self._gloo is not None:
            return
        self._generation += 1
        # Our own prefix keeps the notices of one group and generation apart from all others.
        prefix = (
            f"giantstep/{'.'.join(map(str, self._ranks[:2]))}.{len(self._ranks)}.{hash(tuple(self._ranks))}/{self._generation}"
        )
        self._board = c10d.PrefixStore(prefix, c10d._get_default_store())
        try:
            self._gloo = dist.new_group(
                self._ranks,
                backend="gloo",
                timeout=dt.timedelta(seconds=timeout_secs),
                use_local_synchronization=True,
            )
        except (RuntimeError, ValueError) as error:
            raise PeerFailureError(f"no gloo group could be made: {error}", phase=phase) from error

    def _abandon(self) -> None:
        """Give up the connections, and end the threads that still wait on them.

        A thread inside gloo when the interpreter exits would end the process with SIGABRT.
        """
        gloo, self._gloo = self._gloo, None
        abort = getattr(gloo, "abort", None)
        if abort is not None:
            with contextlib.suppress(RuntimeError):
                abort()
        waits, self._waits = self._waits, []
        for wait in waits:
            wait.join(_JOIN_SECS)

    # Rank 0's side.

    def _collect(self, report: bytes, phase: str, timeout_secs: float) -> list[bytes]:
        deadline = time.monotonic() + timeout_secs
        others = range(1, self.size)
        sizes = {rank: torch.zeros(1, dtype=torch.int64) for rank in others}
        self._receive_all(sizes, phase, deadline, timeout_secs)
        data = {rank: torch.empty(int(sizes[rank]), dtype=torch.uint8) for rank in others}
        self._receive_all({rank: part for rank, part in data.items() if len(part)}, phase, deadline, timeout_secs)
        return [report, *(data[rank].numpy().tobytes() for rank in others)]

    def _receive_all(self, targets: dict[int, torch.Tensor], phase: str, deadline: float, timeout_secs: float) -> None:
        """Fill one tensor from each rank, or announce who did not send."""
        waits: dict[int, _Wait] = {}
        gone: dict[int, str] = {}
        for rank, target in targets.items():
            try:
                work = dist.irecv(target, src=self._ranks[rank], group=self._gloo)
                waits[rank] = self._wait_for(work)
            except RuntimeError as error:
                gone[rank] = str(error)
        for rank, wait in waits.items():
            # Once a rank is lost the rest is not waited for: it may itself be stuck behind the lost one.
            limit = deadline if not gone else min(deadline, time.monotonic() + _CONFIRM_SECS)
            wait.until(limit)
            if wait.failure is not None:
                gone[rank] = wait.failure
        if gone:
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

    def _distribute(self, answers: Any, phase: str, timeout_secs: float) -> None:
        for rank in range(1, self.size):
            # A rank that is lost now is found by the next exchange; the others must get their answers.
            with contextlib.suppress(PeerFailureError, PhaseTimeoutError):
                self._send(bytes(answers[rank]), rank, phase, timeout_secs)

    # Both sides.

    def _wait_for(self, work: Any) -> _Wait:
        """A wait that `_abandon` knows of."""
        self._waits = [wait for wait in self._waits if not wait.finished]
        wait = _Wait(work)
        self._waits.append(wait)
        return wait

    def _send(self, data: bytes, to: int, phase: str, timeout_secs: float) -> None:
        deadline = time.monotonic() + timeout_secs
        parts = [torch.tensor([len(data)], dtype=torch.int64)]
        if data:
            parts.append(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        for part in parts:
            self._transfer(lambda part=part: dist.isend(part, dst=self._ranks[to], group=self._gloo), to, phase, deadline)  # type: ignore[misc]

    def _receive(self, source: int, phase: str, patience_secs: float) -> bytes:
        deadline = time.monotonic() + patience_secs
        size = torch.zeros(1, dtype=torch.int64)
        self._transfer(lambda: dist.irecv(size, src=self._ranks[source], group=self._gloo), source, phase, deadline)
        data = torch.empty(int(size), dtype=torch.uint8)
        if len(data):
            self._transfer(lambda: dist.irecv(data, src=self._ranks[source], group=self._gloo), source, phase, deadline)
        return data.numpy().tobytes()

    def _transfer(self, start: Callable[[], Any], other: int, phase: str, deadline: float) -> None:
        """Run one send or receive with `other` to its end, watching clock and notice board."""
        try:
            wait = self._wait_for(start())
        except RuntimeError as error:
            raise self._lost(other, phase, str(error)) from error
        wait.until(min(deadline, time.monotonic() + _FIRST_LOOK_SECS))
        while not wait.finished and time.monotonic() < deadline:
            notice = self._notice()
            if notice is not None:
                raise notice
            wait.until(min(deadline, time.monotonic() + _LOOK_EVERY_SECS))
        if wait.failure is not None:
            raise self._lost(other, phase, wait.failure)
        if not wait.finished:
            raise self._notice() or PhaseTimeoutError(f"rank {other} did not answer in time", rank=other, phase=phase)

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

    def _announce(self, error: GiantstepError) -> None:
        """Tell everybody, then raise."""
        with contextlib.suppress(RuntimeError):
            self._board.set("fault", json.dumps(error_to_wire(error)))
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

    def __init__(self, work: Any) -> None:
        self.failure: str | None = None
        self.finished = False
        self._done = threading.Event()
        self._work = work
        self._thread = threading.Thread(target=self._run, name="giantstep-wait", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work.wait(_GLOO_PATIENCE)
        except RuntimeError as error:
            self.failure = str(error) or "connection lost"
        self.finished = True
        self._done.set()

    def join(self, patience_secs: float) -> None:
        """Return when the thread ended, or its patience did."""
        self._thread.join(patience_secs)

    def until(self, deadline: float) -> None:
        """Return when the transfer ended or the deadline passed."""
        self._done.wait(max(0.0, deadline - time.monotonic()))


def _cause(message: str) -> str:
    """A message of gloo's without its source file and advice."""
    return re.sub(r"^\[[^\]]*\] *", "", message.splitlines()[0]).split(". ")[0]


def _listed(ranks: Any) -> str:
    found = sorted(ranks)
    return ", ".join(map(str, found[:20])) + (f" and {len(found) - 20} more" if len(found) > 20 else "")
