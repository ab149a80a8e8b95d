"""Where a `PlanCache` keeps plans of saves: in memory and, if it has a folder, in a file per rank. For `planned_save`."""

from __future__ import annotations

import logging
import secrets

from giantstep.errors import CorruptionError
from giantstep.plan_cache import PlanCache
from giantstep.planning.stored_plan import StoredPlan
from giantstep.storage.base import Store, read_all
from giantstep.storage.locate import store_at

_LOG = logging.getLogger("giantstep")
_MOST_BYTES = 1 << 33


def find_plan(cache: PlanCache, rank: int, fingerprint: bytes) -> StoredPlan | None:
    """The plan that this rank keeps for a description, if it does."""
    found: StoredPlan | None = cache.get(("save", rank, fingerprint))
    if found is None and cache.path is not None:
        found = _read(store_at(cache.path), rank)
        if found is not None and found.fingerprint != fingerprint:
            return None
        if found is not None:
            cache.put(("save", rank, fingerprint), found)
    return found


def remember_plan(cache: PlanCache, rank: int, plan: StoredPlan) -> None:
    """Keep a plan in memory alone."""
    cache.put(("save", rank, plan.fingerprint), plan)


def keep_plan(cache: PlanCache, rank: int, plan: StoredPlan) -> None:
    """Keep a plan. A folder that cannot be written to is warned of: the save itself goes on."""
    remember_plan(cache, rank, plan)
    if cache.path is None:
        return
    store = store_at(cache.path)
    name = _name(rank)
    # A name of its own: what a killed process left must not be in the way, nor another job.
    temporary = f"{name}.{secrets.token_hex(8)}.tmp"
    try:
        store.prepare("")
        for left in [found for found in store.names("") if found.startswith(f"{name}.")]:
            store.delete(left)
        store.publish(name, plan.encode(), temporary)
    except OSError as error:
        _LOG.warning("%s: a plan could not be kept for later runs: %s", store.location, error)


def _name(rank: int) -> str:
    return f"save-r{rank:05d}.plan.safetensors"


def _read(store: Store, rank: int) -> StoredPlan | None:
    name = _name(rank)
    try:
        return StoredPlan.decode(read_all(store, name, _MOST_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, CorruptionError) as error:
        _LOG.warning("%s/%s: the plan kept there is not used: %s", store.location, name, error)
        return None
