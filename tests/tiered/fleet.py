"""Hosts and the processes that run on them: each host has a directory of its own, and perhaps a network of its own.

A *job* is one start of all ranks. Its hosts can be killed, and its ranks can stop at a place and wait to be let go on.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from namespaces import INTERFACE, Network, enter

from processes import _CONTEXT, DIED

_PORT = 29511


@dataclass(frozen=True, slots=True)
class Host:
    """One host.

    Attributes:
        name: as giantstep is told.
        place: its directory.
        namespace, address: its network; empty if all share the machine's.
    """

    name: str
    place: str
    namespace: str = ""
    address: str = ""

    def lose(self) -> None:
        """All that it has stored is gone."""
        shutil.rmtree(self.place)

    def committed(self) -> list[int]:
        """Steps of which it has the commit record."""
        return sorted(int(path.parent.name.removeprefix("step_")) for path in Path(self.place).glob("step_*/checkpoint.json"))


def hosts_in(folder: Path, names: Sequence[str], network: Network | None = None) -> list[Host]:
    """Hosts with these names, in the order of the network's."""
    found = []
    for number, name in enumerate(names):
        where = (network.path(number), network.address(number)) if network else ("", "")
        found.append(Host(name, str(folder / name), *where))
    return found


@dataclass(frozen=True, slots=True)
class Seat:
    """One rank's view of its job."""

    rank: int
    size: int
    host: Host
    pipe: Any

    def stop(self, word: str) -> None:
        """Say a word, and wait to be let go on."""
        self.pipe.send(("said", word))
        self.pipe.recv()


def _run(function: Callable[..., Any], seat: Seat, store: str, arguments: tuple[Any, ...]) -> None:
    if seat.host.namespace:
        # Before torch makes any thread or socket.
        enter(seat.host.namespace)
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=store, rank=seat.rank, world_size=seat.size)
        seat.pipe.send(("ok", function(seat, *arguments)))
    except Exception as error:  # noqa: BLE001 - whatever it is, the test is to see it
        seat.pipe.send(("error", (type(error).__name__, str(error), traceback.format_exc())))


class Job:
    """Ranks in processes. A context manager; whatever still runs at its end is killed.

    Args:
        hosts: of each rank.
        function: called as `function(seat, *arguments)` on each.
    """

    def __init__(self, hosts: Sequence[Host], function: Callable[..., Any], *arguments: Any) -> None:
        self._hosts, self._function, self._arguments = hosts, function, arguments
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> Self:
        first = self._hosts[0]
        store = f"tcp://{first.address}:{_PORT}" if first.address else f"file://{Path(self._folder.name, 'store')}"
        for rank, host in enumerate(self._hosts):
            Path(host.place).mkdir(exist_ok=True)
            ours, theirs = _CONTEXT.Pipe()
            seat = Seat(rank, len(self._hosts), host, theirs)
            process = _CONTEXT.Process(target=_run, args=(self._function, seat, store, self._arguments), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join(20)
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()

    def _ranks_of(self, name: str) -> list[int]:
        return [rank for rank, host in enumerate(self._hosts) if host.name == name]

    def await_stop(self, rank: int, timeout_secs: float = 60) -> str:
        """Wait until a rank has stopped; return its word."""
        if not self._pipes[rank].poll(timeout_secs):
            raise AssertionError(f"rank {rank} said nothing for {timeout_secs} s")
        kind, word = self._pipes[rank].recv()
        if kind != "said":
            raise AssertionError(f"rank {rank} ended before it stopped: {word}")
        return str(word)

    def let_go(self, rank: int) -> None:
        """A rank that has stopped goes on."""
        self._pipes[rank].send("go")

    def all_stop(self) -> None:
        """Wait until all ranks have stopped."""
        for rank in range(len(self._hosts)):
            self.await_stop(rank)

    def all_go(self) -> None:
        """All ranks go on."""
        for rank in range(len(self._hosts)):
            self.let_go(rank)

    def kill(self, host: str) -> None:
        """End all processes of a host at once, and wait until they are no more."""
        doomed = [self._processes[rank] for rank in self._ranks_of(host)]
        for process in doomed:
            os.kill(process.pid, signal.SIGKILL)
        for process in doomed:
            process.join(20)

    def outcomes(self, timeout_secs: float = 60) -> list[tuple[str, Any]]:
        """By rank ("ok", result), ("error", (class, message, traceback)), or ("died", exit code or "timeout").

        They have so long all together.
        """
        end = time.monotonic() + timeout_secs
        found: list[tuple[str, Any]] = []
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            try:
                found.append(pipe.recv() if pipe.poll(max(0.0, end - time.monotonic())) else (DIED, "timeout"))
            except (EOFError, ConnectionResetError):
                process.join(10)
                found.append((DIED, process.exitcode))
        for rank, process in enumerate(self._processes):
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                found[rank] = (DIED, f"did not end, after {found[rank]}")
            elif found[rank][0] != DIED and process.exitcode:
                found[rank] = (DIED, process.exitcode)
        return found


def run(hosts: Sequence[Host], function: Callable[..., Any], *arguments: Any, timeout_secs: float = 60) -> list[Any]:
    """Run a job to its end; the results by rank. AssertionError with a rank's traceback if it failed."""
    with Job(hosts, function, *arguments) as job:
        outcomes = job.outcomes(timeout_secs)
    for rank, (kind, value) in enumerate(outcomes):
        if kind != "ok":
            raise AssertionError(f"rank {rank} {kind}: {value[2] if kind == 'error' else value}")
    return [value for _, value in outcomes]
