"""`Chain`: which step each incremental save of a manager is compared with; when all is written. Called by `saves`."""

from __future__ import annotations

from collections.abc import Sequence


class Chain:
    """Saves of one manager, each compared with the one before, from one that writes everything to the next.

    Steps of other jobs, and those that were there before a restore, are never used: one of them may be damaged, which is
    why the job has gone back. Used on rank 0; the others learn from it.

    Args:
        on: whether saves are incremental at all.
        full_every: every so many write everything.
    """

    def __init__(self, *, on: bool, full_every: int) -> None:
        self.on, self._full_every = on, full_every
        self._since_full = 0
        self._last: int | None = None
        # Full saves of which is not known yet whether they are committed.
        self._full: set[int] = set()

    def previous(self, step: int, in_flight: Sequence[int]) -> int | None:
        """The step with which the next save is compared; None if it writes everything.

        Args:
            step: that it saves. One that is replaced is written in full: it may be damaged.
            in_flight: steps that are being saved and have not failed, in their order: they are finished before.
        """
        if not self.on:
            return None
        before = in_flight[-1] if in_flight else self._last
        if self._since_full == 0 or before is None or before == step:
            self._since_full = 1 % self._full_every
            self._full.add(step)
            return None
        self._since_full = (self._since_full + 1) % self._full_every
        return before

    def saved(self, step: int) -> None:
        """A step was committed."""
        self._last = step
        self._full.discard(step)

    def failed(self, step: int) -> None:
        """A save came to nothing. If it was to write everything, the next one must."""
        if step in self._full:
            self._full.discard(step)
            self._since_full = 0

    def begin_anew(self) -> None:
        """The next save writes everything."""
        self._since_full = 0
