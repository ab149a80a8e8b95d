"""Fuzzes for as long as asked, guided by coverage: `python -m tests.fuzz.run_atheris --target index --secs 600`.

Without a target all are run, one after another; a table at the end says what each did. Needs the `fuzz` extra. Called by
`make fuzz`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

NAMES = ("record", "index", "data_file", "object", "checkpoint")
ROOT = Path(__file__).parents[2]
# The fuzzer itself takes some more memory with every input, and so is started anew now and then.
ROUND_SECS = 600
# Exit codes of libFuzzer.
ENDS = {0: "time is up", 70: "hung", 71: "out of memory", 77: "crashed"}


@dataclass
class Row:
    """What came of one target."""

    target: str
    executions: int
    secs: int
    edges: int
    features: int
    findings: int
    end: str


def fuzz(target: str, secs: int, work: Path) -> Row:
    """Run one target for that long, in rounds that share a corpus; what they print goes to a file."""
    folder = work / target
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / "findings").glob("*"):
        old.unlink()
    log = folder / "log.txt"
    log.write_bytes(b"")
    row = Row(target, 0, 0, 0, 0, 0, ENDS[0])
    while row.secs < secs and row.end == ENDS[0]:
        _round(row, min(ROUND_SECS, secs - row.secs), folder, log)
    row.findings = len(list((folder / "findings").glob("*.bin")))
    return row


def _round(row: Row, secs: int, folder: Path, log: Path) -> None:
    """Add a round of a process of its own to the row."""
    command = [sys.executable, "-m", "tests.fuzz.atheris_child", row.target, str(secs), str(folder)]
    before = log.stat().st_size
    with log.open("ab") as output:
        ended = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False)
    text = log.read_bytes()[before:].decode(errors="replace")
    row.executions += _last(r"stat::number_of_executed_units:\s*(\d+)", text) or _last(r"^#(\d+)\s", text)
    row.secs += _last(r"Done \d+ runs in (\d+) second", text) or secs
    row.edges, row.features = _last(r"cov: (\d+)", text), _last(r"ft: (\d+)", text)
    row.end = ENDS.get(ended.returncode, f"exit code {ended.returncode}, see {log}")


def _last(pattern: str, text: str) -> int:
    numbers = re.findall(pattern, text, re.MULTILINE)
    return int(numbers[-1]) if numbers else 0


def table(rows: list[Row]) -> str:
    """The rows as text."""
    head = ("target", "executions", "seconds", "edges", "features", "findings", "end")
    cells = [head, *(tuple(str(getattr(row, name)) for name in ("target", "executions", "secs", *head[3:])) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)


def main() -> int:
    """Exit code 1 if anything was found."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--target", choices=(*NAMES, "all"), default="all")
    parser.add_argument("--secs", type=int, default=60, help="per target")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "fuzz", help="corpora, findings and logs")
    asked = parser.parse_args()
    rows = []
    for target in NAMES if asked.target == "all" else (asked.target,):
        rows.append(fuzz(target, asked.secs, asked.work))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(f"\n{table(rows)}\nfindings and logs: {asked.work}")
    return int(any(row.findings or row.end != ENDS[0] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
