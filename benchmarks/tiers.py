"""Node-local checkpoints: what a save costs the trainer, wire and memory, and how fast lost hosts are recovered from.

Every host is a process with one rank and a directory of its own, over gloo. In every round, in turn: a copy of the state in
memory, a send of it to the next rank by the calls that checkpoints use, and a plain write of it; a save without protection,
blocking and asynchronous saves with it; a restore with everything there, and one after hosts lost their directories, whose
values are compared. One round before is not measured. Compare ratios: those are taken within a round.

    python benchmarks/tiers.py [--folder /dev/shm] [--mib 64] [--rounds 3] [--cases copies ...] [--hosts 4] [--json FILE]
    python benchmarks/tiers.py --cases copies --hosts 2 --mib 512 --peer ENV/bin/python

`--peer` is an interpreter with nvidia-resiliency-ext (see `nvrx.py`), which after every round of the case "copies" is measured
with as many ranks and bytes. Memory of a host: state, a staged copy of it, and files; `--most-gib` bounds it for all together.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tiers_rank import BLOCKED, COMMITTED, MEMCPY, PLAIN_SAVE, RECOVER, RESTORE, SAVE, SEND, WRITE, Found, Job, run_rank

_MIB = 1 << 20
_MEMORY_FOLDER = "/dev/shm"  # noqa: S108 - the file system that is measured
_PROCESS_MIB = 80
_LEGEND = (
    "Seconds from the first rank's begin to the last one's end, medians over the rounds. / copy: of the seconds of one copy of "
    "the state in memory (memcpy); / plain: of a save without protection; / plain calls: of such a save, a plain send and a "
    "plain write of the state; / restore: of a restore with everything there. sent, stored: bytes that a rank "
    "sends, and that lie on a host, per byte of its state, mean and largest. extra MiB: peak resident memory of a rank beyond "
    "that at the start, largest, of a background save and of a blocking one. GiB/s: state of the lost hosts over the seconds "
    "to recover."
)


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of protection."""

    title: str
    hosts: int
    data_parallel: int = 1
    replicas: int = 0
    parity: tuple[int, int] | None = None
    lost: tuple[int, ...] = (1,)

    def peak_mib(self, mib: int) -> int:
        """Roughly, of all hosts together: state, what a raw copy or a save stages, files, and the interpreters."""
        k, m = self.parity or (1, 0)
        files = (1 + self.replicas) * mib + mib * m // k
        return self.hosts * (2 * mib + max(files, mib) + _PROCESS_MIB)


def _cases(hosts: int) -> dict[str, Case]:
    return {
        "none": Case("replicas=0", hosts, lost=()),
        "copies": Case("replicas=1", hosts, replicas=1),
        "twins": Case("replicas=1, data parallel 2", hosts, data_parallel=2, replicas=1),
        "parity-4-1": Case("parity=(4, 1)", 5, parity=(4, 1)),
        "parity-8-2": Case("parity=(8, 2)", 10, parity=(8, 2), lost=(1, 4)),
    }


