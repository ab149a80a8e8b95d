"""`Comparison`: a rank's part in finding what of a save lies unchanged in the previous step. Called by `saving`.

heads -> of what digests are to be taken -digests_of-> digests -> (rank 0: `reusing`) -> what becomes of every entry
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from giantstep.group.base import Group, Parts, consult, consult_parts
from giantstep.options import SaveOptions
from giantstep.planning.columns import pack_column, unpack_column
from giantstep.planning.contents import Verdict
from giantstep.planning.index_plan import Reused
from giantstep.planning.previous import CHANGED, SETTLED
from giantstep.planning.save_plan import SavePlan
from giantstep.reusing import Reuse
from giantstep.sources import Content, content_report
from giantstep.storage.base import Store
from giantstep.writing.contents import digests_of, heads_of

Rows = NDArray[np.intp]


class Comparison:
    """One save's comparison on one rank.

    Args:
        group: ranks that save.
        store: where the checkpoint is to be.
        previous: the previous step.
        options: of the save.
        planned: the plan; called on rank 0 alone.

    Attributes:
        verdict: what came of it; after `run`.
    """

    verdict: Verdict

    def __init__(
        self, group: Group, store: Store, previous: Store, options: SaveOptions, planned: Callable[[], SavePlan]
    ) -> None:
        self._group = group
        self._options = options
        self._planned = planned
        self._reuse = Reuse(store, previous, options)

    def run(self, content: Callable[[], Content], threads: int, check: Callable[[], None]) -> None:
        """Take digests of what is to be written, and find what the previous step holds of it. Only links are made.

        Args:
            content: what this rank is to write; may be called twice.
            threads: how many take digests.
            check: raises if the checkpoint must not be committed.
        """
        rows = self._look(content, check)

        def digest() -> Parts:
            check()
            entries = content()
            wanted = np.ones(len(entries.sources.bytes), dtype=bool)
            wanted[: entries.chunks] = rows
            digests = digests_of(entries.sources, np.flatnonzero(wanted), threads, check)
            return content_report(entries, digests).encode()

        def decide(reports: Sequence[Parts]) -> list[Parts]:
            return self._reuse.decide(self._planned(), reports)

        try:
            answer = consult_parts(self._group, "compare", self._options.timeout_secs, digest, decide, "link")
        except BaseException:
            # Nothing of this save was published, and nothing will be.
            self.give_up()
            raise
        self.verdict = Verdict.decode(answer)

    def _look(self, content: Callable[[], Content], check: Callable[[], None]) -> NDArray[np.bool_]:
        """Of which chunks of this rank digests are to be taken: not of those that change at every step."""

        def heads() -> bytes:
            check()
            entries = content()
            return pack_column(heads_of(entries.sources)[: entries.chunks])

        def decide(reports: Sequence[bytes]) -> list[bytes]:
            found = [unpack_column(report, np.uint64).reshape(-1, 1) for report in reports]
            return [pack_column(wanted) for wanted in self._reuse.look(self._planned(), found)]

        answer = consult(self._group, "compare", self._options.timeout_secs, heads, decide)
        return unpack_column(answer).astype(bool)

    def groups(self) -> list[Rows] | None:
        """Entries that this rank writes, each group into files of its own; None if all are written together."""
        state = self.verdict.state
        if (state == CHANGED).all():
            return None
        # What has settled is in files of its own, which the next save can use again.
        return [np.flatnonzero(state == SETTLED), np.flatnonzero(state == CHANGED)]

    @property
    def reused(self) -> Reused:
        """For the index; on rank 0."""
        return self._reuse.reused

    def give_up(self) -> None:
        """The save came to nothing, and nothing was published: rank 0 deletes the links that it made."""
        self._reuse.give_up()
