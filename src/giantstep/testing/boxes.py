"""A grid of labelled cells as lines of text: neighbours that are the same share one box. Called by `drawing`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

# By which sides of a corner have a line: up 8, down 4, left 2, right 1.
_CORNERS = " ╶╴─╷┌┐┬╵└┘┴│├┤┼"


@dataclass(frozen=True, slots=True)
class Boxes:
    """What is drawn.

    Attributes:
        labels: [row][column] text of each cell.
        same: [row][column] neighbours with equal values share a box, which is labelled once.
        rows, columns: texts at the lines between rows and between columns, one more than there are cells.
    """

    labels: Sequence[Sequence[str]]
    same: Sequence[Sequence[Hashable]]
    rows: Sequence[str]
    columns: Sequence[str]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        return len(self.rows) - 1, len(self.columns) - 1


def draw_boxes(boxes: Boxes) -> list[str]:
    """The lines of the picture, without spaces at their ends."""
    rows, columns = boxes.size
    shown = _labels_once(boxes)
    widths = _widths(boxes, shown)
    margin = max(map(len, boxes.rows))
    lines = []
    if any(boxes.columns):
        lines.append(
            " " * (margin + 1) + "".join(text.ljust(n + 1) for text, n in zip(boxes.columns, [*widths, 0], strict=True))
        )
    for row in range(rows + 1):
        corners = (_corner(boxes, row, column) for column in range(columns + 1))
        runs = ("─" * n if _line_above(boxes, row, column) else " " * n for column, n in enumerate(widths))
        line = "".join(corner + run for corner, run in zip(corners, [*runs, ""], strict=True))
        lines.append(f"{boxes.rows[row]:>{margin}} {line}")
        if row < rows:
            lines.append(" " * (margin + 1) + _row_of_labels(boxes, shown, row, widths))
    return [line.rstrip() for line in lines]


def _differ(boxes: Boxes, a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether there is a line between two cells; those outside the grid are the same as each other only."""
    rows, columns = boxes.size
    inside = [0 <= row < rows and 0 <= column < columns for row, column in (a, b)]
    if not all(inside):
        return any(inside)
    return boxes.same[a[0]][a[1]] != boxes.same[b[0]][b[1]]


def _line_above(boxes: Boxes, row: int, column: int) -> bool:
    return _differ(boxes, (row - 1, column), (row, column))


def _line_left(boxes: Boxes, row: int, column: int) -> bool:
    return _differ(boxes, (row, column - 1), (row, column))


def _corner(boxes: Boxes, row: int, column: int) -> str:
    up, down = _line_left(boxes, row - 1, column), _line_left(boxes, row, column)
    left, right = _line_above(boxes, row, column - 1), _line_above(boxes, row, column)
    return _CORNERS[8 * up + 4 * down + 2 * left + right]


def _labels_once(boxes: Boxes) -> list[list[str]]:
    """The labels, each only in the first cell of its box."""
    rows, columns = boxes.size
    shown = [[""] * columns for _ in range(rows)]
    seen: set[tuple[int, int]] = set()
    for first in ((row, column) for row in range(rows) for column in range(columns)):
        if first in seen:
            continue
        shown[first[0]][first[1]] = boxes.labels[first[0]][first[1]]
        reached = [first]
        while reached:
            row, column = reached.pop()
            seen.add((row, column))
            around = ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1))
            reached += [other for other in around if other not in seen and not _differ(boxes, (row, column), other)]
    return shown


def _span(boxes: Boxes, row: int, column: int) -> range:
    """Columns from this one to the end of its box in this row."""
    end = column + 1
    while end < boxes.size[1] and not _line_left(boxes, row, end):
        end += 1
    return range(column, end)


def _widths(boxes: Boxes, shown: Sequence[Sequence[str]]) -> list[int]:
    """Width of each column between its lines, such that offsets and labels fit."""
    rows, columns = boxes.size
    widths = [max(3, len(text)) for text in boxes.columns[:-1]]
    labelled = [(_span(boxes, row, column), shown[row][column]) for row in range(rows) for column in range(columns)]
    for span, text in sorted(labelled, key=lambda item: len(item[0])):
        lacking = len(text) + 2 - sum(widths[column] for column in span) - (len(span) - 1)
        widths[span[-1]] += max(0, lacking) if text else 0
    return widths


def _row_of_labels(boxes: Boxes, shown: Sequence[Sequence[str]], row: int, widths: Sequence[int]) -> str:
    line, column = "", 0
    while column < boxes.size[1]:
        span = _span(boxes, row, column)
        room = sum(widths[place] for place in span) + len(span) - 1
        # A box that is not a rectangle may have its label in a later column of this row.
        named = next((place for place in span if shown[row][place]), column)
        indent = sum(widths[place] + 1 for place in range(column, named))
        line += "│" + (" " * (indent + 1) + shown[row][named]).ljust(room)
        column = span[-1] + 1
    return line + "│"
