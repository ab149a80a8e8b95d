"""Kills real processes that save, with SIGKILL at random moments, and checks what is left.

    python -m giantstep.testing.killing --rounds 20 --mode all

Every round starts a process (`killed`) over what the dead ones left, kills its whole process group while it saves, and reads
the newest checkpoint here: it must open, verify, hold one step's values only, and be no older than what was surely committed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import click
import numpy as np

from giantstep.testing import killed
from giantstep.testing.leftovers import Found, clean, look_at

# A process that says nothing for so long hangs.
_PATIENCE_SECS = 120.0


@dataclass(slots=True)
class KillReport:
    """What came of some rounds.

    Attributes:
        rounds: how many.
        killed_in_save: in how many of them a save was under way.
        lost: after how many a step that was committed was gone or did not load.
        mixed: after how many there was a checkpoint with values of several steps.
        problems: in words, with the round; also leftovers that stayed, and processes that failed.
    """

    mode: str
    rounds: int = 0
    killed_in_save: int = 0
    lost: int = 0
    mixed: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Victim:
    """What is killed and looked at; tests of the rounds themselves have others than `victim_of`.

    Attributes:
        command: the command line of a process that saves, from the folder and another one for files of its own. It reads the
            number of the first step from its standard input.
        look: reads what is in the folder.
        clean: saves once more from this step on, in this process, and tells of leftovers that are still there.
    """

    command: Callable[[Path, Path], list[str]]
    look: Callable[[Path], Found]
    clean: Callable[[Path, int], list[str]]


def victim_of(mode: str, ranks: int = 1) -> Victim:
    """The process that saves with giantstep in one of `killed.MODES`."""
    return Victim(
        command=lambda folder, own: killed.command_of(mode, folder, 0, ranks, own / "meeting"),
        look=lambda folder: look_at(mode, folder),
        clean=lambda folder, first: clean(mode, folder, first),
    )


def run_rounds(
    mode: str,
    rounds: int,
    seed: int,
    folder: Path,
    *,
    ranks: int = 1,
    span_secs: float = 0.25,
    victim: Victim | None = None,
) -> KillReport:
    """Kill a saving process once per round, and check each time what is left.

    Args:
        mode: one of `killed.MODES`, or a name for another `victim`.
        rounds: how many; what they leave accumulates.
        seed: of the moments.
        folder: where checkpoints are; empty or not there.
        ranks: processes that save together, over gloo; they are killed at once.
        span_secs: the kill comes at most so long after the first step of the round is committed, or begun.
        victim: another than giantstep's.
    """
    victim = victim or victim_of(mode, ranks)
    moments = np.random.default_rng([seed, *mode.encode()])
    report = KillReport(mode)
    surely = highest = 0
    with ExitStack() as stack:

        def start() -> _Process:
            return stack.enter_context(_Process(victim, folder))

        ready = start()
        for number in range(rounds):
            process = ready
            if number + 1 < rounds:
                # To be ready takes longer than all else.
                ready = start()
            # The first save of a process over leftovers is killed too; only the first of all must leave something.
            word = "saving" if number and moments.random() < 0.5 else "committed"
            told, problem = process.run_and_kill(surely + 1, word, moments.random() * span_secs)
            begun, committed = _steps(told, "saving"), _steps(told, "committed")
            surely, highest = max([surely, *committed]), max([highest, *begun])
            report.rounds += 1
            report.killed_in_save += bool(set(begun) - set(committed))
            if problem:
                report.problems.append(f"round {number}: {problem}")
            found = victim.look(folder)
            _judge(report, number, found, surely)
            # One that was committed without a word counts too, once it was seen.
            surely = max(surely, found.newest or 0)
    report.problems += victim.clean(folder, highest + 1)
    return report


def _judge(report: KillReport, number: int, found: Found, surely: int) -> None:
    """Note what is wrong with what a kill left."""
    wrong = [*found.unsound]
    if surely and (found.newest is None or found.newest < surely):
        wrong.append(f"step {surely} was committed, and the newest that loads is {found.newest}")
    report.lost += bool(wrong)
    report.mixed += bool(found.mixed)
    report.problems += [f"round {number}: {text}" for text in (*wrong, *found.mixed)]


def _steps(told: Sequence[str], word: str) -> list[int]:
    return [int(line.split()[1]) for line in told if line.startswith(f"{word} ")]


class _Process(AbstractContextManager["_Process"]):
    """A process that waits to be told the first step."""

    def __init__(self, victim: Victim, folder: Path) -> None:
        self._own = tempfile.TemporaryDirectory()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process lives
        self._process = subprocess.Popen(  # noqa: S603 - the command is the caller's
            victim.command(folder, Path(self._own.name)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )

    def run_and_kill(self, first: int, word: str, delay_secs: float) -> tuple[list[str], str]:
        """Wait for a line that begins with `word`, then `delay_secs`, then kill; the lines, and what else went wrong."""
        process = self._process
        hang = threading.Timer(_PATIENCE_SECS, self._kill)
        hang.start()
        try:
            # Whether it is there still is seen below.
            with suppress(BrokenPipeError):
                _pipe(process.stdin).write(f"{first}\n")
                _pipe(process.stdin).flush()
            told = _lines_until(_pipe(process.stdout), word)
            if told and told[-1].startswith(word):
                time.sleep(delay_secs)
        finally:
            hang.cancel()
            hang.join()
            # Looks without waiting for it: its number must stay its own until the group is killed.
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            self._kill()
        # To the end of the pipe, which every process of the group holds open while it lives.
        told += _lines_until(_pipe(process.stdout), None)
        code = process.wait()
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace")
        return told, "" if ended is None else f"the process ended by itself with {code}: {text[-2000:]}"

    def _kill(self) -> None:
        # The process leads the group and is not waited for yet, so that the number is nobody else's.
        os.killpg(self._process.pid, signal.SIGKILL)

    def __exit__(self, *_error: object) -> None:
        if self._process.returncode is None:
            self._kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                _pipe(pipe).close()
        self._errors.close()
        self._own.cleanup()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise RuntimeError("a process that was started with pipes has none")
    return pipe


def _lines_until(pipe: IO[str], word: str | None) -> list[str]:
    found: list[str] = []
    for line in pipe:
        found.append(line)
        if word is not None and line.startswith(word):
            break
    return found


# Command line.


@click.command()
@click.option("--rounds", default=20, show_default=True, help="Kills per mode.")
@click.option("--mode", "mode", default="all", show_default=True, type=click.Choice([*killed.MODES, "all"]))
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
@click.option("--ranks", default=1, show_default=True, type=click.Choice(["1", "2"]), help="Processes that save together.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the reports to this file too.")
def main(rounds: int, mode: str, seed: int, ranks: str, json_path: Path | None) -> None:
    """Kill saving processes at random moments and check what is left; exit code 1 if anything was lost or mixed."""
    reports = []
    click.echo(f"{'mode':12} {'rounds':>6} {'in a save':>9} {'lost':>4} {'mixed':>5} {'secs':>6}")
    for one in killed.MODES if mode == "all" else (mode,):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            report = run_rounds(one, rounds, seed, Path(folder) / "run", ranks=int(ranks))
        secs = time.monotonic() - began
        click.echo(f"{one:12} {report.rounds:6} {report.killed_in_save:9} {report.lost:4} {report.mixed:5} {secs:6.1f}")
        for problem in report.problems:
            click.echo(f"  {problem}")
        reports.append(report)
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(report) for report in reports], indent=1))
    if any(report.lost or report.mixed or report.problems for report in reports):
        sys.exit(1)


def _child(mode: str, folder: str, rank: str, size: str, meeting: str) -> None:
    killed.serve(mode, Path(folder), int(rank), int(size), Path(meeting))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        _child(*sys.argv[2:])
    else:
        main()
