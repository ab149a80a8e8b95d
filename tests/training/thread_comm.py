"""Collectives between ranks that are threads, with the same order of additions every time, for small training runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from giantstep.group.threads import ThreadGroup, ThreadGroups

_PATIENCE_SECS = 60


class Hall:
    """Where the threads of one run meet. A rank that fails breaks all meetings, so that nobody waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rooms: dict[tuple[int, ...], _Room] = {}
        self._pipes: dict[tuple[int, int, str], queue.SimpleQueue[torch.Tensor]] = {}

    def room(self, members: tuple[int, ...]) -> _Room:
        with self._lock:
            return self._rooms.setdefault(members, _Room(len(members)))

    def pipe(self, sender: int, receiver: int, what: str) -> queue.SimpleQueue[torch.Tensor]:
        with self._lock:
            return self._pipes.setdefault((sender, receiver, what), queue.SimpleQueue())

    def close(self) -> None:
        with self._lock:
            for room in self._rooms.values():
                room.barrier.abort()


class _Room:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=_PATIENCE_SECS)
        self.slots: list[Any] = [None] * size


class Comm:
    """Some ranks, as one of them sees them.

    Attributes:
        rank, size: within these ranks.
    """

    def __init__(self, hall: Hall, members: Sequence[int], me: int) -> None:
        self._hall, self._members = hall, tuple(members)
        self._room = hall.room(self._members)
        self.rank, self.size = self._members.index(me), len(self._members)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's values, in order of rank."""
        if self.size == 1:
            return [value]
        self._room.slots[self.rank] = value
        self._room.barrier.wait()
        found = list(self._room.slots)
        self._room.barrier.wait()
        return found

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, added in order of rank."""
        first, *others = self.gather(tensor.detach())
        total = first.clone()
        for other in others:
            total += other
        # Nobody changes what others still read.
        self.gather(None)
        return total

    def send(self, tensor: torch.Tensor, to: int, what: str) -> None:
        self._hall.pipe(self._members[self.rank], self._members[to], what).put(tensor.detach().clone())

    def receive(self, source: int, what: str) -> torch.Tensor:
        return self._hall.pipe(self._members[source], self._members[self.rank], what).get(timeout=_PATIENCE_SECS)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, comm: Comm) -> torch.Tensor:
        ctx.comm = comm
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return ctx.comm.sum(gradients[0]), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, comm: Comm) -> torch.Tensor:
        return comm.sum(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None


def enter(tensor: torch.Tensor, comm: Comm) -> torch.Tensor:
    """Before a computation that each rank does a part of: gradients are summed on the way back."""
    result: torch.Tensor = _Enter.apply(tensor, comm)
    return result


def leave(tensor: torch.Tensor, comm: Comm) -> torch.Tensor:
    """After it: partial results are summed."""
    result: torch.Tensor = _Leave.apply(tensor, comm)
    return result


def run_threads(size: int, function: Callable[[ThreadGroup, Hall], Any]) -> list[Any]:
    """Run `function(group, hall)` on so many threads; the first error is raised. The group is for giantstep."""
    hall, groups = Hall(), ThreadGroups(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(groups.rank(rank), hall)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)
            hall.close()
        finally:
            groups.leave(rank)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    causes = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if errors:
        raise (causes or errors)[0]
    return results