class Results:
    """What all ranks of a case have measured."""

    def __init__(self, case: Case, mib: int, ranks: Sequence[Sequence[Found]]) -> None:
        self._case, self._bytes = case, mib * _MIB
        self._found: dict[str, dict[int, list[Found]]] = {}
        for one in (one for rank in ranks for one in rank):
            self._found.setdefault(one.operation, {}).setdefault(one.repetition, []).append(one)

    def secs(self, operation: str) -> dict[int, float]:
        """By round."""
        by_round = self._found.get(operation, {})
        return {number: max(one.end for one in all_) - min(one.begin for one in all_) for number, all_ in by_round.items()}

    def median(self, operation: str) -> float | None:
        """Seconds."""
        return median(found) if (found := list(self.secs(operation).values())) else None

    def ratio(self, operation: str, *others: str) -> float | None:
        """Of the seconds of the others together, median over the rounds."""
        mine, theirs = self.secs(operation), [self.secs(other) for other in others]
        numbers = [number for number in mine if all(number in other for other in theirs)]
        return median(mine[number] / sum(other[number] for other in theirs) for number in numbers) if numbers else None

    def every(self, operation: str, of: Callable[[Found], float]) -> list[float]:
        """A figure of all ranks and rounds."""
        return [of(one) for found in self._found.get(operation, {}).values() for one in found]

    def phases(self, operation: str) -> dict[str, float]:
        """Median over the rounds of the slowest rank's seconds."""
        rounds = list(self._found.get(operation, {}).values())
        names = dict.fromkeys(name for ranks in rounds for one in ranks for name in one.phases)
        return {name: median(max(one.phases.get(name, 0.0) for one in ranks) for ranks in rounds) for name in names}

    def figures(self) -> dict[str, Any]:
        """All of them, for the JSON file."""
        sent = [value / self._bytes for value in self.every(SAVE, lambda one: one.sent_bytes)]
        stored = [value / self._bytes for value in self.every(SAVE, lambda one: one.stored_bytes)]
        recover = self.median(RECOVER)
        lost = len(self._case.lost) * self._bytes / (1 << 30)
        return {
            **asdict(self._case),
            "state_mib": self._bytes // _MIB,
            "secs": {name: list(self.secs(name).values()) for name in self._found},
            "extra_mib": {name: max(self.every(name, lambda one: one.extra_bytes)) / _MIB for name in self._found},
            "phases": {name: found for name in self._found if (found := self.phases(name))},
            "sent": [sum(sent) / len(sent), max(sent)],
            "stored": [sum(stored) / len(stored), max(stored)],
            "recovered_gib_per_sec": lost / recover if recover else None,
            "blocked_of_copy": self.ratio(BLOCKED, MEMCPY),
            "save_of_plain": self.ratio(SAVE, PLAIN_SAVE),
            "save_of_plain_calls": self.ratio(SAVE, PLAIN_SAVE, SEND, WRITE),
            "recover_of_restore": self.ratio(RECOVER, RESTORE),
        }


def measure(case: Case, arguments: argparse.Namespace) -> tuple[Results, list[dict[str, Any]]]:
    """Run a case; what its ranks and the peer told."""
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder, prefix="giantstep-tiers-") as place,
        tempfile.TemporaryDirectory() as notes,
    ):
        peer = arguments.peer if case.replicas == 1 and case.data_parallel == 1 and case.hosts % 2 == 0 else ""
        job = Job(
            place,
            str(Path(notes) / "meeting"),
            notes,
            case.hosts,
            case.data_parallel,
            arguments.mib,
            case.replicas,
            case.parity,
            case.lost,
            arguments.rounds,
            peer,
        )
        _run_ranks(job)
        told = [json.loads((Path(notes) / f"{rank}.json").read_text()) for rank in range(case.hosts)]
    return Results(case, arguments.mib, [[Found(**one) for one in rank["found"]] for rank in told]), told[0]["peer"]


def _run_ranks(job: Job) -> None:
    """Start the ranks and wait for them; if one fails, end the others and raise."""
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=run_rank, args=(job, rank)) for rank in range(job.hosts)]
    for process in running:
        process.start()
    try:
        while (alive := [process for process in running if process.exitcode is None]) and not any(
            process.exitcode for process in running
        ):
            multiprocessing.connection.wait([process.sentinel for process in alive])
        for rank, process in enumerate(running):
            if process.exitcode:
                raise RuntimeError(f"rank {rank} ended with status {process.exitcode}")
    finally:
        for process in running:
            # Rank 0 ends a peer that it has started.
            process.terminate()
        for process in running:
            process.join(20)
            process.kill()
            process.join()


