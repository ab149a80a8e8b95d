"""The demo of asynchronous saves: training goes on while they are written, failures are told, and the end waits for them.

Run by `make demo` after the demo of many ranks. Checks every claim it makes, and exits with 1 if one is false.
"""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from story import Story

import giantstep as gs
from giantstep.group.threads import ThreadGroup
from giantstep.storage.local import LocalStore
from giantstep.testing import run_ranks

STEPS = 8
RANKS = 4
SLOW_SECS = 0.3
State = dict[str, Any]


class SlowDisk(LocalStore):
    """A directory on a disk that takes its time.

    Attributes:
        full_on: the rank whose next file does not fit; None: the disk has room.
    """

    full_on: int | None = None

    def create(self, name: str, size: int, *, direct: bool) -> Any:
        """As `LocalStore`, later."""
        if name.startswith("data/"):
            time.sleep(SLOW_SECS)
            if self.full_on is not None and f"-r{self.full_on:05d}-" in name:
                raise OSError(errno.ENOSPC, "No space left on device")
        return super().create(name, size, direct=direct)


def train(folder: Path | None) -> tuple[list[float], float, list[State]]:
    """Losses, seconds in calls of `async_save`, and what the parameters were at each call."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(256, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, blocked, were = [], 0.0, []
    options = gs.SaveOptions(max_pending=STEPS, plan_cache=gs.PlanCache())
    for step in range(STEPS):
        batch = torch.rand(64, 256)
        loss = (model(batch) - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if folder is not None:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            were.append({key: value.clone() for key, value in model.state_dict().items()})
            begin = time.perf_counter()
            gs.async_save(state, SlowDisk(folder / f"step_{step}"), options=options).guard(optimizer)
            blocked += time.perf_counter() - begin
    return losses, blocked, were


def show_snapshots(story: Story, work: Path) -> None:
    """Training and saving at once."""
    story.section("Save every step to a slow disk, and train on meanwhile")
    plain, _, _ = train(None)
    # The first call imports and allocates.
    gs.async_save({"w": torch.ones(3)}, work / "first").result()
    begin = time.perf_counter()
    losses, blocked, were = train(work)
    trained = time.perf_counter() - begin
    gs.finish_saves()
    story.say(
        f"{STEPS} steps and {STEPS} saves in {trained:.2f} s, of which the loop waited {blocked:.2f} s; the disk then took "
        f"until {time.perf_counter() - begin:.2f} s."
    )
    story.check(losses == plain, "losses are those of training without saves, to the bit")
    story.check(blocked < SLOW_SECS * STEPS / 2, "the loop did not wait for the disk")
    same = 0
    for step, was in enumerate(were):
        checkpoint = gs.open_checkpoint(work / f"step_{step}")
        found = {key: torch.from_numpy(checkpoint[f"model.{key}"][...]) for key in was}
        same += all(torch.equal(found[key], was[key]) for key in was) and checkpoint.common["step"] == step
    story.check(same == STEPS, f"{same} of {STEPS} checkpoints hold what the parameters were at the time of the call")


def show_failure(story: Story, work: Path) -> None:
    """A disk that is full on one rank."""
    story.section(f"The disk of one of {RANKS} ranks is full")
    disk = SlowDisk(work / "full")
    ready = threading.Barrier(RANKS)

    def run(group: ThreadGroup) -> tuple[str, str]:
        def state(step: int) -> State:
            shard = gs.ShardedTensor.from_rank_offsets("w", torch.full((1000,), float(step)), (0, group.rank, RANKS))
            return {"w": shard, "step": step}

        gs.async_save(state(1), disk, process_group=group).result()
        ready.wait()
        disk.full_on = 2
        ready.wait()
        gs.async_save(state(2), disk, process_group=group)
        try:
            gs.async_save(state(3), disk, process_group=group)
        except gs.errors.StoreError as error:
            told = str(error)
        else:
            told = "nothing"
        latest = gs.open_checkpoint(disk).common["step"]
        ready.wait()
        disk.full_on = None
        ready.wait()
        gs.async_save(state(4), disk, process_group=group).result()
        return told, str(latest)

    ((told, latest),) = set(run_ranks(RANKS, run))
    story.check("rank 2" in told, f"the next save raises on all ranks: {told}")
    story.check(latest == "1", "the checkpoint before is still in force: step 1")
    files = sum(1 for _ in (work / "full" / "data").iterdir())
    story.check(gs.open_checkpoint(disk).common["step"] == 4, "with room again, the save after it is committed: step 4")
    story.check(files == RANKS, f"nothing is left of the failed save: {files} data files")


def show_the_end(story: Story, work: Path) -> None:
    """A script that ends with an exception while a save is in flight."""
    story.section("A script that fails right after it has begun to save")
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]); import torch, giantstep as gs; from background import SlowDisk; "
        "gs.async_save({'w': torch.ones(1000), 'step': 7}, SlowDisk(sys.argv[1])); raise RuntimeError('out of ideas')"
    )
    command = [sys.executable, "-c", script, str(work / "left"), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    story.check(done.returncode == 1 and "out of ideas" in done.stderr, "it ends with its own error")
    story.check(gs.open_checkpoint(work / "left").common["step"] == 7, "and the save in flight is committed")


def main() -> int:
    """Tell the story; 0 if every claim holds."""
    logging.getLogger("giantstep").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        story = Story(work)
        print("giantstep demo: saves in the background")
        show_snapshots(story, work)
        show_failure(story, work)
        show_the_end(story, work)
    print(f"\n{story.claims - story.failed} of {story.claims} claims hold.")
    return 1 if story.failed else 0


if __name__ == "__main__":
    sys.exit(main())
