"""The faults: each a function of a library's name and an empty folder that says what the library did about it."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import damage
import power
from libraries import LIBRARIES
from verdicts import Outcome, Verdict, of_latest, of_load, worst
from workers import run, run_and_kill


@dataclass(frozen=True, slots=True)
class Effort:
    """How often what is drawn by chance is tried, and the seed of the chances."""

    rounds: int = 8
    seed: int = 1


Scenario = Callable[[str, Path, Effort], Verdict]


def _steps_in(root: Path) -> list[str]:
    """Paths of all that have the name of a step, the newest first. What a library writes to under another name is none."""
    found = root.iterdir() if root.exists() else ()
    return sorted((str(path) for path in found if path.is_dir() and path.name.startswith("step_")), reverse=True)


def _saved(library: str, path: Path, value: int = 1) -> None:
    said = run(library, "save", str(path), str(value))
    if said.last_committed() != value:
        raise RuntimeError(f"{library} cannot save to {path} at all:\n{said.stderr[-2000:]}")


# Killed.


def _killed(library: str, folder: Path, effort: Effort, action: str) -> Verdict:
    draw = random.Random(effort.seed)
    found = []
    first, committed = 1, None
    for _ in range(effort.rounds):
        # The same folder again and again: leftovers pile up as they do in life.
        said = run_and_kill(library, action, str(folder), str(first), after_secs=draw.uniform(0.0, 0.6))
        last = said.last_committed()
        committed = last if last is not None else committed
        answer = run(library, "load", *_steps_in(folder))
        found.append(of_latest(answer.lines, committed))
        first = (committed or 0) + 10
        if found[-1].outcome.is_bad:
            # What is lost stays lost: begin anew.
            shutil.rmtree(folder)
            committed = None
    return worst(found)


def killed_new_steps(library: str, folder: Path, effort: Effort) -> Verdict:
    """SIGKILL at random moments of saves to new steps"""
    return _killed(library, folder, effort, "steps")


def killed_overwriting(library: str, folder: Path, effort: Effort) -> Verdict:
    """SIGKILL at random moments of saves over one path"""
    if not LIBRARIES[library][1].overwrites:  # type: ignore[attr-defined]
        return Verdict(Outcome.NOT_APPLICABLE, "refuses to overwrite")
    return _killed(library, folder, effort, "overwrite")


def killed_in_background(library: str, folder: Path, effort: Effort) -> Verdict:
    """SIGKILL at random moments of asynchronous saves"""
    return _killed(library, folder, effort, "background")


# Power.


def _power_lost(library: str, folder: Path, lose: Callable[[Path, power.Flushes], list[str]]) -> Verdict:
    if not power.is_available():
        return Verdict(Outcome.NOT_APPLICABLE, "strace is not installed")
    path, log = folder / "step_00000001", folder / "log"
    said = run(library, "save", str(path), "1", prefix=power.strace_prefix(log))
    if said.last_committed() != 1:
        return Verdict(Outcome.NOT_APPLICABLE, "does not run under strace")
    lost = lose(path, power.Flushes.read(log))
    verdict = of_load(run(library, "load", str(path)).lines, [1])
    if verdict.outcome is Outcome.DETECTS:
        # It had said that this checkpoint was committed.
        return Verdict(Outcome.LOSES, f"{len(lost)} not flushed")
    return verdict


def power_loss_of_bytes(library: str, folder: Path, _effort: Effort) -> Verdict:
    """power lost right after a save: bytes of files not flushed"""
    return _power_lost(library, folder, power.lose_bytes)


def power_loss_of_names(library: str, folder: Path, _effort: Effort) -> Verdict:
    """power lost right after a save: names in directories not flushed"""
    return _power_lost(library, folder, power.lose_names)


# Damaged.


def _damaged(library: str, folder: Path, ways: list[damage.Damage]) -> Verdict:
    whole = folder / "whole" / "step_00000001"
    _saved(library, whole)
    paths = []
    for number, way in enumerate(ways):
        path = folder / str(number) / "step_00000001"
        shutil.copytree(whole, path)
        if way(path):
            paths.append(str(path))
    if not paths:
        return Verdict(Outcome.NOT_APPLICABLE, "no such file")
    found = []
    for path in paths:
        said = run(library, "load", path)
        if said.code is None:
            found.append(Verdict(Outcome.HANGS))
        else:
            found.append(of_load(said.lines, [1]))
    return found[0] if len(found) == 1 else worst(found)


def flipped_in_data(library: str, folder: Path, _effort: Effort) -> Verdict:
    """a bit flipped in a tensor's bytes"""
    return _damaged(library, folder, [damage.flip_in_data(part) for part in (0.3, 0.5, 0.7)])


