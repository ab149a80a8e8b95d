"""`giantstep doctor`: what is wrong with a path, and what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from giantstep.diagnosis import Diagnosis, Problem

_SHOWN = 20


@click.command("doctor")
@click.argument("path")
@click.option("--full", is_flag=True, help="Read every byte and compare it with its checksum.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def command(path: str, full: bool, as_json: bool) -> None:
    """Say what is wrong with PATH, a step or a root of steps, and what to do; exit with 1 if anything is."""
    from giantstep.diagnosis import diagnose

    found = diagnose(path, full=full)
    if as_json:
        click.echo(json.dumps({"healthy": found.healthy, **asdict(found)}, indent=1))
    else:
        _print(found)
    if not found.healthy:
        sys.exit(1)


def _print(found: Diagnosis) -> None:
    click.echo(f"{found.location}: {'healthy' if found.healthy else 'NOT HEALTHY'} ({found.looked_at})")
    _print_all("PROBLEM", found.problems)
    _print_all("NOTE", found.notes)
    if found.loads_instead:
        click.echo(f"loads instead: {found.loads_instead}")


def _print_all(title: str, problems: Sequence[Problem]) -> None:
    for problem in problems[:_SHOWN]:
        click.echo(f"{title} {problem.what}")
        click.echo(f"  why: {problem.why}")
        if problem.remedy:
            click.echo(f"  to do: {problem.remedy}")
    if len(problems) > _SHOWN:
        click.echo(f"... and {len(problems) - _SHOWN} more")
