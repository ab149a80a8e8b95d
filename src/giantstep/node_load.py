"""What a load from the hosts' own places does besides: find the save, and have files sent where they are read. For `load`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import BadArgumentError, CorruptionError, GiantstepError, IncompleteError, StoreError
from giantstep.filling import Filling
from giantstep.format.index import Index
from giantstep.format.record import decode_record
from giantstep.group.base import Group, consult
from giantstep.mapping.checked_object import CheckedObject
from giantstep.mapping.describe import Described
from giantstep.planned_load import LoadPlanner, Subject
from giantstep.reading.arrange import Cell
from giantstep.reports import LoadedState
from giantstep.requesting import Matched
from giantstep.storage.record_file import read_record_bytes
from giantstep.tiers.gathering import PHASE, Gathering, damaged_here, files_of_objects
from giantstep.tiers.node_store import NodeStore

_LOG = logging.getLogger("giantstep")


class NodeLoad:
    """One load from the hosts' own places on one rank. Its methods are collective.

    Args:
        group: the ranks.
        store: the place on this rank's host.
        timeout_secs: for each agreement.
        excluded: files on this host that an earlier try has found to be damaged.

    Attributes:
        access: on rank 0, [files, ranks] who can read what; after `fetch`.
    """

    def __init__(self, group: Group, store: NodeStore, timeout_secs: float, excluded: Collection[str]) -> None:
        self.access: NDArray[np.bool_] | None = None
        self._gathering = Gathering(group, store, timeout_secs, excluded)
        self._alone = group.size == 1
        self._gathering.find()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done and why."""
        return self._gathering.notes

    @property
    def bytes_fetched(self) -> int:
        """Bytes of files that this rank received for its host."""
        return self._gathering.bytes_received

    def before_match(self, described: Described, index: Callable[[], Index]) -> None:
        """Have objects sent that are looked into before it is known which are loaded."""

        def ask() -> set[int]:
            looks = described.asks or any(isinstance(item.source, CheckedObject) for item in described.objects)
            return set(index().object_file.tolist()) if looks else set()

        self._gathering.fetch(ask)

    def fetch(self, cell: Cell, matched: Matched, planner: LoadPlanner, prepare: Callable[[], tuple[Filling, Subject]]) -> None:
        """Have sent what is read. The errors of `prepare` reach all ranks."""

        def ask() -> set[int]:
            filling, subject = prepare()
            index = subject.stored.index
            keys = [position.unique_key for source in matched.objects for position in source.positions]
            needed = files_of_objects(index, keys)
            if cell == "none" or self._alone:
                needed |= planner.files_of(subject, filling.filled)
            if len(filling.compared):
                needed |= planner.files_of(subject, filling.compared)
            for source in matched.dequantised:
                for row in source.parts.values():
                    needed |= set(index.chunk_file[slice(*index.tensor_chunk_ends[row : row + 2])].tolist())
            return needed

        self.access = self._gathering.fetch(ask)


def check_request(cell: Cell, on_corrupt: str) -> None:
    """Raise `BadArgumentError` for what a load from the hosts' own places cannot do."""
    if on_corrupt != "raise":
        raise BadArgumentError(
            f"on_corrupt={on_corrupt!r} cannot be for one node-local step: damaged copies are passed over in any case, and "
            "LocalTier.restore falls back to older steps"
        )
    # Groups may not hold all that their ranks want.
    if not isinstance(cell, str):
        raise BadArgumentError("exchange must be 'auto' or 'none' for a node-local checkpoint, not a group")


def passing_over_damage(
    group: Group, store: NodeStore, timeout_secs: float, attempt: Callable[[set[str]], LoadedState]
) -> LoadedState:
    """Load, and again without the copies that were found to be damaged or unreadable, as long as there are more of these.

    Args:
        group, store, timeout_secs: as for `NodeLoad`.
        attempt: loads; is given the names of this host's files that are known to be damaged.
    """
    damaged: set[str] = set()
    while True:
        try:
            return attempt(damaged)
        except (CorruptionError, IncompleteError, StoreError) as error:
            # Which copies are bad is looked for once all ranks have given up, as they all do alike: whoever finds damage in a
            # transfer withdraws, and others may be past it, in the exchange behind. What is not all there, no look finds.
            if isinstance(error, IncompleteError) and error.phase == PHASE:
                raise
            found = damaged_on_hosts(group, store, timeout_secs, damaged)
            if found is damaged:
                raise
            if group.rank == 0:
                _LOG.warning("%s: damaged copies are passed over: %s", store.location, error)
            damaged = found


def damaged_on_hosts(group: Group, store: NodeStore, timeout_secs: float, known: set[str]) -> set[str]:
    """Collective. Have every host look for damaged files of the save that it holds; those of this host, if any rank found more.

    Returns:
        `known` and what was found; the same set as `known` if no host found any more.
    """
    found = set(known)

    def look() -> bytes:
        try:
            record = decode_record(read_record_bytes(store), store.location)
            found.update(damaged_here(store, record))
        except (GiantstepError, OSError) as error:
            # What cannot be read here is not offered to others either.
            _LOG.warning("%s on host %s cannot be checked: %s", store.location, store.standing.host, error)
        return str(len(found - known)).encode("ascii")

    total = consult(
        group, "gather", timeout_secs, look, lambda reports: [str(sum(map(int, reports))).encode("ascii")] * len(reports)
    )
    return found if int(total) else known
