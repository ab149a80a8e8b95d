"""The index of the checkpoint that was loaded last, kept in a `PlanCache` for the next load of the same one. For `load`."""

from __future__ import annotations

from dataclasses import dataclass

from giantstep.plan_cache import PlanCache
from giantstep.reading.checkpoint import Preface
from giantstep.storage.base import Store
from giantstep.stored_state import StoredState

# One index alone: it may be large, and mostly the same checkpoint is loaded again or never.
_KEY = ("index",)


@dataclass(frozen=True, slots=True)
class KeptIndex:
    """An index that was read and checked.

    Attributes:
        location: of the checkpoint.
        digest: of the head of the index, from the commit record: it says whether a checkpoint is the same save.
        preface: index and common state; the latter is decoded for each load anew.
        stored: its names.
    """

    location: str
    digest: str
    preface: Preface
    stored: StoredState


def kept_index(cache: PlanCache, store: Store) -> KeptIndex | None:
    """What is kept of the checkpoint at a place, if it is the one that was loaded last."""
    found: KeptIndex | None = cache.get(_KEY)
    return found if found is not None and found.location == store.location else None


def keep_index(cache: PlanCache, stored: StoredState) -> None:
    """Keep what a load has read."""
    checkpoint = stored.checkpoint
    digest = checkpoint.record.index.head_digest
    cache.put(_KEY, KeptIndex(checkpoint.location, digest, checkpoint.preface(), stored))
