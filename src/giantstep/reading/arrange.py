"""How the ranks of a load get their bytes: every rank reads for itself, or they read each block once and exchange.

Ranks report what they want (`report`) and rank 0 decides (`decide`); if there is an exchange, they report once more
their regions (`decide_clients`), so that readers learn whom they serve. Called by `loading`; `exchange` carries it out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import PeerFailureError
from giantstep.format.index import Index
from giantstep.format.record import CommitRecord
from giantstep.group.base import Parts
from giantstep.planning.block_sets import BlockTable
from giantstep.planning.columns import pack_column, unpack_column
from giantstep.planning.exchange_part import Clients, ExchangePart, exchange_part, spans_of
from giantstep.planning.exchange_plan import Assignment, assign, check_cells, demand_of, pack_blocks, worthwhile
from giantstep.planning.load_plan import LoadPlan
from giantstep.planning.load_tables import ChunkTable
from giantstep.shards.region import Int64s

Cell = tuple[int, ...] | Literal["auto", "none"]
"""Who exchanges: the ranks of a group, in any case; all if that is worth it; nobody."""

# Up to this many times the stored bytes, all ranks together, bytes count as read once.
_READ_ONCE = 1.25
_LARGEST_ITEM = 16
_EXCHANGE, _DIRECT, _CACHED = b"exchange", b"direct", b"cached"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of an exchange, as for `exchange_plan.assign`."""

    exchange_bytes: int
    read_bytes: int


class Arrangement:
    """What one rank knows of it.

    Args:
        record, index: the checkpoint.
        chunks: all chunks of the index.
        cell: who exchanges, as this rank is told.
        limits: bounds.
        access: on rank 0, [files, ranks] who can read what; None if all can read all.

    Attributes:
        exchanges: whether there is an exchange, once `adopt` was called.
        direct: whether to read past the page cache.
    """

    def __init__(
        self,
        record: CommitRecord,
        index: Index,
        chunks: ChunkTable,
        cell: Cell,
        limits: Limits,
        access: NDArray[np.bool_] | None = None,
    ) -> None:
        self.exchanges = False
        self.direct = True
        sizes = np.array([file.bytes for file in record.files], dtype=np.int64)
        self._blocks = BlockTable(index.file_block_ends, sizes, record.block_bytes)
        self._chunks = chunks
        self._cell = cell
        self._limits = limits
        self._access = access
        self._assignments: list[Assignment] = []
        self._spans: Parts | None = None

    def report(self, plan: LoadPlan) -> Parts:
        """What this rank would read for itself."""
        cell = self._cell if isinstance(self._cell, tuple) else ()
        head = (pack_column(np.array([plan.bytes])), pack_column(np.array(cell, dtype=np.int64)))
        return head if self._cell == "none" else (*head, *pack_blocks(*self._wanted_blocks(plan)))

    def _wanted_blocks(self, plan: LoadPlan) -> tuple[Int64s, Int64s]:
        """First and count of the runs of blocks that a plan reads."""
        size = self._blocks.block_bytes
        base = self._blocks.ends[np.array([read.file for read in plan.reads], dtype=np.int64)]
        first = base + np.array([read.start // size for read in plan.reads], dtype=np.int64)
        stop = base + np.array([-(-read.stop // size) for read in plan.reads], dtype=np.int64)
        if not len(first):
            return first, stop
        # Reads overlap where elements lie across the border of two segments.
        stop = np.maximum.accumulate(stop)
        begin = np.flatnonzero(np.concatenate(([True], first[1:] > stop[:-1])))
        first, stop = first[begin], np.append(stop[begin[1:] - 1], stop[-1])
        return first, stop - first

    def decide(self, reports: Sequence[Parts]) -> list[Parts]:
        """On rank 0: how bytes are read.

        Raises:
            DisagreementError: ranks name groups that do not fit together.
        """
        if self._cell != "none" and len(reports) > 1 and not self._splits_elements():
            cells = [tuple(range(len(reports)))] if self._cell == "auto" else check_cells([report[1] for report in reports])
            demands = [demand_of([report[2:] for report in reports], cell) for cell in cells]
            if self._cell != "auto" or self._access is not None or worthwhile(demands, self._blocks):
                sizes = {"exchange_bytes": self._limits.exchange_bytes, "read_bytes": self._limits.read_bytes}
                self._assignments = [assign(demand, self._blocks, access=self._access, **sizes) for demand in demands]
                return self._answers(len(reports))
        # Ranks that read the same bytes get them from the page cache after the first of them; reading past it would
        # fetch them from the device again and again.
        total, stored = sum(int(unpack_column(report[0])[0]) for report in reports), int(self._blocks.file_bytes.sum())
        return [(_DIRECT if total <= _READ_ONCE * stored else _CACHED,)] * len(reports)

    def _splits_elements(self) -> bool:
        """Whether elements may lie across the border of two blocks, which can have two readers. No writer makes that."""
        off = self._chunks.start % self._chunks.chunk_item_bytes() != 0
        return bool(off.any()) or self._blocks.block_bytes % _LARGEST_ITEM != 0

    def _answers(self, ranks: int) -> list[Parts]:
        answers: list[Parts] = [()] * ranks
        for assignment in self._assignments:
            for members, parts in assignment.answers():
                for rank in members.tolist():
                    answers[rank] = (_EXCHANGE, *parts)
        return answers

    @property
    def kind(self) -> str:
        """As `LoadReport.exchange`."""
        return ("all" if self._cell == "auto" else "group") if self.exchanges else "none"

    def adopt(self, answer: Parts) -> None:
        """Take over what rank 0 decided."""
        self.exchanges = answer[0] == _EXCHANGE
        self.direct = answer[0] != _CACHED
        if self.exchanges:
            self._spans = answer[1:]

    def decide_clients(self, reports: Sequence[Parts]) -> list[Parts]:
        """On rank 0: whom each reader serves."""
        answers: list[Parts] = [()] * len(reports)
        for assignment in self._assignments:
            for reader, parts in assignment.clients(reports, self._chunks, self._blocks):
                answers[reader] = parts
        return answers

    def fitted(self, rank: int, plan: LoadPlan, answer: Parts) -> tuple[int, ExchangePart]:
        """How often this rank must halve the units so that its messages keep the bounds, and what it then does.

        Units of one block may have larger ones. If all fit, it is not at all.
        """
        for halvings in itertools.count():
            part = self.part(rank, plan, answer, halvings)
            fits = part.packed_bytes <= self._limits.read_bytes and 2 * part.received_bytes <= self._limits.exchange_bytes
            if fits or part.unit_bytes == self._blocks.block_bytes:
                return halvings, part
        raise RuntimeError("unreachable: units end at one block")

    def part(self, rank: int, plan: LoadPlan, answer: Parts, halvings: int) -> ExchangePart:
        """What this rank does in the exchange, in units that all ranks have halved so many times."""
        if self._spans is None:
            raise PeerFailureError("rank 0 told nobody who reads what")
        spans = spans_of(self._spans, self._blocks.block_bytes, halvings)
        return exchange_part(rank, self._chunks, plan.found, spans, Clients.of(answer, self._chunks.width), self._blocks)
