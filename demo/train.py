"""The training script that every process runs: `train.py JOB RANK`. Saves and resumes with giantstep.

What concerns checkpoints is `state`, `save`, `resume` and `last_committed`; it is the same for every layout, one
plain process included.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from job import Job, Result, step_name
from killing_store import KillingStore
from model import DP, TP, Gpt, GptShape, build, cut
from text import batch_of
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional

import giantstep as gs
from giantstep.storage.local import LocalStore
from giantstep.storage.locate import StoreLike

SHAPE = GptShape()
SEQUENCES = 8
LEARNING_RATE = 1e-3
BETAS = (0.9, 0.95)
_SEED = 1


class Training:
    """Model, optimizer and losses of one process."""

    def __init__(self, job: Job, rank: int) -> None:
        self.job = job
        self.rank = rank
        self.model: Gpt = build(SHAPE, _SEED)
        self.result = Result(parameters=sum(parameter.numel() for parameter in self.model.parameters()))
        self.mesh = mesh_of(job)
        if self.mesh is not None:
            cut(self.model, self.mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, betas=BETAS)
        self.text = torch.frombuffer(bytearray(job.text.read_bytes()), dtype=torch.uint8)

    # Checkpoints.

    def state(self, step: int) -> dict[str, Any]:
        """All that makes up the training: tensors as PyTorch cuts them, and plain values."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        losses = [self.result.losses[done] for done in range(1, step + 1)]
        return {"model": model, "optimizer": optimizer, "trainer": {"step": step, "losses": losses}}

    def save(self, step: int) -> None:
        """Save a step. The digests of all tensors are noted before, so that they outlive a death in the save."""
        state = self.state(step)
        self.note_digests(step, state)
        begin = time.perf_counter()
        try:
            report = gs.save(state, self.place_of(step), content_metadata={"step": step})
        except gs.errors.PeerError as error:
            self.result.error = type(error).__name__
            self.result.error_message = str(error)
            self.result.error_secs = time.perf_counter() - begin
            self.tell()
            raise
        secs = time.perf_counter() - begin
        self.result.saves[step] = f"{report.tensors} tensors, {report.bytes / 2**20:.1f} MiB, {secs:.2f} s"

    def place_of(self, step: int) -> StoreLike:
        """Where to save a step: a directory, or on the rank that is to die in this save, a store that sees to it."""
        path = self.job.checkpoints / step_name(step)
        if (self.rank, step) == (self.job.kill_rank, self.job.kill_step):
            return KillingStore(LocalStore(path), self.job.kill_after_bytes)
        return path

    def resume(self) -> int:
        """Load the last committed step, whatever layout saved it; return its number."""
        wanted = self.state(0)
        loaded = gs.load(wanted, self.job.checkpoints / step_name(last_committed(self.job.checkpoints)))
        set_state_dict(self.model, self.optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        step: int = loaded["trainer"]["step"]
        self.result.start_step = step
        self.result.losses = dict(enumerate(loaded["trainer"]["losses"], start=1))
        # Asked from model and optimizer again: what they hold counts, not what was loaded.
        self.note_digests(step, self.state(step))
        return step

    def note_digests(self, step: int, state: dict[str, Any]) -> None:
        """Note the digest of every whole tensor, which PyTorch gathers, not giantstep. Collective."""
        tensors = flatten({name: state[name] for name in ("model", "optimizer")})
        self.result.digests[step] = {key: digest(tensor) for key, tensor in tensors.items()}
        self.tell()

    # Training.

    def run(self) -> None:
        """Train from the beginning, or from the last committed step, to the last one."""
        step = self.resume() if self.job.resume else 0
        if self.job.forget_moments:
            self.optimizer.state.clear()
        while step < self.job.last_step:
            step += 1
            self.result.losses[step] = self.train(step)
            if self.job.save_every and step % self.job.save_every == 0:
                self.save(step)
        if step not in self.result.digests:
            self.note_digests(step, self.state(step))
        self.tell()

    def train(self, step: int) -> float:
        """One step; returns the mean loss over the global batch, the same on all ranks."""
        part = 0 if self.mesh is None else self.mesh[DP].get_local_rank()
        inputs, targets = (whole.chunk(self.job.dp)[part] for whole in batch_of(self.text, step, SEQUENCES, SHAPE.context))
        loss = functional.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.mean_over_dp(loss.item())

    def mean_over_dp(self, loss: float) -> float:
        """The mean of the ranks' losses; their parts of the batch are equally large."""
        if self.mesh is None:
            return loss
        losses = [torch.zeros(1, dtype=torch.float64) for _ in range(self.job.dp)]
        dist.all_gather(losses, torch.tensor([loss], dtype=torch.float64), group=self.mesh[DP].get_group())
        return torch.cat(losses).mean().item()

    def tell(self) -> None:
        """Leave what is known so far for `run.py`."""
        self.result.write(self.job.result(self.rank))


def last_committed(checkpoints: Path) -> int:
    """The newest step that was committed, found by asking: a killed save leaves files, but no checkpoint.

    Raises:
        gs.errors.CheckpointNotFoundError: there is none.
    """
    for path in sorted(checkpoints.glob("step_*"), reverse=True):
        try:
            gs.open_checkpoint(path)
        except gs.errors.OpenError:
            continue
        return int(path.name.removeprefix("step_"))
    raise gs.errors.CheckpointNotFoundError(f"no committed step in {checkpoints}")


def flatten(tree: object, path: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """All tensors of a nested state dict by dotted key."""
    if isinstance(tree, torch.Tensor):
        return {".".join(path): tree}
    items = tree.items() if isinstance(tree, dict) else ()
    return {key: tensor for name, value in items for key, tensor in flatten(value, (*path, str(name))).items()}


def digest(tensor: torch.Tensor) -> str:
    """128-bit digest of the bytes of a whole tensor. Collective for a `DTensor`."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return xxhash.xxh3_128_hexdigest(whole.detach().contiguous().numpy())


def mesh_of(job: Job) -> DeviceMesh | None:
    """The processes as (dp, tp), as (dp,), or None for one plain process."""
    if job.world_size == 1:
        return None
    if job.tp == 1:
        return init_device_mesh("cpu", (job.dp,), mesh_dim_names=(DP,))
    return init_device_mesh("cpu", (job.dp, job.tp), mesh_dim_names=(DP, TP))


def main(job_file: str, rank: int) -> None:
    """Run one rank."""
    job = Job.read(Path(job_file))
    torch.set_num_threads(1)
    if job.world_size > 1:
        dist.init_process_group("gloo", init_method=job.rendezvous, rank=rank, world_size=job.world_size)
    Training(job, rank).run()
    if job.world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
