"""`CheckedObject`: a sharded object that refuses to load what does not fit it. Not here: when it is asked (`conditions`).

Made by forms of state that load only under conditions, such as `giantstep.zero.same_layout_state`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from giantstep.mapping.sharded_object import ShardedObject


def _no_check(_stored: Any, _what: str) -> None:
    """Whatever is stored will do."""


@dataclass(eq=False, slots=True)
class CheckedObject(ShardedObject):
    """A sharded object with which the state beside it must agree: if its check raises, nothing is loaded.

    Attributes:
        check: called on load with the stored value of its position (or, if the stored grid has no such position, of one
            that it has) and with what that is, in words for an error. It comes before keys are judged and before any
            tensor is touched, whatever the strictness; what it raises is raised on all ranks. Objects of which nothing is
            stored are left to strictness.
    """

    check: Callable[[Any, str], None] = _no_check
