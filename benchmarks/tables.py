"""From what the ranks measured to medians, ratios and a printed table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from measure import Measurement
from rich.console import Console
from rich.table import Table

_GIB = 1 << 30
_MIB = 1 << 20
_RAW = "raw"


@dataclass(slots=True)
class Row:
    """One operation by one method: all repetitions, all ranks together.

    Attributes:
        operation, method: as in `Measurement`.
        bytes: payload that is saved or loaded.
        secs: per repetition, from the first rank's begin to the last rank's end.
        cpu_secs: per repetition, all ranks together.
        extra_bytes: largest of any rank in any repetition.
        phases: median over repetitions of the slowest rank's seconds.
        read_bytes: read from the store by all ranks together; 0 if unknown.
    """

    operation: str
    method: str
    bytes: int
    secs: list[float] = field(default_factory=list)
    cpu_secs: list[float] = field(default_factory=list)
    extra_bytes: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    read_bytes: int = 0

    @property
    def rates(self) -> list[float]:
        """GiB/s per repetition."""
        return [self.bytes / _GIB / secs for secs in self.secs]

    def ratio(self, other: Row) -> float:
        """How fast this is compared with another, 1 meaning as fast: the median over repetitions."""
        return median(theirs / ours for ours, theirs in zip(self.secs, other.secs, strict=True))


def rows_of(ranks: Sequence[Sequence[Measurement]], payload_bytes: int) -> list[Row]:
    """Merge the measurements of all ranks."""
    rows: dict[tuple[str, str], dict[int, list[Measurement]]] = {}
    for measurement in (found for rank in ranks for found in rank):
        by_repetition = rows.setdefault((measurement.operation, measurement.method), {})
        by_repetition.setdefault(measurement.repetition, []).append(measurement)
    return [
        _row(operation, method, payload_bytes, [found for _, found in sorted(by_repetition.items())])
        for (operation, method), by_repetition in rows.items()
    ]


def _row(operation: str, method: str, payload_bytes: int, repetitions: Sequence[Sequence[Measurement]]) -> Row:
    phases = repetitions[0][0].phases
    return Row(
        operation,
        method,
        payload_bytes,
        secs=[max(one.end for one in ranks) - min(one.begin for one in ranks) for ranks in repetitions],
        cpu_secs=[sum(one.cpu_secs for one in ranks) for ranks in repetitions],
        extra_bytes=max(one.extra_bytes for ranks in repetitions for one in ranks),
        phases={name: median(max(one.phases[name] for one in ranks) for ranks in repetitions) for name in phases},
        read_bytes=sum(one.read_bytes for one in repetitions[0]),
    )


def best_raw(rows: Iterable[Row], operation: str) -> Row:
    """The raw path with the best median. Loads into other layouts are compared with plain loads."""
    kind = operation.split(maxsplit=1)[0]
    return min((row for row in rows if row.operation == kind and row.method.startswith(_RAW)), key=lambda row: median(row.secs))


def _of_dcp(rows: Iterable[Row], operation: str) -> Row:
    return next(row for row in rows if row.operation == operation and row.method == "dcp")


def print_table(title: str, rows: Sequence[Row], console: Console) -> None:
    """Print one table."""
    table = Table(title=title, title_justify="left")
    table.add_column("operation")
    table.add_column("method")
    for name in ("s", "GiB/s", "(min-max)", "/ raw", "/ DCP", "CPU s", "extra MiB", "read x"):
        table.add_column(name, justify="right")
    table.add_column("phases (s)")
    for operation in dict.fromkeys(row.operation for row in rows):
        raw, theirs = best_raw(rows, operation), _of_dcp(rows, operation)
        for row in rows:
            if row.operation == operation:
                table.add_row(*_cells(row, raw, theirs))
        table.add_section()
    console.print(table)


def _cells(row: Row, raw: Row, theirs: Row) -> list[str]:
    return [
        row.operation,
        row.method,
        f"{median(row.secs):.2f}",
        f"{median(row.rates):.2f}",
        f"{min(row.rates):.2f}-{max(row.rates):.2f}",
        f"{row.ratio(raw):.2f}",
        f"{row.ratio(theirs):.1f}",
        f"{median(row.cpu_secs):.2f}",
        f"{row.extra_bytes / _MIB:.0f}",
        f"{row.read_bytes / row.bytes:.2f}" if row.read_bytes else "",
        ", ".join(f"{name} {secs:.2f}" for name, secs in row.phases.items()),
    ]


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for a JSON file, ratios included."""
    return [
        {
            **asdict(row),
            "gib_per_sec": median(row.rates),
            "ratio_to_raw": row.ratio(best_raw(rows, row.operation)),
            "ratio_to_dcp": row.ratio(_of_dcp(rows, row.operation)),
        }
        for row in rows
    ]
