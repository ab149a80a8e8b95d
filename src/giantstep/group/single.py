"""A group of one: a process on its own."""

from __future__ import annotations

from giantstep.errors import GiantstepError
from giantstep.group.base import Answer


class SingleGroup:
    """Rank 0 of 1; `exchange` answers itself."""

    rank = 0
    size = 1

    def exchange(self, report: bytes, answer: Answer, phase: str, timeout_secs: float) -> bytes:
        return bytes(answer([report])[0])

    def withdraw(self, error: GiantstepError) -> None:
        """There is nobody to tell."""