def _peer_results(case: Case, lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of the peer: by mode the figures of every round."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        if "operation" not in line:
            continue
        one = found.setdefault(line["mode"], {"title": f"nvrx, {line['mode']}", "hosts": case.hosts, "extra": 0})
        if line["operation"] == "save":
            one.setdefault(BLOCKED, {})[line["repetition"]] = line["blocked_secs"]
            one.setdefault(COMMITTED, {})[line["repetition"]] = line["saved_secs"]
            one["stored"] = line["disk_bytes"]
            one["extra"] = max(one["extra"], *line["extra_bytes"])
        elif line["operation"] == "recover":
            one.setdefault(RECOVER, {})[line["repetition"]] = line["secs"]
    return found


def _text(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _pair(values: Sequence[float]) -> str:
    return f"{values[0]:.2f}, {values[1]:.2f}" if abs(values[0] - values[1]) > 0.005 else f"{values[0]:.2f}"


_COLUMNS = (
    *("case", "hosts", "blocked s", "/ copy", "committed s", "blocking s", "/ plain", "/ plain calls", "sent", "stored"),
    *("extra MiB", "blocking", "restore s", "recover s", "/ restore", "GiB/s"),
)


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "case" else "right")
    return table


def _add_row(table: Table, case: Case, results: Results) -> None:
    figures = results.figures()
    extra = figures["extra_mib"]
    table.add_row(
        case.title,
        str(case.hosts),
        _text(results.median(BLOCKED)),
        _text(figures["blocked_of_copy"], 2),
        _text(results.median(COMMITTED)),
        _text(results.median(SAVE)),
        _text(figures["save_of_plain"], 2),
        _text(figures["save_of_plain_calls"], 2),
        _pair(figures["sent"]),
        _pair(figures["stored"]),
        f"{extra[COMMITTED]:.0f}",
        f"{extra[SAVE]:.0f}",
        _text(results.median(RESTORE)),
        _text(results.median(RECOVER)),
        _text(figures["recover_of_restore"], 2),
        _text(figures["recovered_gib_per_sec"], 2),
    )


def _add_peer_row(table: Table, case: Case, results: Results, peer: dict[str, Any], mib: int) -> None:
    copy = results.secs(MEMCPY)
    blocked, saved, recover = (list(peer[name].values()) for name in (BLOCKED, COMMITTED, RECOVER))
    stored = [one / (mib * _MIB) for one in peer["stored"]]
    blocking = peer["title"].endswith("blocking")
    cells = {
        "case": peer["title"],
        "hosts": str(peer["hosts"]),
        "stored": _pair([sum(stored) / len(stored), max(stored)]),
        "blocking" if blocking else "extra MiB": f"{peer['extra'] / _MIB:.0f}",
        "recover s": _text(median(recover)),
        "GiB/s": _text(len(case.lost) * mib / 1024 / median(recover), 2),
    }
    if blocking:
        cells["blocking s"] = _text(median(saved))
    else:
        cells |= {"blocked s": _text(median(blocked)), "committed s": _text(median(saved))}
        cells["/ copy"] = _text(median(secs / copy[number] for number, secs in peer[BLOCKED].items()), 2)
    table.add_row(*(cells.get(name, "") for name in _COLUMNS))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=_MEMORY_FOLDER)
    parser.add_argument("--mib", type=int, default=64, help="of state per host (default: 64)")
    parser.add_argument("--hosts", type=int, default=4, help="in cases without parity (default: 4)")
    parser.add_argument("--cases", nargs="+", choices=_cases(4), default=list(_cases(4)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", default="", help="interpreter with nvidia-resiliency-ext")
    parser.add_argument("--most-gib", type=float, default=6, help="refuse cases that need more memory (default: 6)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.hosts < 2 or (arguments.hosts % 2 and "twins" in arguments.cases):
        parser.error(f"--hosts {arguments.hosts} cannot be: at least 2, and an even number for 'twins'")
    for name in arguments.cases:
        case = _cases(arguments.hosts)[name]
        if (need := case.peak_mib(arguments.mib) / 1024) > arguments.most_gib:
            parser.error(f"'{name}' needs about {need:.1f} GiB of memory, more than --most-gib {arguments.most_gib:g}")
    return arguments


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    console = Console(width=200)
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores"
    console.print(f"{versions}, load {load} at the start")
    console.print(_LEGEND)
    table = _table(f"{arguments.mib} MiB of state per host, {arguments.rounds} rounds, {arguments.folder}")
    raw = Table("case", MEMCPY, SEND, WRITE, PLAIN_SAVE, "phases of a blocking save", title="seconds", title_justify="left")
    figures = []
    for name in arguments.cases:
        case = _cases(arguments.hosts)[name]
        print(case.title, file=sys.stderr, flush=True)
        results, peer = measure(case, arguments)
        _add_row(table, case, results)
        peers = _peer_results(case, peer)
        for one in peers.values():
            _add_peer_row(table, case, results, one, arguments.mib)
        phases = ", ".join(f"{phase} {secs:.2f}" for phase, secs in results.phases(SAVE).items())
        raw.add_row(case.title, *(_text(results.median(one)) for one in (MEMCPY, SEND, WRITE, PLAIN_SAVE)), phases)
        figures.append({**results.figures(), "peer": list(peers.values())})
    console.print(table)
    console.print(raw)
    console.print(f"load {', '.join(f'{one:.1f}' for one in os.getloadavg())} at the end")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
