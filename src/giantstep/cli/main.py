"""`giantstep`: looking into checkpoints from a terminal.

Commands are imported only when they run, so that `--help` needs nothing but click. Exit codes: 0 all is well,
1 the checkpoint is damaged or cannot be opened, 2 the command line is wrong. `diff` is like diff: 1 says that checkpoints
differ, 2 that there is trouble.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import ClassVar

import click

from giantstep.errors import GiantstepError, KeyMismatchError


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are used; their one-line helps stand here."""

    lazy: ClassVar[dict[str, tuple[str, str]]] = {
        "diff": ("giantstep.cli.diff", "Say in what two checkpoints differ."),
        "doctor": ("giantstep.cli.doctor", "Say what is wrong with a path, and what to do."),
        "ls": ("giantstep.cli.ls", "List the tensors and objects of a checkpoint."),
        "materialize": ("giantstep.cli.materialize", "Make a checkpoint share no files with others."),
        "recover": ("giantstep.cli.recover", "Find what crashed saves left, and remove it."),
        "show": ("giantstep.cli.show", "Show one tensor: shape, dtype, where it lies, statistics, first values."),
        "verify": ("giantstep.cli.verify", "Check every byte of a checkpoint."),
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return None
        found: click.Command = import_module(self.lazy[cmd_name][0]).command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.lazy[name][1]) for name in self.list_commands(ctx)])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="giantstep", prog_name="giantstep")
def cli() -> None:
    """Look into giantstep checkpoints. Needs no GPU and no process group."""


def main() -> None:
    """Entry point: runs a command; an error of the library is printed in a line or two, without a traceback."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except GiantstepError as error:
        click.echo(f"giantstep: {error}", err=True)
        sys.exit(2 if isinstance(error, KeyMismatchError) else 1)
    except BrokenPipeError:
        # The reader of a pipe has had enough (giantstep ls | head); keep Python from complaining at exit.
        sys.stdout = None


if __name__ == "__main__":
    main()
