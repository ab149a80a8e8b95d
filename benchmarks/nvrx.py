"""NVIDIA's node-local checkpoints with a copy on a peer (nvidia-resiliency-ext): a peer that is measured alone.

Starts one process per rank, with gloo; each is a node of its own, which writes to a folder that the others do not read. Every
part is kept by two ranks (`CliqueReplicationStrategy`). Prints one JSON line per operation: how long the trainer is blocked,
until when all ranks have saved, bytes on disk, growth of resident memory; then loads, with everything there and after one rank
lost its folder. What is loaded is copied into the trainer's tensors within the measured time, and compared bit by bit.

    python -m venv ENV && ENV/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    ENV/bin/pip install nvidia-resiliency-ext
    ENV/bin/python benchmarks/nvrx.py [--folder /dev/shm] [--ranks 4] [--mib 256] [--rounds 1] [--mode blocking ...]

Modes: "blocking"; "fork", a process per save, which sees memory as it was and needs no copy (deprecated by the library);
"worker", the library's default, a process that stays and is sent a copy in shared memory, and from 0.7.0 on gives way to others
(nice 10). Memory of these processes is not counted, nor are files in memory.

Runs with 0.4.1 and 0.7.0, whose local checkpoints are the same code; 0.6.0 has no "worker" without a GPU. From 0.5.0 on wheels
ask for glibc 2.39. What is used here is plain Python: `pip download --no-deps --only-binary=:all: --python-version 3.12
--platform manylinux_2_39_x86_64 nvidia-resiliency-ext`, unpacked into a folder on PYTHONPATH, does on older systems.

The library knows tensors on CUDA devices alone: "Instead of CUDA" marks what is put in its place. It does not flush what it
writes: `--flush` does, within the measured time. What a rank had lost is not written again by a load, but by the next save.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import Meter
from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncCallsQueue
from nvidia_resiliency_ext.checkpointing.local.basic_state_dict import BasicTensorAwareStateDict
from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager
from nvidia_resiliency_ext.checkpointing.local.replication.group_utils import GroupWrapper, parse_group_sequence
from nvidia_resiliency_ext.checkpointing.local.replication.strategies import CliqueReplicationStrategy

_MIB = 1 << 20
_MEMORY_FOLDER = "/dev/shm"  # noqa: S108 - the file system that is measured
_TENSORS = 16
_COPIES = 2  # the library's replication factor: the rank itself and one peer
_POLL_SECS, _PATIENCE_SECS = 0.005, 120
BLOCKING, FORK, WORKER = "blocking", "fork", "worker"
MODES = (BLOCKING, FORK, WORKER)

State = dict[str, torch.Tensor]


class CpuState(BasicTensorAwareStateDict):  # type: ignore[misc]
    """Instead of CUDA: the library's class refuses CPU tensors, and asks users who have some to bring a class of their own."""

    copies = False

    def __init__(self, state: State, *, copies: bool) -> None:
        self.state_dict, self._is_hollow, self.copies = state, False, copies

    def copy_tensors_to_cpu(self, non_blocking: bool = False) -> None:
        """Where the library copies from the device, a copy in memory, if the trainer could change the tensors meanwhile."""
        if self.copies:
            self.state_dict = {key: tensor.clone() for key, tensor in self.state_dict.items()}

    def restore_tensor_device(self, non_blocking: bool = True) -> None:
        """They are where they belong."""


class CpuGroup(GroupWrapper):  # type: ignore[misc]
    """Instead of CUDA: the library brings what it sends and receives to a GPU."""

    def isend_state_dict(self, state_dict: CpuState, dst: int) -> dict[str, int]:
        """As the library does it, from where the tensors are."""
        tensors = state_dict.pop_tensors()
        self.send_object(state_dict, dst)
        for tensor in tensors:
            dist.send(tensor, dst, group=self.group)
        state_dict.insert_tensors(tensors)
        return {"data_sent": sum(tensor.nbytes for tensor in tensors)}

    def irecv_state_dict(self, src: int) -> tuple[CpuState, dict[str, int]]:
        """As the library does it, to where the tensors belong."""
        received = self.recv_object(src)
        received.init_tensors()
        for tensor in received.tensors:
            dist.recv(tensor, src, group=self.group)
        return received, {"data_recv": sum(tensor.nbytes for tensor in received.tensors)}


class PicklableGroup(CpuGroup):
    """For the worker, which is sent the manager: with replication it holds a process group, which cannot be pickled."""

    def __getstate__(self) -> dict[str, None]:
        return {"_group": None}


