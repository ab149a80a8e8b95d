"""`giantstep recover`: what crashed saves left, and removing it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from giantstep.reports import size_text

if TYPE_CHECKING:
    from giantstep.recovery import Finding


@click.command("recover")
@click.argument("path")
@click.option("--yes", is_flag=True, help="Remove what is certainly of no use. Without it nothing is changed.")
@click.option(
    "--older-than",
    metavar="SECS",
    type=click.FloatRange(min=0),
    default=3600.0,
    show_default=True,
    help="Leave what saves wrote that began later than so many seconds ago: they may be running.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def command(path: str, yes: bool, older_than: float, as_json: bool) -> None:
    """Find what crashed saves and removals left at PATH, a step or a root of steps; with --yes remove it.

    Exits with 0 if there is nothing to be removed, or no more, and with 1 if there is.
    """
    from giantstep.recovery import clean, inspect

    findings = inspect(path, older_than_secs=older_than)
    removed = clean(findings) if yes else []
    remaining = sum(finding.removable for finding in (_look_again(path, older_than) if yes else findings))
    if as_json:
        found = [_as_json(finding) for finding in findings]
        click.echo(json.dumps({"findings": found, "removed": removed, "remaining": remaining}, indent=1))
    else:
        _print(findings, removed)
        if remaining:
            again = "changed meanwhile: run it again" if yes else "giantstep recover --yes removes them"
            click.echo(f"to be removed: {remaining} ({again})")
    if remaining:
        sys.exit(1)


def _look_again(path: str, older_than: float) -> list[Finding]:
    from giantstep.errors import CheckpointNotFoundError
    from giantstep.recovery import inspect

    try:
        return inspect(path, older_than_secs=older_than)
    except CheckpointNotFoundError:
        # All that was there was of no use, and the directory went with it.
        return []


def _as_json(finding: Finding) -> dict[str, object]:
    return {
        "path": finding.path,
        "kind": finding.kind.value,
        "save_id": finding.save_id,
        "begun": None if finding.begun is None else finding.begun.isoformat(),
        "bytes": finding.bytes,
        "words": finding.words,
        "removable": finding.removable,
        "why": finding.why,
        "files": finding.files,
    }


def _print(findings: list[Finding], removed: list[str]) -> None:
    if not findings:
        click.echo("nothing found: all that is there belongs to good checkpoints")
        return
    for finding in findings:
        begun = "" if finding.begun is None else f", begun {finding.begun:%Y-%m-%d %H:%M:%S} UTC"
        size = f"files: {len(finding.files)}, {size_text(finding.bytes)}{begun}"
        click.echo(f"{finding.kind.value.upper()} {finding.path} ({size})")
        click.echo(f"  {finding.words}")
        click.echo(f"  {'of no use' if finding.removable else 'stays'}: {finding.why}")
    if removed:
        click.echo(f"removed {len(removed)} files and directories")
    elif not any(finding.removable for finding in findings):
        click.echo("nothing to be removed")
