"""Runs the faults against giantstep and, where they are installed, others; prints a table of what each did.

python faults/run.py [--rounds 8] [--only killed_new_steps ...] [--library giantstep ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from libraries import LIBRARIES, version_of
from scenarios import SCENARIOS, Effort, Scenario
from verdicts import Outcome, Verdict


def tried(scenario: Scenario, library: str, effort: Effort, parent: Path) -> Verdict:
    """What a library does about a fault; a failure of the scenario itself is no verdict."""
    with tempfile.TemporaryDirectory(dir=parent, prefix=f"{scenario.__name__}-") as folder:
        return scenario(library, Path(folder), effort)


def main() -> None:
    """Run all that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    names = [scenario.__name__ for scenario in SCENARIOS]
    parser.add_argument("--rounds", type=int, default=8, help="how often each kind of kill is tried")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    parser.add_argument("--library", nargs="*", choices=list(LIBRARIES), default=list(LIBRARIES))
    parser.add_argument("--dir", type=Path, default=Path("build/faults"), help="where checkpoints are made: a real disk")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.dir.mkdir(parents=True, exist_ok=True)
    versions = {name: version_of(name) for name in arguments.library}
    console = Console(width=180)
    for name, version in versions.items():
        console.print(f"{name} {version or 'is not installed'}: {LIBRARIES[name][1].settings}")  # type: ignore[attr-defined]
    present = [name for name, version in versions.items() if version]
    table = Table("fault", *present)
    results: dict[str, dict[str, list[str]]] = {}
    effort = Effort(arguments.rounds, arguments.seed)
    for scenario in SCENARIOS:
        if scenario.__name__ not in arguments.only:
            continue
        row = {name: tried(scenario, name, effort, arguments.dir.absolute()) for name in present}
        results[scenario.__name__] = {name: [verdict.outcome.value, verdict.note] for name, verdict in row.items()}
        title = (scenario.__doc__ or scenario.__name__).strip()
        console.print(f"{title}: " + ", ".join(f"{name} {verdict}" for name, verdict in row.items()))
        table.add_row(title, *(_colored(row[name]) for name in present))
    console.print(table)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        about = {"versions": versions, "python": platform.python_version(), "rounds": arguments.rounds, "results": results}
        arguments.json.write_text(json.dumps(about, indent=2) + "\n")


def _colored(verdict: Verdict) -> str:
    color = "red" if verdict.outcome.is_bad else "green" if verdict.outcome is Outcome.SURVIVES else "yellow"
    return f"[{color}]{verdict}[/{color}]"


if __name__ == "__main__":
    main()
