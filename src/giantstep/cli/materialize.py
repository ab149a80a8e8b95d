"""`giantstep materialize`: a step that shares no files with others."""

from __future__ import annotations

import click


@click.command("materialize")
@click.argument("step")
@click.option("--out", metavar="DIR", help="Write the self-contained step there instead, and leave STEP as it is.")
def command(step: str, out: str | None) -> None:
    """Make the checkpoint STEP self-contained: copy all that it shares with other steps into files of its own."""
    from giantstep.materializing import materialize

    click.echo(str(materialize(step, out)))
