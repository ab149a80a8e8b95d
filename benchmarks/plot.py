"""Draws what `throughput.py` measured: `python plot.py FIGURES.json PLOT.svg`, or by `throughput.py --plot`.

The only user of matplotlib, which the extra `bench` installs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLUMNS = 2
_PANEL_INCHES = (9.0, 3.6)
_HIDDEN = ("copy",)


def plot(figures: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """One panel per case; in it, one group of bars per operation, one bar per method: GiB/s with least and most."""
    from matplotlib.figure import Figure

    rows = -(-len(figures) // _COLUMNS)
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * _COLUMNS, height * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    methods = sorted({row["method"] for found in figures.values() for row in found if row["operation"] not in _HIDDEN})
    for panel, (title, found) in zip(panels, figures.items(), strict=False):
        _draw(panel, title, found, methods)
    for panel in panels[len(figures) :]:
        panel.set_axis_off()
    handles = {label: bar for panel in panels for bar, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=len(handles) or 1)
    figure.savefig(path, format="svg")


def _draw(panel: Any, title: str, rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> None:
    from matplotlib import colormaps

    shown = [row for row in rows if row["operation"] not in _HIDDEN]
    operations = list(dict.fromkeys(row["operation"] for row in shown))
    each = 0.85 / len(methods)
    for number, method in enumerate(methods):
        mine = [row for row in shown if row["method"] == method]
        middle = [row["gib_per_sec"] for row in mine]
        rates = [[row["bytes"] / (1 << 30) / secs for secs in row["secs"]] for row in mine]
        below = [speed - min(all_of) for speed, all_of in zip(middle, rates, strict=True)]
        above = [max(all_of) - speed for speed, all_of in zip(middle, rates, strict=True)]
        places = [operations.index(row["operation"]) + (number - (len(methods) - 1) / 2) * each for row in mine]
        colour = colormaps["tab10"](number % 10)
        panel.bar(places, middle, each, yerr=(below, above), label=method, color=colour, error_kw={"linewidth": 0.6})
    panel.set_title(title, fontsize=9)
    panel.set_xticks(range(len(operations)), [_broken(name) for name in operations], fontsize=7)
    panel.set_ylabel("GiB/s")
    panel.set_yscale("log")
    panel.grid(axis="y", linewidth=0.3)


def _broken(name: str) -> str:
    """An operation on several lines."""
    for gap in (", ", ": ", " by ", " on "):
        name = name.replace(gap, f"{gap.rstrip()}\n")
    return name


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
