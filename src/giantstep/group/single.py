"""A group of one: a process on its own."""

from __future__ import annotations

from collections.abc import Sequence

from giantstep.errors import BadArgumentError, GiantstepError
from giantstep.group.base import Answer, Parcel, Parts


class SingleGroup:
    """Rank 0 of 1; `exchange` answers itself."""

    rank = 0
    size = 1

    def beside(self) -> SingleGroup:
        """Nothing is shared that calls could meet in."""
        return SingleGroup()

    def exchange(self, report: Parts, answer: Answer, phase: str, timeout_secs: float) -> Parts:
        return answer([report])[0]

    def transfer(self, sends: Sequence[Parcel], receives: Sequence[Parcel], phase: str, timeout_secs: float) -> None:
        """There is nobody to send to."""
        if sends or receives:
            raise BadArgumentError(f"a group of one has no rank {(*sends, *receives)[0].peer}")

    def withdraw(self, error: GiantstepError) -> GiantstepError:
        """There is nobody to tell."""
        error.agreed = True
        return error
