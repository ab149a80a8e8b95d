"""Kills processes that save, at any moment, and looks for what was lost: `python tests/faults/killing.py --rounds 200`.

A round starts a process with two ranks as threads, or two processes with one rank each, that save one numbered state after
another and tell when a save begins and when it is done. At a random moment of a random save it is killed (SIGKILL; of two
processes, one or both). Then what was done must be there to the bit, nothing may be there that was not begun, what must not be
there yet may be there whole or not at all, and the next save must work over what was left. Rounds of one mode go on in one
place, so that each begins with what the one before left.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import random
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import giantstep as gs
from giantstep.commit.remove import remove_checkpoint
from giantstep.errors import GiantstepError, OpenError, PeerError
from giantstep.steps import StepState, scan_steps, step_name
from giantstep.storage.local import LocalStore
from giantstep.testing.crash_points import leftovers
from giantstep.testing.ranks import run_ranks

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "giantstep.async_saving", "giantstep.testing.crash_points"])
RANKS = 2
# Steps that are not removed.
_KEPT = 2
_JOIN_SECS = 60.0


@dataclass(frozen=True)
class Mode:
    """How is saved.

    Attributes:
        steps: each to a directory of its own, of which older ones are removed; otherwise all to one path.
        in_flight: how many saves are unfinished at a time; 0: `save` instead of `async_save`.
        processes: ranks are processes, not threads of one.
    """

    steps: bool
    in_flight: int
    processes: bool = False


MODES = {
    "overwrite": Mode(steps=False, in_flight=0),
    "overwrite-async": Mode(steps=False, in_flight=1),
    "overwrite-in-flight": Mode(steps=False, in_flight=3),
    "steps": Mode(steps=True, in_flight=0),
    "steps-in-flight": Mode(steps=True, in_flight=3),
    "processes-overwrite": Mode(steps=False, in_flight=0, processes=True),
    "processes-steps-in-flight": Mode(steps=True, in_flight=3, processes=True),
}


def values_of(number: int, elements: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The tensor of a save: no element is the same in two of them."""
    return np.arange(elements, dtype=np.int64) * 1_000_003 + number


def place_of(root: Path, mode: Mode, number: int) -> Path:
    return root / step_name(number) if mode.steps else root / "checkpoint"


# In the processes that are killed.


def _save_on(
    rank: int, group: Any, root: Path, mode: Mode, first: int, elements: int, tell: Callable[[str, int], None]
) -> None:
    options = gs.SaveOptions(timeout_secs=15, max_pending=max(1, mode.in_flight), writer_threads=1, buffer_bytes=1 << 20)
    part = elements // RANKS
    pending: deque[tuple[int, gs.PendingSave]] = deque()

    def done(number: int) -> None:
        tell("done", number)
        if mode.steps and rank == 0 and number - _KEPT >= first:
            tell("removing", number - _KEPT)
            remove_checkpoint(LocalStore(place_of(root, mode, number - _KEPT)))

    number = first
    while True:
        whole = torch.from_numpy(values_of(number, elements)[rank * part : (rank + 1) * part])
        state = {"w": gs.ShardedTensor.from_rank_offsets("w", whole, (0, rank, RANKS)), "number": number}
        tell("begin", number)
        place = place_of(root, mode, number)
        if mode.in_flight:
            pending.append((number, gs.async_save(state, place, process_group=group, options=options)))
            while len(pending) >= mode.in_flight:
                oldest, handle = pending.popleft()
                handle.result()
                done(oldest)
        else:
            gs.save(state, place, process_group=group, options=options)
            done(number)
        number += 1


def _process(rank: int | None, store: str, pipe: Any, *arguments: Any) -> None:
    torch.set_num_threads(1)
    lock = threading.Lock()

    def tell(what: str, value: Any) -> None:
        # Messages are so short that they are written whole or not at all.
        with lock:
            pipe.send((what, value))

    if rank is None:
        run_ranks(RANKS, lambda group: _save_on(group.rank, group, *arguments, tell))
        return
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    try:
        _save_on(rank, None, *arguments, tell)
    except GiantstepError as error:
        tell("raised", (isinstance(error, PeerError), f"{type(error).__name__}: {error}"))


# In the process that kills.


