"""The operations that are measured, and which raw operation each of them is compared with.

Used by `rank.py`, which measures them, and by `tables.py` and `plot.py`, which show them.
"""

from __future__ import annotations

from collections.abc import Collection

SAVE = "save"
COPY = "copy"
BLOCKED = "async: blocked"
FIRST_BLOCKED = "async: blocked, first save"
STAGED = "async: staged"
COMMITTED = "async: committed"
COLD = "load, cold"
WARM = "load, warm"
COLUMNS = "load by columns"
_ORDER = (COPY, SAVE, FIRST_BLOCKED, BLOCKED, STAGED, COMMITTED, COLD, WARM, COLUMNS)


def position(operation: str) -> int:
    """Where an operation comes in a table."""
    return _ORDER.index(operation) if operation in _ORDER else len(_ORDER)


def on_ranks(fewer: int, ranks: int) -> str:
    """Loading on fewer ranks than had saved."""
    return f"load on {fewer} of {ranks}"


def raw_counterpart(operation: str, measured: Collection[str]) -> str:
    """What raw calls do in place of an operation: with the same bytes and ranks, in the same layout."""
    if operation in (BLOCKED, FIRST_BLOCKED, STAGED):
        return COPY
    if operation == COMMITTED:
        return SAVE
    if operation in (SAVE, COPY, COLD, WARM):
        return operation
    return COLD if COLD in measured else WARM
