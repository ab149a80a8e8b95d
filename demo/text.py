"""The training text, this project's own files, and batches that depend on the step alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

_SEED = 20_000


def project_text(project: Path) -> bytes:
    """README, documentation and source, in sorted order."""
    files = [project / "README.md", *project.glob("docs/**/*.md"), *project.glob("src/**/*.py")]
    return b"\n".join(file.read_bytes() for file in sorted(files) if file.is_file())


def batch_of(text: Tensor, step: int, sequences: int, context: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step, the same in every layout: (sequences, context) inputs and their next bytes."""
    generator = torch.Generator().manual_seed(_SEED + step)
    starts = torch.randint(len(text) - context - 1, (sequences,), generator=generator).tolist()
    rows = torch.stack([text[start : start + context + 1] for start in starts]).long()
    return rows[:, :-1], rows[:, 1:]
