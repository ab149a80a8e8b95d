"""Timing of phases, and the check that all ranks make the same call."""

from __future__ import annotations

import enum
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NoReturn

from giantstep.errors import DisagreementError
from giantstep.group.base import Parts

_SHOWN = 300


class Stopwatch:
    """Seconds per phase, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside the block to `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


def settings(options: Any) -> dict[str, Any]:
    """The fields of an options object as JSON values; of functions, groups, policies and caches only what they are.

    Without `previous`, which is another one with every save: no plan depends on it, and callers compare it themselves.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, enum.Enum):
            return value.value
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        return "a function" if callable(value) else f"a {type(value).__name__}"

    return {item.name: plain(getattr(options, item.name)) for item in fields(options) if item.name != "previous"}


def with_call(call: dict[str, Any], *payload: bytes) -> Parts:
    """A report that also says which call this rank makes: what must be equal on all ranks."""
    return (json.dumps(call, sort_keys=True).encode("ascii"), *payload)


def same_call(reports: Sequence[Parts]) -> list[Parts]:
    """The payloads of `with_call`, once all ranks are seen to make the same call.

    Raises:
        DisagreementError: they do not; names rank and difference.
    """
    for rank, report in enumerate(reports):
        if report[0] != reports[0][0]:
            _raise_difference(json.loads(reports[0][0]), json.loads(report[0]), rank)
    return [report[1:] for report in reports]


def _raise_difference(first: dict[str, Any], other: dict[str, Any], rank: int) -> NoReturn:
    name = next(name for name in {**first, **other} if first.get(name) != other.get(name))
    ours, theirs = first.get(name), other.get(name)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        _raise_difference(
            {f"{name}.{key}": value for key, value in ours.items()},
            {f"{name}.{key}": value for key, value in theirs.items()},
            rank,
        )
    raise DisagreementError(
        f"ranks make different calls: {name} is {_short(first.get(name))} on rank 0 and {_short(other.get(name))} on rank "
        f"{rank}. All ranks of the group must make the same call."
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."
