"""The outlines of the state dicts that the ranks of a group saved or loaded last. Called by `saving` and `loading`.

They hold names and numbers, no tensors and nothing else of the caller's, and are forgotten with the group.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

from giantstep.group.base import Group
from giantstep.mapping.outline import Outline

# Model and optimizer may be saved apart, and each of them loaded.
_MOST = 4
_LOCK = threading.Lock()
_KEPT: weakref.WeakKeyDictionary[Group, list[Outline]] = weakref.WeakKeyDictionary()


def kept_outlines(group: Group) -> Sequence[Outline]:
    """Outlines of the last state dicts, the latest first; none for a group of a class that cannot be referred to weakly."""
    with _LOCK:
        return tuple(_KEPT.get(group, ())) if _can_be_kept(group) else ()


def keep_outline(group: Group, outline: Outline | None) -> None:
    """Keep one, instead of the one that was not used for longest."""
    if outline is None or not _can_be_kept(group):
        return
    with _LOCK:
        others = [other for other in _KEPT.get(group, ()) if other is not outline]
        _KEPT[group] = [outline, *others[: _MOST - 1]]


def _can_be_kept(group: Group) -> bool:
    """Groups that users made may have slots only, or be equal to others."""
    return type(group).__weakrefoffset__ > 0 and type(group).__hash__ is object.__hash__