def _without_cuda() -> None:
    """Instead of CUDA: copies are waited for, and numbers that ranks agree on are put, on the current device."""
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_device = lambda: "cpu"


def _queue(mode: str) -> AsyncCallsQueue:
    options: dict[str, Any] = {"persistent": mode == WORKER}
    # Instead of CUDA: newer versions make the worker choose a GPU, unless told that tensors are in shared memory.
    if "cpu_shm_mode" in inspect.signature(AsyncCallsQueue.__init__).parameters:
        options["cpu_shm_mode"] = mode == WORKER
    return AsyncCallsQueue(**options)


def _library_version() -> str:
    try:
        return version("nvidia-resiliency-ext")
    except PackageNotFoundError:
        return "unknown"


class Rank:
    """All measurements of one rank."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._node = Path(arguments.folder) / f"node{self._rank}"
        # Consecutive ranks share their parts: each rank is a node, so that the blast radius is 1.
        groups = [dist.new_group(ranks) for ranks in parse_group_sequence(1, _COPIES, self._ranks)]
        self._group = next(group for group in groups if dist.get_rank(group) >= 0)
        self._queues = {mode: _queue(mode) for mode in arguments.mode}
        self._iteration = 0
        generator = torch.Generator().manual_seed(self._rank)
        elements = arguments.mib * _MIB // 4 // _TENSORS
        bits = [
            torch.randint(-(1 << 31), (1 << 31) - 1, (elements,), dtype=torch.int32, generator=generator)
            for _ in range(_TENSORS)
        ]
        self._state = {f"tensor{number}": one.view(torch.float32) for number, one in enumerate(bits)}
        self._saved: State = {}

    def run(self) -> None:
        """Every mode once without measuring, then all of them in turn, as often as asked."""
        for mode in self._arguments.mode:
            self._save(mode, 0, quiet=True)
            self._load("load", mode, 0, quiet=True)
        order = list(self._arguments.mode)
        for repetition in range(self._arguments.rounds):
            random.Random(repetition).shuffle(order)  # noqa: S311 - an order, the same on all ranks
            for mode in order:
                self._save(mode, repetition)
                self._load("load", mode, repetition)
                self._lose()
                self._load("recover", mode, repetition)
        for queue in self._queues.values():
            queue.close()

    def _manager(self, mode: str) -> LocalCheckpointManager:
        """A new one, as after a restart."""
        group = (PicklableGroup if mode == WORKER else CpuGroup)(self._group)
        return LocalCheckpointManager(self._node, repl_strategy=CliqueReplicationStrategy(group, target_device="cpu"))

    def _save(self, mode: str, repetition: int, *, quiet: bool = False) -> None:
        self._iteration += 1
        self._keep_values()
        manager, queue = self._manager(mode), self._queues[mode]
        # A forked process sees the memory as it was: only the worker needs a copy.
        state = CpuState(dict(self._state), copies=mode == WORKER)
        meter = Meter("nvrx", repetition)
        dist.barrier()
        meter.start()
        if mode == BLOCKING:
            manager.save(state, self._iteration)
            blocked = meter.read(mode)
        else:
            queue.schedule_async_request(manager.save(state, self._iteration, is_async=True))
            del state
            blocked = meter.read(mode)
            if quiet:
                self._train()
            _wait(queue)
        written = list(self._node.rglob(f"iter_{self._iteration:07}_*"))
        if self._arguments.flush:
            _flush(written)
        saved = meter.read(mode)
        if not quiet:
            blocked_secs, saved_secs = blocked.end - blocked.begin, saved.end - saved.begin
            on_disk = sum(path.stat().st_size for path in written)
            self._report(
                {"operation": "save", "mode": mode, "repetition": repetition},
                {
                    "blocked_secs": blocked_secs,
                    "saved_secs": saved_secs,
                    "disk_bytes": on_disk,
                    "extra_bytes": saved.extra_bytes,
                },
            )
        dist.barrier()

    def _load(self, operation: str, mode: str, repetition: int, *, quiet: bool = False) -> None:
        for tensor in self._state.values():
            tensor.zero_()
        manager = self._manager(mode)
        meter = Meter("nvrx", repetition)
        dist.barrier()
        meter.start()
        found = manager.find_latest()
        loaded, _ = manager.load()
        for key, tensor in self._state.items():
            tensor.copy_(loaded.state_dict[key])
        done = meter.read(operation)
        if found != self._iteration:
            raise RuntimeError(f"rank {self._rank}: iteration {found} was loaded, {self._iteration} was saved")
        self._check_values(f"{operation} of {mode}")
        if not quiet:
            self._report(
                {"operation": operation, "mode": mode, "repetition": repetition, "bit_exact": True},
                {"secs": done.end - done.begin, "extra_bytes": done.extra_bytes},
            )
        dist.barrier()

    def _lose(self) -> None:
        """The node of the second rank is replaced by an empty one."""
        dist.barrier()
        if self._rank == 1:
            shutil.rmtree(self._node)
        dist.barrier()

    def _train(self) -> None:
        for tensor in self._state.values():
            tensor.view(torch.int32).add_(1)

    def _keep_values(self) -> None:
        if not self._saved:
            self._saved = {key: tensor.clone() for key, tensor in self._state.items()}

    def _check_values(self, what: str) -> None:
        for key, tensor in self._state.items():
            if not torch.equal(tensor.view(torch.int32), self._saved[key].view(torch.int32)):
                raise RuntimeError(f"rank {self._rank}, {what}: {key} is not what was saved")

    def _report(self, what: dict[str, Any], figures: dict[str, float]) -> None:
        """One line: seconds are the slowest rank's, the rest is listed by rank."""
        every: list[Any] = [None] * self._ranks
        dist.all_gather_object(every, figures)
        if self._rank:
            return
        merged = {name: [one[name] for one in every] for name in figures}
        line = {name: round(max(values), 4) if name.endswith("secs") else values for name, values in merged.items()}
        print(json.dumps({**what, **line}), flush=True)


