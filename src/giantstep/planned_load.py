"""`LoadPlanner`: what each rank of a load reads, and what it sends to whom; planned, or as an earlier load did it.

With a `PlanCache`, a rank whose request and whose chunks are as in a load before reports the number of that plan instead
of what it wants. If all ranks do, and name the same number, the plan is used again. Called by `load`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from giantstep.format.digests import ContentDigest
from giantstep.format.record import CommitRecord
from giantstep.group.base import Group, Parts, consult, consult_parts
from giantstep.options import LoadOptions
from giantstep.phases import settings
from giantstep.planning.exchange_part import ExchangePart, pack_regions
from giantstep.planning.load_plan import LoadPlan, plan_load
from giantstep.planning.load_tables import ChunkTable, WantedTable, tabulate_chunks, tabulate_wanted
from giantstep.planning.reuse import PLAN_ID_BYTES
from giantstep.reading.arrange import Arrangement, Cell, Limits
from giantstep.reading.exchange import telling
from giantstep.stored_state import StoredState
from giantstep.targets import Targets

# First part of a report, and of an answer.
_AS_BEFORE, _NEW = b"T", b"D"
_HOLDS, _TELL, _PLANNED = b"H", b"T", b"P"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to be planned on this rank: the regions that are to be filled from a checkpoint."""

    record: CommitRecord
    stored: StoredState
    filled: Targets


@dataclass(frozen=True, slots=True)
class KeptLoad:
    """What one rank keeps of a plan.

    Attributes:
        plan_id: the same on all ranks.
        work: what it reads for itself, or does in an exchange.
        direct: whether to read past the page cache.
        kind: as `LoadReport.exchange`.
    """

    plan_id: bytes
    work: LoadPlan | ExchangePart
    direct: bool
    kind: str


