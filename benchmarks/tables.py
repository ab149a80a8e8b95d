"""From what the ranks measured to medians, ratios and a printed table. Used by `throughput.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from measure import Measurement
from operations import position, raw_counterpart
from rich.console import Console
from rich.table import Table

_GIB = 1 << 30
_MIB = 1 << 20
_RAW, _DCP = "raw", "dcp"
_FIGURES = ("s", "GiB/s", "(min-max)", "/ raw", "/ DCP", "CPU s", "extra MiB", "read x")


@dataclass(slots=True)
class Row:
    """One operation by one method: all repetitions, all ranks together.

    Attributes:
        operation, method: as in `Measurement`.
        bytes: payload that is saved or loaded.
        repetitions: numbers of those that were made.
        secs: per repetition, from the first rank's begin to the last rank's end.
        cpu_secs: per repetition, all ranks together.
        extra_bytes: largest of any rank in any repetition.
        phases: median over repetitions of the slowest rank's seconds.
        read_bytes: read from the store by all ranks together; 0 if unknown.
    """

    operation: str
    method: str
    bytes: int
    repetitions: list[int] = field(default_factory=list)
    secs: list[float] = field(default_factory=list)
    cpu_secs: list[float] = field(default_factory=list)
    extra_bytes: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    read_bytes: int = 0

    @property
    def rates(self) -> list[float]:
        """GiB/s per repetition."""
        return [self.bytes / _GIB / secs for secs in self.secs]

    def ratio(self, other: Row | None) -> float | None:
        """How fast this is compared with another, 1 meaning as fast: the median over the repetitions of both."""
        if other is None:
            return None
        theirs = dict(zip(other.repetitions, other.secs, strict=True))
        mine = dict(zip(self.repetitions, self.secs, strict=True))
        return median(theirs[number] / mine[number] for number in theirs.keys() & mine.keys())


def rows_of(ranks: Sequence[Sequence[Measurement]], payload_bytes: int) -> list[Row]:
    """Merge the measurements of all ranks."""
    rows: dict[tuple[str, str], dict[int, list[Measurement]]] = {}
    for measurement in (found for rank in ranks for found in rank):
        by_repetition = rows.setdefault((measurement.operation, measurement.method), {})
        by_repetition.setdefault(measurement.repetition, []).append(measurement)
    return [_row(operation, method, payload_bytes, found) for (operation, method), found in rows.items()]


def _row(operation: str, method: str, payload_bytes: int, by_repetition: dict[int, list[Measurement]]) -> Row:
    numbers = sorted(by_repetition)
    repetitions = [by_repetition[number] for number in numbers]
    phases = repetitions[0][0].phases
    return Row(
        operation,
        method,
        payload_bytes,
        numbers,
        secs=[max(one.end for one in ranks) - min(one.begin for one in ranks) for ranks in repetitions],
        cpu_secs=[sum(one.cpu_secs for one in ranks) for ranks in repetitions],
        extra_bytes=max(one.extra_bytes for ranks in repetitions for one in ranks),
        phases={name: median(max(one.phases.get(name, 0) for one in ranks) for ranks in repetitions) for name in phases},
        read_bytes=sum(one.read_bytes for one in repetitions[0]),
    )


def best_raw(rows: Sequence[Row], operation: str) -> Row | None:
    """The raw path with the best median that does the same with the same bytes."""
    wanted = raw_counterpart(operation, {row.operation for row in rows})
    found = (row for row in rows if row.operation == wanted and row.method.startswith(_RAW))
    return min(found, key=lambda row: median(row.secs), default=None)


def _of_dcp(rows: Sequence[Row], operation: str) -> Row | None:
    return next((row for row in rows if row.operation == operation and row.method == _DCP), None)


def sorted_rows(rows: Sequence[Row]) -> list[Row]:
    """By operation; of each, raw calls first, then the fastest."""

    def place(row: Row) -> tuple[int, str, bool, float]:
        return position(row.operation), row.operation, not row.method.startswith(_RAW), median(row.secs)

    return sorted(rows, key=place)


def print_table(title: str, rows: Sequence[Row], console: Console) -> None:
    """Print one table."""
    table = Table(title=title, title_justify="left")
    table.add_column("operation")
    table.add_column("method")
    for name in _FIGURES:
        table.add_column(name, justify="right")
    table.add_column("phases (s)")
    before = ""
    for row in sorted_rows(rows):
        if before and row.operation != before:
            table.add_section()
        before = row.operation
        table.add_row(*_cells(row, rows))
    console.print(table)


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    return [
        row.operation,
        row.method,
        f"{median(row.secs):.3f}",
        f"{median(row.rates):.2f}",
        f"{min(row.rates):.2f}-{max(row.rates):.2f}",
        _ratio(row.ratio(best_raw(rows, row.operation))),
        _ratio(row.ratio(_of_dcp(rows, row.operation))),
        f"{median(row.cpu_secs):.2f}",
        f"{row.extra_bytes / _MIB:.0f}",
        f"{row.read_bytes / row.bytes:.2f}" if row.read_bytes else "",
        ", ".join(f"{name} {secs:.2f}" for name, secs in row.phases.items()),
    ]


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for a JSON file, ratios included."""
    return [
        {
            **asdict(row),
            "gib_per_sec": median(row.rates),
            "ratio_to_raw": row.ratio(best_raw(rows, row.operation)),
            "ratio_to_dcp": row.ratio(_of_dcp(rows, row.operation)),
        }
        for row in sorted_rows(rows)
    ]