def _wait(queue: AsyncCallsQueue) -> None:
    """Ask as a training loop would. A worker that cannot read its request ends, and the library would wait for ever."""
    give_up = time.monotonic() + _PATIENCE_SECS
    while not queue.maybe_finalize_async_calls():
        if time.monotonic() > give_up:
            raise TimeoutError(f"asynchronous save: not finished after {_PATIENCE_SECS} s; see what its process printed")
        time.sleep(_POLL_SECS)


def _flush(paths: Sequence[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _run_rank(arguments: argparse.Namespace) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    _without_cuda()
    dist.init_process_group("gloo", init_method=f"file://{arguments.meeting}", rank=arguments.rank, world_size=arguments.ranks)
    if arguments.rank == 0:
        setting = {"library": "nvidia-resiliency-ext", "version": _library_version(), "torch": torch.__version__}
        setting |= {
            "ranks": arguments.ranks,
            "mib": arguments.mib,
            "tensors": _TENSORS,
            "copies": _COPIES,
            "flush": arguments.flush,
        }
        print(json.dumps(setting), flush=True)
    Rank(arguments).run()
    dist.barrier()
    dist.destroy_process_group()


def _run_ranks(arguments: argparse.Namespace) -> None:
    """Start the ranks and wait for them; if one fails, end the others and raise."""
    options = ["--mib", arguments.mib, "--ranks", arguments.ranks, "--rounds", arguments.rounds, "--mode", *arguments.mode]
    options += ["--flush"] if arguments.flush else []
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder, prefix="nvrx-bench-") as place,
        tempfile.TemporaryDirectory() as notes,
    ):
        options += ["--folder", place, "--meeting", Path(notes) / "meeting"]
        command = [sys.executable, "-W", "ignore", __file__, *map(str, options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        running = [
            subprocess.Popen([*command, "--rank", str(rank)], env=environment, start_new_session=True)
            for rank in range(arguments.ranks)
        ]
        try:
            while any(process.poll() is None for process in running):
                if any(process.poll() for process in running):
                    break
                time.sleep(0.2)
            for rank, process in enumerate(running):
                if process.poll():
                    raise RuntimeError(f"rank {rank} ended with status {process.returncode}")
        finally:
            for process in running:
                # With the processes that it started itself.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def main() -> None:
    """Start all ranks, or be one of them."""
    parser = argparse.ArgumentParser(description="Local checkpoints of nvidia-resiliency-ext")
    parser.add_argument("--folder", default=_MEMORY_FOLDER)
    parser.add_argument("--ranks", type=int, default=4, help="a multiple of 2")
    parser.add_argument("--mib", type=int, default=256, help="of state per rank")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--flush", action="store_true", help="flush files within the measured time")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch")
    if arguments.rank is None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        _run_ranks(arguments)
    else:
        _run_rank(arguments)


if __name__ == "__main__":
    main()