class LoadPlanner:
    """One load's planning on one rank.

    Attributes:
        plan: after `agree`.
        reused: whether an earlier load's plan is used.
        chunks: all chunks of the checkpoint, once `agree` has called for the subject.
    """

    plan: KeptLoad
    chunks: ChunkTable

    def __init__(self, group: Group, options: LoadOptions) -> None:
        self.reused = False
        self._group = group
        self._options = options

    def agree(self, prepare: Callable[[], Subject], cell: Cell, access: NDArray[np.bool_] | None = None) -> None:
        """Come to a plan.

        Args:
            prepare: makes the subject; its errors reach all ranks.
            cell: who exchanges.
            access: on rank 0, [files, ranks] who can read what; None if all can read all.

        Raises:
            DisagreementError: ranks name groups that do not fit together.
        """
        secs = self._options.timeout_secs
        self._access = access
        answer = consult_parts(self._group, "plan", secs, lambda: self._report(prepare(), cell), self._decide)
        if answer[0] == _TELL:
            answer = consult_parts(self._group, "plan", secs, self._tell, self._decide)
        self.reused = answer[0] == _HOLDS
        if self.reused and self._known is not None:
            self.plan = self._known
        else:
            self._adopt(answer[1], answer[2:])

    def plan_of(self, targets: Targets) -> LoadPlan:
        """Reads of this rank for some regions."""
        return self._planned(self._tabulated(targets))

    def files_of(self, subject: Subject, targets: Targets) -> set[int]:
        """Files of which this rank wants some bytes, for some regions; before or after `agree`."""
        index, options = subject.stored.index, self._options
        chunks = tabulate_chunks(index)
        wanted = tabulate_wanted(targets.rows, targets.regions, targets.partial, chunks.width)
        plan = plan_load(chunks, wanted, block_bytes=subject.record.block_bytes, buffer_bytes=options.buffer_bytes)
        return {read.file for read in plan.reads}

    def _tabulated(self, targets: Targets) -> WantedTable:
        return tabulate_wanted(targets.rows, targets.regions, targets.partial, self.chunks.width)

    def _planned(self, wanted: WantedTable) -> LoadPlan:
        block_bytes = self._subject.record.block_bytes
        return plan_load(self.chunks, wanted, block_bytes=block_bytes, buffer_bytes=self._options.buffer_bytes)

    # This rank's report.

    def _report(self, subject: Subject, cell: Cell) -> Parts:
        self._subject = subject
        self._cell = cell
        self.chunks = tabulate_chunks(subject.stored.index)
        self._known: KeptLoad | None = None
        cache = self._options.plan_cache
        if cache is not None:
            places = _digest(self.chunks)
            # Checkpoints whose chunks lie alike share one table.
            self.chunks = cache.get(("chunks", places)) or self.chunks
            cache.put(("chunks", places), self.chunks)
        self._wanted = self._tabulated(subject.filled)
        if cache is not None:
            self._key = ("load", self._group.rank, self._fingerprint(places))
            self._known = cache.get(self._key)
        return self._tell() if self._known is None else (_AS_BEFORE, self._known.plan_id)

    def _fingerprint(self, places: bytes) -> bytes:
        record, index = self._subject.record, self._subject.stored.index
        circumstances = [self._group.rank, self._group.size, self._cell, record.block_bytes, settings(self._options)]
        sizes = [file.bytes for file in record.files]
        text = json.dumps([circumstances, sizes], sort_keys=True).encode("ascii")
        return _digest(self._wanted, places, text, index.file_block_ends)

    def _tell(self) -> Parts:
        self._known = None
        self._reads = self._planned(self._wanted)
        limits = Limits(self._options.exchange_bytes, self._options.buffer_bytes)
        subject = self._subject
        self._arrangement = Arrangement(subject.record, subject.stored.index, self.chunks, self._cell, limits, self._access)
        return (_NEW, *self._arrangement.report(self._reads))

    # Rank 0's decision.

    def _decide(self, reports: Sequence[Parts]) -> list[Parts]:
        if any(report[0] == _AS_BEFORE for report in reports):
            return [(_HOLDS,) if len(set(reports)) == 1 else (_TELL,)] * len(reports)
        plan_id = secrets.token_bytes(PLAN_ID_BYTES)
        return [(_PLANNED, plan_id, *parts) for parts in self._arrangement.decide([report[1:] for report in reports])]

    # What follows from the plan.

    def _adopt(self, plan_id: bytes, answer: Parts) -> None:
        arrangement = self._arrangement
        arrangement.adopt(answer)
        work = self._exchange_part() if arrangement.exchanges else self._reads
        self.plan = KeptLoad(plan_id, work, arrangement.direct, arrangement.kind)
        if self._options.plan_cache is not None:
            self._options.plan_cache.put(self._key, self.plan)

    def _exchange_part(self) -> ExchangePart:
        """What this rank does in the exchange, in units that are small enough for all ranks."""
        rank, secs, arrangement = self._group.rank, self._options.timeout_secs, self._arrangement
        clients = consult_parts(self._group, "plan", secs, lambda: pack_regions(self._wanted), arrangement.decide_clients)
        fitted: dict[bytes, ExchangePart] = {}

        def fit() -> bytes:
            halvings, part = arrangement.fitted(rank, self._reads, clients)
            fitted[bytes([halvings])] = part
            return bytes([halvings])

        agreed = consult(self._group, "plan", secs, fit, lambda reports: [max(reports)] * len(reports))
        if agreed not in fitted:
            with telling(self._group, "plan"):
                fitted[agreed] = arrangement.part(rank, self._reads, clients, agreed[0])
        return fitted[agreed]


def _digest(*items: Any) -> bytes:
    """16 bytes of tables, arrays and texts."""
    state = ContentDigest()
    for item in items:
        columns = [getattr(item, name.name) for name in fields(item)] if hasattr(item, "__dataclass_fields__") else [item]
        for column in columns:
            data = np.ascontiguousarray(np.frombuffer(column, np.uint8) if isinstance(column, bytes) else column)
            state.update(f"{data.dtype} {data.shape} ".encode("ascii"))
            state.update(data.reshape(-1).view(np.uint8).data)
    high, low = state.halves()
    return high.to_bytes(8, "little") + low.to_bytes(8, "little")
