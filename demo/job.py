"""What a training process is told, and what it tells: JSON files between `run.py` and `train.py`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


def step_name(step: int) -> str:
    """Name of the directory of a step."""
    return f"step_{step:08d}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of the training script on `dp` x `tp` processes; the same for all of them.

    Attributes:
        name: of the run, for its files.
        work: directory that holds all files of the demo.
        dp, tp: ways of FSDP2 and of tensor parallelism; 1 x 1 is a plain process without torch.distributed.
        last_step: train up to and including this step.
        save_every: save after every so many steps; 0 for never.
        resume: go on from the last committed step instead of starting anew.
        forget_moments: drop the optimizer's state after resuming, to show that the loss would tell.
        kill_rank, kill_step, kill_after_bytes: that rank dies in that save, after so many bytes written.
    """

    name: str
    work: str
    dp: int
    tp: int
    last_step: int
    save_every: int = 0
    resume: bool = False
    forget_moments: bool = False
    kill_rank: int = -1
    kill_step: int = -1
    kill_after_bytes: int = 0

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.dp * self.tp

    @property
    def text(self) -> Path:
        """The training text, the same file for all runs."""
        return Path(self.work) / "text"

    @property
    def checkpoints(self) -> Path:
        """Where all runs save and look for steps."""
        return Path(self.work) / "checkpoints"

    @property
    def rendezvous(self) -> str:
        """Where the processes meet, for `init_process_group`."""
        return f"file://{self._file('rendezvous')}"

    def result(self, rank: int) -> Path:
        """Where a rank leaves its `Result`."""
        return self._file(f"rank{rank}.json")

    def log(self, rank: int) -> Path:
        """What a rank prints."""
        return self._file(f"rank{rank}.log")

    def _file(self, what: str) -> Path:
        return Path(self.work) / "runs" / f"{self.name}.{what}"

    def write(self) -> Path:
        """Write it as JSON; return where."""
        path = self._file("job.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(asdict(self)))
        return path

    @classmethod
    def read(cls, path: Path) -> Job:
        """Inverse of `write`."""
        return cls(**json.loads(path.read_text()))


@dataclass(kw_only=True)
class Result:
    """What one rank has to tell.

    Attributes:
        parameters: number of the model's parameters.
        start_step: step from which the run went on; 0 for a fresh start.
        losses: global mean loss of every step, those before a resumption included.
        digests: by step, as it was saved, loaded, or reached at the end: digest of every whole tensor by key.
        saves: by step: what was saved, and how long it took.
        error, error_message, error_secs: what ended the run early, and how long after `gs.save` was called.
    """

    parameters: int = 0
    start_step: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    digests: dict[int, dict[str, str]] = field(default_factory=dict)
    saves: dict[int, str] = field(default_factory=dict)
    error: str = ""
    error_message: str = ""
    error_secs: float = 0.0

    def write(self, path: Path) -> None:
        """Write it as JSON, floats exact, in one piece."""
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> Result:
        """Inverse of `write`."""
        values = json.loads(path.read_text())
        for name in ("losses", "digests", "saves"):
            values[name] = {int(step): value for step, value in values[name].items()}
        return cls(**values)
