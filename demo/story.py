"""What the demo prints: numbered sections of plain text, in which every claim is checked."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

_WIDTH = 116


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
        print(textwrap.fill(self._relative(text), _WIDTH, initial_indent=indent, subsequent_indent=indent), flush=True)

    def quote(self, lines: Iterable[str], most: int) -> None:
        """Lines as another program printed them; from the middle of long texts some are left out."""
        shown = [self._relative(line).rstrip() for line in lines]
        if len(shown) > most:
            last = 2
            left_out = f"... {len(shown) - most + 1} more lines ..."
            shown = [*shown[: most - last - 1], left_out, *shown[-last:]]
        for line in shown:
            print(f"   | {line}".rstrip(), flush=True)

    def row(self, title: str, cells: Iterable[object]) -> None:
        """A row of a table."""
        print(f"   {title:<24}" + "".join(f"{cell!s:>11}" for cell in cells), flush=True)

    def check(self, claim: bool, text: str) -> None:
        """A claim, and whether it is true."""
        self.claims += 1
        self.failed += not claim
        mark = "[ok]    " if claim else "[FAILED]"
        print(textwrap.fill(self._relative(text), _WIDTH, initial_indent=f"   {mark} ", subsequent_indent=" " * 12), flush=True)

    def _relative(self, text: str) -> str:
        return text.replace(f"{self._work}/", "")