def flipped_in_metadata(library: str, folder: Path, _effort: Effort) -> Verdict:
    """a bit flipped in the metadata"""
    return _damaged(library, folder, [damage.flip_in_metadata(part) for part in (0.1, 0.3, 0.5, 0.6, 0.7, 0.9)])


def zeroed_page(library: str, folder: Path, _effort: Effort) -> Verdict:
    """4 KiB of zeros in a data file"""
    return _damaged(library, folder, [damage.zero_page])


def truncated(library: str, folder: Path, _effort: Effort) -> Verdict:
    """a data file cut short"""
    return _damaged(library, folder, [damage.truncate])


def file_missing(library: str, folder: Path, _effort: Effort) -> Verdict:
    """a data file missing"""
    return _damaged(library, folder, [damage.remove_data])


def files_swapped(library: str, folder: Path, _effort: Effort) -> Verdict:
    """two data files exchanged"""
    return _damaged(library, folder, [damage.swap])


def file_of_another_step(library: str, folder: Path, _effort: Effort) -> Verdict:
    """a data file of another step in the place of one"""
    other = folder / "other" / "step_00000002"
    _saved(library, other, 2)
    return _damaged(library, folder, [damage.exchange_with(other)])


# Else.


def disk_full(library: str, folder: Path, _effort: Effort) -> Verdict:
    """the disk is full while the second step is saved; then there is room again"""
    place = folder / "disk"
    place.mkdir(parents=True)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)], capture_output=True, check=False
    ).returncode:
        return Verdict(Outcome.NOT_APPLICABLE, "mounting is not permitted here")
    try:
        _saved(library, place / "step_00000001")
        filler = place / "filler"
        filler.write_bytes(bytes(7 << 20))
        second = run(library, "save", str(place / "step_00000002"), "2")
        if second.code is None:
            return Verdict(Outcome.HANGS)
        told = second.last_committed() is None
        filler.unlink()
        answer = of_latest(run(library, "load", *_steps_in(place)).lines, 1 if told else 2)
        if answer.outcome is not Outcome.SURVIVES:
            return answer
        # Over what the failed save left, as the job would do it when it goes on.
        again = run(library, "save", str(place / "step_00000002"), "2")
        if again.last_committed() != 2:
            return Verdict(Outcome.LOSES, "the next save of that step fails")
        return of_latest(run(library, "load", *_steps_in(place)).lines, 2)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def changed_after_start(library: str, folder: Path, _effort: Effort) -> Verdict:
    """tensors changed as soon as the library says that they may be, in an asynchronous save"""
    path = folder / "step_00000001"
    said = run(library, "changed", str(path))
    if said.code is None:
        return Verdict(Outcome.HANGS)
    return of_load(run(library, "load", str(path)).lines, [1])


def planted_code(library: str, folder: Path, _effort: Effort) -> Verdict:
    """a checkpoint that tries to run code when it is loaded"""
    path, marker = folder / "step_00000001", folder / "ran"
    _saved(library, path)
    damage.plant_code(marker)(path)
    run(library, "load", str(path))
    return Verdict(Outcome.SILENT, "it ran") if marker.exists() else Verdict(Outcome.DETECTS)


SCENARIOS: tuple[Scenario, ...] = (
    killed_new_steps,
    killed_overwriting,
    killed_in_background,
    power_loss_of_bytes,
    power_loss_of_names,
    flipped_in_data,
    flipped_in_metadata,
    zeroed_page,
    truncated,
    file_missing,
    files_swapped,
    file_of_another_step,
    disk_full,
    changed_after_start,
    planted_code,
)