@dataclass
class Told:
    """What the processes of a round told."""

    begun: int = 0
    done: int = 0
    all_done: set[int] = field(default_factory=set)
    removing: set[int] = field(default_factory=set)
    raised: list[tuple[bool, str]] = field(default_factory=list)
    save_secs: float = 0.05
    began_at: float = 0.0

    def hear(self, what: str, value: Any) -> None:
        """Take a message in."""
        if what == "begin":
            self.begun, self.began_at = max(self.begun, value), time.monotonic()
        elif what == "done":
            self.done = max(self.done, value)
            self.all_done.add(value)
            self.save_secs = time.monotonic() - self.began_at
        elif what == "removing":
            self.removing.add(value)
        else:
            self.raised.append(value)


@dataclass
class Result:
    """What all rounds of a mode came to."""

    mode: str
    rounds: int = 0
    saves_begun: int = 0
    saves_done: int = 0
    killed_in_a_save: int = 0
    lost_checkpoints: int = 0
    hung: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


class LostError(AssertionError):
    """A checkpoint is gone, or is not what was saved."""


class NoRoundError(Exception):
    """The round did not take place as it should; nothing is known to be lost."""


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise LostError(what)


def _number_at(place: Path, elements: int) -> int:
    """The number of the state at a place, every element compared."""
    checkpoint = gs.open_checkpoint(place)
    number = int(checkpoint.common["number"])
    _require(checkpoint.verify().ok, f"{place} does not verify")
    same = np.array_equal(checkpoint["w"][...], values_of(number, elements))
    _require(same, f"{place} is not what save {number} stored")
    return number


def _check_path(root: Path, mode: Mode, told: Told, before: int, elements: int) -> str:
    place = place_of(root, mode, 0)
    at_least = max(before, told.done)
    if at_least == 0 and not (place / "checkpoint.json").exists():
        return "none yet"
    number = _number_at(place, elements)
    _require(at_least <= number <= max(told.begun, before), f"save {number} is there; {at_least} was done, {told.begun} begun")
    return "old" if number == at_least else "new"


def _check_steps(root: Path, mode: Mode, told: Told, before: int, elements: int) -> str:
    found = scan_steps(LocalStore(root))
    bad = [entry for entry in found if entry.state not in (StepState.COMMITTED, StepState.UNFINISHED)]
    _require(not bad, f"damaged: {bad}")
    whole = {entry.step for entry in found if entry.record is not None}
    for step in whole:
        _require(_number_at(place_of(root, mode, step), elements) == step, f"step {step} holds another one")
    needed = {number for number in told.all_done if number not in told.removing} | ({before} if before else set())
    _require(needed <= whole, f"steps {sorted(needed - whole)} are gone of {sorted(needed)}")
    _require(all(step <= max(told.begun, before) for step in whole), f"steps {sorted(whole)}, begun {told.begun}")
    return "new" if whole - needed - told.removing else "old"


def _save_next(root: Path, mode: Mode, number: int, elements: int) -> None:
    """As a job that starts again does: over what was left."""
    place = place_of(root, mode, number)
    gs.save({"w": torch.from_numpy(values_of(number, elements)), "number": number}, place)
    _require(_number_at(place, elements) == number, "the next save stored something else")
    _require(leftovers(LocalStore(place)) == [], f"left over: {leftovers(LocalStore(place))}")
    if mode.steps:
        for entry in scan_steps(LocalStore(root)):
            if entry.step != number:
                remove_checkpoint(LocalStore(place_of(root, mode, entry.step)))
        _require([entry.step for entry in scan_steps(LocalStore(root))] == [number], "what was left cannot be removed")


