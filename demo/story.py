"""What the demo prints: numbered sections of plain text, in which every claim is checked."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

_WIDTH = 116
# Wider, for the tables of other programs.
_QUOTE_WIDTH = 124


class Story:
    """Prints as it goes and counts the claims.

    Args:
        work: printed paths below it are made relative to it.
    """

    def __init__(self, work: Path) -> None:
        self._work = work
        self._sections = 0
        self.claims = 0
        self.failed = 0

    def section(self, title: str) -> None:
        """Begin the next section."""
        self._sections += 1
        print(f"\n{self._sections}. {title}", flush=True)

    def say(self, text: str, indent: str = "   ") -> None:
        """A paragraph."""
        self._fill(text, indent, indent)

    def quote(self, lines: Iterable[str], most: int) -> None:
        """Lines as another program printed them; from the middle of long texts some are left out."""
        shown = [line.rstrip() for line in lines]
        if len(shown) > most:
            last = 2
            left_out = f"... {len(shown) - most + 1} more lines ..."
            shown = [*shown[: most - last - 1], left_out, *shown[-last:]]
        for line in shown:
            self._fill(line, "   | ", "   |       ", _QUOTE_WIDTH)

    def row(self, title: str, cells: Iterable[object]) -> None:
        """A row of a table."""
        print(f"   {title:<24}" + "".join(f"{cell!s:>11}" for cell in cells), flush=True)

    def check(self, claim: bool, text: str) -> None:
        """A claim, and whether it is true."""
        self.claims += 1
        self.failed += not claim
        mark = "[ok]    " if claim else "[FAILED]"
        self._fill(text, f"   {mark} ", " " * 12)

    def _fill(self, text: str, first: str, rest: str, width: int = _WIDTH) -> None:
        """Print, broken at spaces, with one indent for the first line and one for the others."""
        text = text.replace(f"{self._work}/", "")
        filled = textwrap.fill(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
        print(filled or first.rstrip(), flush=True)
