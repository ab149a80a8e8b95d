"""Real processes as ranks: gloo over a file or TCP store, started from a server that has torch imported already."""

from __future__ import annotations

import multiprocessing
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed.tensor", "giantstep.saving", "giantstep.loading"])

DIED = "died"


def _rank(function: Callable[..., Any], rank: int, size: int, store: str, pipe: Any, arguments: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    try:
        pipe.send(("ok", function(rank, *arguments)))
    except Exception as error:  # noqa: BLE001 - whatever it is, the test is to see it
        pipe.send(("error", (type(error).__name__, str(error), traceback.format_exc())))


def run_processes(
    size: int, function: Callable[..., Any], *arguments: Any, timeout_secs: float = 120, tcp: bool = False
) -> list[tuple[str, Any]]:
    """Run `function(rank, *arguments)` on `size` processes; with `tcp` the store lives in rank 0's process.

    Returns by rank ("ok", result), ("error", (class, message, traceback)), or ("died", exit code).
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        store = f"tcp://127.0.0.1:{_free_port()}" if tcp else f"file://{Path(folder, 'store')}"
        for rank in range(size):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(target=_rank, args=(function, rank, size, store, sender, arguments), daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        outcomes: list[tuple[str, Any]] = []
        for pipe, process in zip(pipes, processes, strict=True):
            try:
                outcomes.append(pipe.recv() if pipe.poll(timeout_secs) else (DIED, "timeout"))
            except EOFError:
                process.join(10)
                outcomes.append((DIED, process.exitcode))
        for rank, process in enumerate(processes):
            process.join(20)
            if process.is_alive():
                process.kill()
                outcomes[rank] = (DIED, "did not end")
            elif outcomes[rank][0] != DIED and process.exitcode != 0:
                outcomes[rank] = (DIED, process.exitcode)
        return outcomes


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def results(outcomes: list[tuple[str, Any]]) -> list[Any]:
    """The results; AssertionError with the first traceback if a rank failed."""
    for rank, (kind, value) in enumerate(outcomes):
        if kind != "ok":
            raise AssertionError(f"rank {rank} {kind}: {value[2] if kind == 'error' else value}")
    return [value for _, value in outcomes]
