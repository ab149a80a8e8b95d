"""One host of `tiers.py`, with one rank, in a process of its own.

A host is a directory. What is measured takes turns, in another order in every round, on all ranks at once between barriers.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from measure import Meter
from raw_io import copy_memory, write_file
from states import Memory, aligned_memory

import giantstep as gs
from giantstep.group.base import Parcel
from giantstep.group.torch_group import group_of

_MIB = 1 << 20
_TENSORS = 16
_PARCEL_BYTES = 16 << 20
_FACTOR = 0x9E3779B1
MEMCPY, SEND, WRITE = "memcpy", "send", "write"
BLOCKED, COMMITTED, SAVE, RESTORE, RECOVER = "blocked", "committed", "save", "restore", "recover"
PLAIN_SAVE = "save without protection"


@dataclass(frozen=True, slots=True)
class Job:
    """What the ranks are to do.

    Attributes:
        folder: where the hosts' directories are made.
        meeting: file by which the ranks find each other.
        results: folder for what each rank measured.
        hosts: of one rank each.
        data_parallel: so many ranks hold the same.
        mib: of state per host.
        replicas, parity: as for `LocalTier`.
        lost: hosts that are lost before `RECOVER`.
        rounds: how often everything is measured, after once without measuring.
        peer: interpreter that runs `nvrx.py` after every round, or "".
    """

    folder: str
    meeting: str
    results: str
    hosts: int
    data_parallel: int
    mib: int
    replicas: int
    parity: tuple[int, int] | None
    lost: tuple[int, ...]
    rounds: int
    peer: str


@dataclass(frozen=True, slots=True)
class Found:
    """One operation on one rank.

    Attributes:
        operation, repetition: what, and in which round.
        begin, end: on the machine's monotonic clock.
        extra_bytes: peak resident memory beyond that at the start. That of a background save counts from the round's begin.
        sent_bytes, stored_bytes: sent by this rank, and on this host's directory afterwards; -1: not looked at.
        phases: seconds, from giantstep's report.
    """

    operation: str
    repetition: int
    begin: float
    end: float
    extra_bytes: int
    sent_bytes: int = -1
    stored_bytes: int = -1
    phases: dict[str, float] = field(default_factory=dict)


class Rank:
    """All measurements of one rank."""

    def __init__(self, job: Job, rank: int) -> None:
        self._job, self._rank = job, rank
        self._shards = job.hosts // job.data_parallel
        self._shard = rank % self._shards
        self._elements = job.mib * _MIB // 4 // _TENSORS
        self._memory = aligned_memory(_TENSORS * self._elements * 4)
        self._words = self._memory.view(np.uint32).reshape(_TENSORS, self._elements)
        for tensor in range(_TENSORS):
            self._words[tensor] = self._values(tensor)
        self._repetition = -1
        self._found: list[Found] = []
        self._peer: list[dict[str, Any]] = []

    def run(self) -> tuple[list[Found], list[dict[str, Any]]]:
        """Once without measuring, then as often as asked."""
        protection: dict[str, Any] = {"replicas": self._job.replicas, "parity": self._job.parity}
        works = [self._raw, lambda: self._save(protection), lambda: self._async_save(protection), self._plain]
        for repetition in range(-1, self._job.rounds):
            self._repetition = repetition
            random.Random(repetition).shuffle(works)  # noqa: S311 - an order, the same on all ranks
            for work in works:
                work()
                self._clear()
            if repetition >= 0 and self._job.peer and self._rank == 0:
                self._peer += [{**line, "repetition": repetition} for line in _run_peer(self._job)]
            dist.barrier()
        return self._found, self._peer

    # Raw calls.

    def _raw(self) -> None:
        self._copy_and_send(aligned_memory(len(self._memory)))
        path = Path(self._job.folder) / f"{self._rank}.raw"
        self._measure(WRITE, lambda: write_file(path, self._memory, direct=False))
        path.unlink()

    def _copy_and_send(self, room: Memory) -> None:
        self._measure(MEMCPY, lambda: copy_memory(self._memory, room))
        group = group_of()
        after, before = (self._rank + 1) % group.size, (self._rank - 1) % group.size
        starts = range(0, len(room), _PARCEL_BYTES)
        sends = [Parcel(after, self._memory[start : start + _PARCEL_BYTES]) for start in starts]
        receives = [Parcel(before, room[start : start + _PARCEL_BYTES]) for start in starts]
        self._measure(SEND, lambda: group.transfer(sends, receives, "send", 600))

    def _measure(self, operation: str, work: Callable[[], Any]) -> Any:
        meter = Meter("", self._repetition)
        dist.barrier()
        meter.start()
        made = work()
        self._add(meter, operation)
        return made

    def _add(self, meter: Meter, operation: str, **more: Any) -> None:
        read = meter.read(operation)
        if self._repetition >= 0:
            self._found.append(Found(operation, self._repetition, read.begin, read.end, read.extra_bytes, **more))
            if self._rank == 0:
                print(f"  {self._repetition} {operation}: {read.end - read.begin:.3f} s", file=sys.stderr, flush=True)

    # Node-local checkpoints.

    def _host(self) -> Path:
        return Path(self._job.folder) / f"host{self._rank}"

    def _tier(self, protection: dict[str, Any]) -> gs.LocalTier:
        """A new one, as after a restart."""
        return gs.LocalTier(self._host(), host=f"host{self._rank}", keep=1, **protection)

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"step": 1}
        for tensor in range(_TENSORS):
            local = torch.from_numpy(self._words[tensor].view(np.float32))
            shards = (0, self._shard, self._shards)
            key = f"layers.{tensor}.weight"
            state[key] = gs.ShardedTensor.from_rank_offsets(key, local, shards, replica_id=self._rank // self._shards)
        return state

    def _values(self, tensor: int) -> Any:
        return (np.arange(self._elements, dtype=np.uint32) + np.uint32(tensor * 1001 + self._shard * 77)) * np.uint32(_FACTOR)

    def _stored(self) -> int:
        return sum(path.stat().st_size for path in self._host().rglob("*") if path.is_file())

    def _save(self, protection: dict[str, Any]) -> None:
        """Blocking; then restore with everything there, and after hosts were lost."""
        with self._tier(protection) as tier:
            meter = Meter("", self._repetition)
            dist.barrier()
            meter.start()
            report = tier.save(1, self._state(), asynchronous=False)
            more = {"sent_bytes": report.bytes_sent, "phases": report.seconds}  # type: ignore[union-attr]
            self._add(meter, SAVE, stored_bytes=self._stored(), **more)
        self._restore(RESTORE, protection)
        dist.barrier()
        if self._rank in self._job.lost:
            shutil.rmtree(self._host())
        if self._job.lost:
            self._restore(RECOVER, protection)

    def _restore(self, operation: str, protection: dict[str, Any]) -> None:
        self._memory[:] = 0
        meter = Meter("", self._repetition)
        dist.barrier()
        meter.start()
        with self._tier(protection) as tier:
            restored = tier.restore(self._state())
        if restored is None:
            raise RuntimeError(f"rank {self._rank}, {operation}: no host has a step")
        self._add(meter, operation, phases=restored.state.report.seconds)
        for tensor in range(_TENSORS):
            if not np.array_equal(self._words[tensor], self._values(tensor)):
                raise RuntimeError(f"rank {self._rank}, {operation}: tensor {tensor} is not what was saved")

    def _async_save(self, protection: dict[str, Any]) -> None:
        with self._tier(protection) as tier:
            meter = Meter("", self._repetition)
            dist.barrier()
            meter.start()
            pending = tier.save(1, self._state(), asynchronous=True)
            self._add(meter, BLOCKED)
            report = pending.result()  # type: ignore[union-attr]
            self._add(meter, COMMITTED, sent_bytes=report.bytes_sent, phases=report.seconds)
        gs.finish_saves()

    def _plain(self) -> None:
        with self._tier({"replicas": 0}) as tier:
            self._measure(PLAIN_SAVE, lambda: tier.save(1, self._state(), asynchronous=False))

    def _clear(self) -> None:
        dist.barrier()
        shutil.rmtree(self._host(), ignore_errors=True)
        dist.barrier()


def _run_peer(job: Job) -> list[dict[str, Any]]:
    """`nvrx.py`, once, with as many ranks and bytes; its lines."""
    script = Path(__file__).parent / "nvrx.py"
    options = ["--folder", job.folder, "--ranks", str(job.hosts), "--mib", str(job.mib), "--rounds", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen([job.peer, str(script), *options], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        told, _ = process.communicate()
    finally:
        if process.poll() is None:
            # Told, and not killed, it ends its own processes.
            process.terminate()
            process.wait()
    if process.returncode:
        raise RuntimeError(f"nvrx.py ended with status {process.returncode}")
    return [json.loads(line) for line in told.splitlines() if line.startswith("{")]


def run_rank(job: Job, rank: int) -> None:
    """Run one rank and write down what it measured. The target of a process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    warnings.filterwarnings("ignore", module="torch")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{job.meeting}", rank=rank, world_size=job.hosts)
    found, peer = Rank(job, rank).run()
    told = {"found": [asdict(one) for one in found], "peer": peer}
    (Path(job.results) / f"{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()
