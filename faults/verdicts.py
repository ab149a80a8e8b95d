"""What a library did about a fault, as one word and a note."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class Outcome(enum.Enum):
    """From best to worst."""

    SURVIVES = "survives"
    """A state that was saved loads to the bit, the one that it should be; or the job goes on."""
    DETECTS = "detects"
    """An error; no wrong values."""
    NOT_APPLICABLE = "n/a"
    """There is no such case with this library."""
    LOSES = "LOSES"
    """No checkpoint loads that was committed and should."""
    SILENT = "SILENT"
    """Wrong values load without an error, or a checkpoint runs code."""
    HANGS = "HANGS"
    """No return within the limit."""

    @property
    def is_bad(self) -> bool:
        """Whether nobody would want it."""
        return self in (Outcome.LOSES, Outcome.SILENT, Outcome.HANGS)


_ORDER = list(Outcome)


@dataclass(frozen=True, slots=True)
class Verdict:
    """An outcome, and what was seen."""

    outcome: Outcome
    note: str = ""

    def __str__(self) -> str:
        return f"{self.outcome.value}{f' ({self.note})' if self.note else ''}"


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of several, with how many there were of it."""
    found = list(verdicts)
    last = max(found, key=lambda verdict: _ORDER.index(verdict.outcome))
    same = sum(1 for verdict in found if verdict.outcome is last.outcome)
    return Verdict(last.outcome, f"{same} of {len(found)}" + (f": {last.note}" if last.note else ""))


def of_load(lines: Sequence[dict[str, Any]], expected: Iterable[int]) -> Verdict:
    """Of loading one path: it must have one of the expected values, or say that it cannot be loaded."""
    answers = [line for line in lines if line["word"] in ("loaded", "failed")]
    if not answers:
        return Verdict(Outcome.DETECTS, "the process died")
    answer = answers[-1]
    if answer["word"] == "failed":
        return Verdict(Outcome.DETECTS, str(answer["error"]).split(":", 1)[0])
    if answer["value"] in set(expected):
        return Verdict(Outcome.SURVIVES)
    return Verdict(Outcome.SILENT, f"loads {answer['value']}")


def of_latest(lines: Sequence[dict[str, Any]], committed: int | None) -> Verdict:
    """Of loading paths, newest first: the first that loads counts, and must be what was committed last, or newer.

    Args:
        lines: answers, in the order of the paths.
        committed: the newest value that the library said to be committed; None: none.
    """
    for line in lines:
        if line["word"] == "loaded" and (not isinstance(line["value"], int) or line["value"] < 0):
            return Verdict(Outcome.SILENT, f"loads {line['value']}")
    values = [line["value"] for line in lines if line["word"] == "loaded"]
    if committed is None:
        return Verdict(Outcome.SURVIVES, "nothing was committed")
    if not values:
        return Verdict(Outcome.LOSES, "nothing loads")
    if values[0] < committed:
        return Verdict(Outcome.LOSES, "the last committed one does not load")
    return Verdict(Outcome.SURVIVES)
