"""How the commands write sizes, shapes and tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def shape_text(shape: Sequence[int]) -> str:
    """`[1024, 4096]`; `[]` for a 0-d tensor."""
    return "[" + ", ".join(map(str, shape)) + "]"


def console(*, stderr: bool = False) -> Console:
    """A console that does not wrap or truncate when the output is no terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=not stream.isatty())


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Rows under a header; columns in `right` are right-aligned. Plain, aligned text where there is no terminal."""
    rows = [list(row) for row in rows]
    if not sys.stdout.isatty():
        widths = [max(len(row[column]) for row in [list(header), *rows]) for column in range(len(header))]
        for row in [list(header), *rows]:
            cells = (
                cell.rjust(width) if column in right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            sys.stdout.write("  ".join(cells).rstrip() + "\n")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, title in enumerate(header):
        table.add_column(title, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)
