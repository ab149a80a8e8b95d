"""The rows of one method as a Markdown table, for documents: `python summary.py FIGURES.json [METHOD]`.

FIGURES.json is what `throughput.py --json` wrote. Without METHOD: giantstep with plans kept, and where there is none without.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_OURS = ("giantstep, plans kept", "giantstep")


def summary(figures: Mapping[str, Sequence[Mapping[str, Any]]], methods: Sequence[str]) -> Iterator[str]:
    """Lines of the table; of each operation the row of the first method that has one."""
    yield "| case | operation | GiB/s | of raw | of DCP | extra MiB per rank |"
    yield "|---|---|---|---|---|---|"
    for case, rows in figures.items():
        for operation in dict.fromkeys(row["operation"] for row in rows):
            by_method = {row["method"]: row for row in rows if row["operation"] == operation}
            row = next((by_method[method] for method in methods if method in by_method), None)
            if row is not None:
                ratios = [_ratio(row[name]) for name in ("ratio_to_raw", "ratio_to_dcp")]
                extra = f"{row['extra_bytes'] / (1 << 20):.0f}"
                yield "| " + " | ".join([case, operation, f"{row['gib_per_sec']:.2f}", *ratios, extra]) + " |"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    for line in summary(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2:3] or _OURS):
        print(line)
