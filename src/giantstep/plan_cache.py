"""`PlanCache`: what saves and loads of the same structure keep for each other. Only a container; its users fill it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import PurePath
from typing import Any

from giantstep.errors import BadArgumentError


class PlanCache:
    """Plans of saves and loads, reused as long as the structure of everybody's state stays the same.

        cache = gs.PlanCache()
        options = gs.SaveOptions(plan_cache=cache)

    Make one per stream of checkpoints and give it to every call; all ranks give one or none does. A plan is used again
    only if every rank finds that its own state is described as before, to the last shape, dtype, region and role, and
    all agree on it; a change on any one rank is noticed by all, which plan anew. Two caches share nothing. Ranks that are
    threads of one process may share one. Thread-safe.

    Args:
        path: a folder in which plans are kept beyond the end of the process, so that the first save after a restart is
            planned already. Each rank keeps a file of its own there; ranks may share the folder. A file that
            cannot be read is not used, with a warning. None: in memory alone.
        max_plans: of each rank and kind, the plans used least recently are forgotten beyond this number.
    """

    def __init__(self, path: str | PurePath | None = None, *, max_plans: int = 16) -> None:
        if not (path is None or isinstance(path, str) or hasattr(path, "__fspath__")):
            raise BadArgumentError(f"path={path!r} cannot be: expected a str, a path or None")
        if type(max_plans) is not int or max_plans < 1:
            raise BadArgumentError(f"max_plans={max_plans!r} cannot be: expected an int of at least 1")
        self._path = path
        self._max_plans = max_plans
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()

    @property
    def path(self) -> str | PurePath | None:
        """The folder, or None."""
        return self._path

    def get(self, key: Hashable) -> Any:
        """What is kept under a key, or None; for the library's own use."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: Hashable, value: Any) -> None:
        """Keep a value; for the library's own use."""
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            alike = [other for other in self._entries if _owner(other) == _owner(key)]
            for other in alike[: max(0, len(alike) - self._max_plans)]:
                del self._entries[other]

    def clear(self) -> None:
        """Forget what is in memory; files stay."""
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)


def _owner(key: Hashable) -> Hashable:
    """What counts together: entries of one kind and rank, which are all parts of a key but the last."""
    return key[:-1] if isinstance(key, tuple) else key
