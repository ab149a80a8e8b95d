"""`giantstep verify`: is every byte what was written?"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from giantstep.reports import size_text

if TYPE_CHECKING:
    from giantstep.reading.checkpoint import Checkpoint
    from giantstep.reading.verify import Damage, VerifyReport

_SHOWN = 20


@click.command("verify")
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def command(path: str, as_json: bool) -> None:
    """Check every byte of the checkpoint at PATH; exit with 1 if anything is broken, and say what."""
    from giantstep.opening import open_checkpoint

    checkpoint = open_checkpoint(path)
    report = _verify(checkpoint, quiet=as_json)
    if as_json:
        click.echo(json.dumps({"ok": report.ok, "bytes": report.bytes, "damages": [_as_json(d) for d in report.damages]}))
    else:
        _print(checkpoint, report)
    if not report.ok:
        sys.exit(1)


def _verify(checkpoint: Checkpoint, *, quiet: bool) -> VerifyReport:
    if quiet or not sys.stderr.isatty():
        return checkpoint.verify()
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from giantstep.cli.text import console

    total = checkpoint.record.index.bytes + sum(file.bytes for file in checkpoint.record.files)
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("verify", total=total)
        return checkpoint.verify(lambda count: bar.advance(task, count))


def _as_json(damage: Damage) -> dict[str, object]:
    return {
        "file": damage.file,
        "start": damage.start,
        "stop": damage.stop,
        "rank": damage.rank,
        "tensors": damage.tensors,
        "problem": damage.problem,
    }


def _print(checkpoint: Checkpoint, report: VerifyReport) -> None:
    if report.ok:
        tensors = checkpoint.record.totals.tensors
        click.echo(f"ok: {size_text(report.bytes)} in {report.files} files are what was written ({tensors} tensors)")
        return
    for damage in report.damages[:_SHOWN]:
        by = "" if damage.rank is None else f", written by rank {damage.rank}"
        click.echo(f"BROKEN {damage.file}{by}: {damage.problem}")
        if damage.tensors:
            more = f" and {len(damage.tensors) - 5} more" if len(damage.tensors) > 5 else ""
            click.echo(f"  affects {', '.join(damage.tensors[:5])}{more}")
    if len(report.damages) > _SHOWN:
        click.echo(f"... and {len(report.damages) - _SHOWN} more")
    files = len({damage.file for damage in report.damages})
    click.echo(f"broken places: {len(report.damages)}, files: {files}. Restore them from a copy, or load another step.")
