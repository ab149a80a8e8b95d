"""What processes that were killed have left: `look_at` reads all checkpoints, `clean` saves once more and looks for leftovers.

The values are those that `killed` saves. Called by `killing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from giantstep.errors import CorruptionError, GiantstepError
from giantstep.format.names import RECORD_NAME
from giantstep.loading import load
from giantstep.opening import open_checkpoint
from giantstep.steps import StepState, scan_steps, step_name
from giantstep.storage.local import LocalStore
from giantstep.testing import killed


@dataclass(frozen=True, slots=True)
class Found:
    """What lies in the folder after a kill.

    Attributes:
        newest: the step of the newest checkpoint, if it loads.
        unsound: of checkpoints that do not load, why.
        mixed: of checkpoints with values of several steps, which.
    """

    newest: int | None
    unsound: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()


def look_at(mode: str, folder: Path) -> Found:
    """All committed checkpoints in the folder; each is verified and loaded."""
    if mode in killed.ONE_PATH:
        places = [folder]
    else:
        entries = scan_steps(LocalStore(folder))
        places = [folder / entry.name for entry in entries if entry.state is not StepState.UNFINISHED]
    newest, unsound, mixed = None, [], []
    for place in places:
        # Of one path before the first commit; whether there should be a checkpoint the caller knows.
        if mode in killed.ONE_PATH and not (place / RECORD_NAME).exists():
            continue
        try:
            step, problem = _read(place)
        except GiantstepError as error:
            unsound.append(f"{place.name}: {error}")
        else:
            newest = step if newest is None else max(newest, step)
            if problem:
                mixed.append(f"{place.name}: {problem}")
    return Found(newest, tuple(unsound), tuple(mixed))


def _read(place: Path) -> tuple[int, str]:
    """The step of a checkpoint, and what in it is of another one."""
    found = open_checkpoint(place).verify()
    if not found.ok:
        raise CorruptionError(f"verify finds {found.damages}")
    shapes = dict.fromkeys(killed.CHANGING, (killed.ROWS, killed.COLUMNS)) | {killed.FIXED: (killed.FIXED_ROWS, killed.COLUMNS)}
    state = load({key: torch.full(shape, -1.0) for key, shape in shapes.items()}, place)
    step = int(state["step"])
    expected = dict.fromkeys(killed.CHANGING, float(step)) | {killed.FIXED: float(killed.FIXED_VALUE)}
    wrong = {key: state[key].unique().tolist()[:4] for key, value in expected.items() if not bool((state[key] == value).all())}
    if place.name.startswith("step_") and place.name != step_name(step):
        return step, f"holds step {step}"
    return step, f"step {step} holds {wrong}" if wrong else ""


def clean(mode: str, folder: Path, first: int) -> list[str]:
    """Save as often as steps are kept, undisturbed; what then lies there but is of no checkpoint."""
    killed.save_steps(mode, folder, first, 1 if mode in killed.ONE_PATH else killed.KEEP, lambda line: None)
    places = [folder] if mode in killed.ONE_PATH else sorted(folder.iterdir())
    wanted: set[Path] = set()
    for place in places:
        try:
            record = open_checkpoint(place).record
        except GiantstepError as error:
            return [f"leftovers stay: {place}: {error}"]
        wanted |= {place / name for name in (RECORD_NAME, record.index.name, *(file.name for file in record.files))}
    left = sorted(str(path.relative_to(folder)) for path in {*folder.rglob("*")} - wanted if not path.is_dir())
    return [f"leftovers stay: {left}"] if left else []