def _start(mode: Mode, root: Path, first: int, elements: int, folder: str) -> tuple[list[Any], list[Any]]:
    pipes, processes = [], []
    for rank in range(RANKS) if mode.processes else [None]:
        receiver, sender = _CONTEXT.Pipe(duplex=False)
        store = f"file://{folder}/store-{root.name}-{first}"
        process = _CONTEXT.Process(target=_process, args=(rank, store, sender, root, mode, first, elements), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    return pipes, processes


def _hear_until(pipes: list[Any], told: Told, stop: Callable[[], bool], deadline: float) -> None:
    """Take messages in until `stop`, the end of all processes, or the deadline."""
    left = list(pipes)
    while left and not stop() and time.monotonic() < deadline:
        for pipe in multiprocessing.connection.wait(left, timeout=0.001):
            try:
                told.hear(*pipe.recv())  # type: ignore[union-attr]
            except (EOFError, OSError):
                left.remove(pipe)


def _kill_in_a_save(mode: Mode, root: Path, first: int, elements: int, folder: str, chance: random.Random) -> tuple[Told, int]:
    """Start, kill, and hear to the end; what was told, and how many processes did not end."""
    pipes, processes = _start(mode, root, first, elements, folder)
    # Processes that have not met yet wait for one another as long as `timeout_secs`, which would only take long.
    told, target, hung = Told(), first + chance.randrange(5) + mode.processes, 0
    _hear_until(pipes, told, lambda: told.begun >= target, time.monotonic() + _JOIN_SECS)
    # Anywhere in the save that has begun, or in the one after it.
    moment = told.began_at + chance.uniform(0, 1.5) * min(told.save_secs, 2.0)
    _hear_until(pipes, told, lambda: time.monotonic() >= moment, time.monotonic() + _JOIN_SECS)
    victims = chance.choice([processes, processes[:1], processes[-1:]])
    for victim in victims:
        victim.kill()
    _hear_until(pipes, told, lambda: False, time.monotonic() + _JOIN_SECS)
    for process in processes:
        process.join(_JOIN_SECS)
        if process.is_alive():
            process.kill()
            process.join()
            hung += 1
    for pipe in pipes:
        pipe.close()
    return told, hung


def run_rounds(name: str, rounds: int, seed: int, elements: int, folder: str) -> Result:
    """All rounds of a mode, in a folder of their own."""
    mode, result, chance = MODES[name], Result(name), random.Random(f"{name} {seed}")
    root = Path(folder, name)
    root.mkdir()
    begin, number = time.monotonic(), 0
    for row in range(rounds):
        first, before = number + 1, number
        told, hung = _kill_in_a_save(mode, root, first, elements, folder, chance)
        result.rounds += 1
        result.saves_begun += max(0, told.begun - first + 1)
        result.saves_done += len(told.all_done)
        result.killed_in_a_save += told.begun > told.done
        result.hung += hung
        number = max(told.begun, before) + 1
        try:
            strange = [text for of_peer, text in told.raised if not of_peer]
            if told.begun < first or strange:
                raise NoRoundError(f"no save began, or a survivor raised what is no peer's: {strange}")
            check = _check_steps if mode.steps else _check_path
            kind = check(root, mode, told, before, elements)
            result.kinds[kind] = result.kinds.get(kind, 0) + 1
            _save_next(root, mode, number, elements)
        except (LostError, NoRoundError, GiantstepError) as error:
            result.lost_checkpoints += isinstance(error, LostError | OpenError)
            result.problems.append(f"round {row}: {type(error).__name__}: {error}")
            break
    result.seconds = round(time.monotonic() - begin, 1)
    return result


def main() -> int:
    """Rounds of all modes, or of those named; what they came to, as text and as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="in all, shared out among the modes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", action="append", choices=sorted(MODES), help="may be given several times; default: all")
    parser.add_argument("--elements", type=int, default=1 << 19, help="of 8 bytes, per save")
    parser.add_argument("--folder", help="where the places are made; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    names = arguments.mode or list(MODES)
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for row, name in enumerate(names):
            rounds = len(range(row, arguments.rounds, len(names)))
            result = run_rounds(name, rounds, arguments.seed, arguments.elements, folder)
            results.append(result)
            kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(result.kinds.items()))
            print(
                f"{name}: {result.rounds} rounds, {result.saves_begun} saves begun, {result.saves_done} done, found {kinds}; "
                f"lost {result.lost_checkpoints}, hung {result.hung}, {result.seconds} s",
                *result.problems,
                sep="\n  ",
                flush=True,
            )
    totals = {
        "rounds": sum(result.rounds for result in results),
        "saves_begun": sum(result.saves_begun for result in results),
        "lost_checkpoints": sum(result.lost_checkpoints for result in results),
        "hung": sum(result.hung for result in results),
        "problems": sum(len(result.problems) for result in results),
    }
    print(json.dumps(totals))
    if arguments.json:
        arguments.json.write_text(json.dumps({**totals, "modes": [asdict(result) for result in results]}, indent=2) + "\n")
    return 1 if totals["problems"] or totals["hung"] else 0


if __name__ == "__main__":
    sys.exit(main())
