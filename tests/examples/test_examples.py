"""The examples, run as their users run them: resumed in the same layout to the bit, in another one with close losses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS, STOPPED_AFTER = 8, 4
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Way:
    """How an example is started: its arguments, and the number of processes that torchrun starts, if it is used."""

    arguments: tuple[str, ...] = ()
    processes: int = 0

    def command(self, script: Path) -> list[str]:
        torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", str(self.processes)]
        start = torchrun if self.processes else [sys.executable]
        return [*start, str(script), *self.arguments]


ALONE = Way()
# The layout that saves and goes on, and another one that goes on.
EXAMPLE: dict[str, tuple[Way, Way]] = {
    "ddp": (Way(processes=2), Way(processes=1)),
    "fsdp2_tp": (Way(("--tp", "2"), 4), Way(("--tp", "1"), 2)),
    "megatron_style": (Way(("--tp", "2", "--pp", "2"), 4), Way(("--tp", "1", "--pp", "1"), 3)),
    "moe": (Way(("--experts-per-rank", "3", "0", "1"), 3), Way(("--experts-per-rank", "2", "2"), 2)),
    "huggingface": (ALONE, Way(processes=2)),
    "lightning_callback": (ALONE, Way(("--devices", "2"))),
    "accelerate_loop": (Way(processes=2), ALONE),
}


def run(name: str, way: Way, folder: Path) -> dict[int, float]:
    """Losses by step."""
    command = [*way.command(EXAMPLES / f"{name}.py"), "--steps", str(STEPS), "--dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^step (\d+) loss \S+ (\S+)$", done.stdout, re.MULTILINE)
    return {int(step): float.fromhex(loss) for step, loss in found}


def test_every_example_is_tried() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(EXAMPLE)


@pytest.mark.parametrize("name", EXAMPLE)
def test_an_example_goes_on_where_it_was_stopped(tmp_path: Path, name: str) -> None:
    same, other = EXAMPLE[name]
    uninterrupted = run(name, same, tmp_path / "whole")
    assert sorted(uninterrupted) == list(range(1, STEPS + 1))
    late = {step: loss for step, loss in uninterrupted.items() if step > STOPPED_AFTER}
    for folder in ("again", "other"):
        # What there would be if it had been stopped then.
        shutil.copytree(tmp_path / "whole" / f"step_{STOPPED_AFTER:08d}", tmp_path / folder / f"step_{STOPPED_AFTER:08d}")
    assert run(name, same, tmp_path / "again") == late, "the same layout: to the bit"
    changed = run(name, other, tmp_path / "other")
    assert sorted(changed) == sorted(late)
    assert all(abs(changed[step] - loss) < TOLERANCE for step, loss in late.items()), (changed, late)
