"""`draw`: who holds what of the tensors of simulated ranks, as text. Wrong layouts are drawn too. Called by users' tests."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from giantstep.errors import BadArgumentError
from giantstep.testing.boxes import Boxes, draw_boxes
from giantstep.testing.cells import Cell, Grid, Shard, grid_of, long_axes
from giantstep.testing.states import States, counted, describe_states

_HEADER = ("tensor", "dtype", "shape", "shards", "replicas", "ranks", "covered")
_COUNTS = (3, 4)
_MAX_ROWS = 24
_MAX_LISTED = 40
_MIN_WIDTH = 40
_MAX_LABEL = 16
_MAX_VARIANTS = 4


@dataclass(slots=True)
class _Tensor:
    """One global tensor as some ranks describe it: all of them, unless they disagree.

    Attributes:
        key, dtype, shape: the global tensor.
        shards: what is held of it.
        empty: ranks with a shard of no elements.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    shards: list[Shard] = field(default_factory=list)
    empty: set[int] = field(default_factory=set)

    @property
    def ranks(self) -> list[int]:
        return sorted({shard.rank for shard in self.shards})

    def cover(self) -> str:
        """How the main replicas cover it, in a word."""
        if 0 in self.shape:
            return "empty"
        whole = grid_of(self.shape, self.shards, max_rows=1, max_columns=1).cells[0][0]
        return _problems(whole) or "once"


def draw(states: States, key: str | None = None, width: int = 100) -> str:
    """A picture of who holds what of one tensor, or a list of all tensors.

        rows = [
            {"w": gs.ShardedTensor.from_rank_offsets("w", torch.ones(2, 4), (0, rank, 2))} for rank in range(2)
        ]
        print(draw(rows, "w"))

    A number in the picture is the rank that holds this region as main replica, one in brackets a rank with a copy.
    Regions without a main replica are marked `gap`, those with more than one `twice`. Of a tensor with more than
    two axes longer than 1, the first two that are cut are drawn. Large layouts are drawn coarsely: the text is
    bounded whatever the number of shards.

    Args:
        states: by rank, as for `check_coverage`: with values or without, and not necessarily right.
        key: the tensor to draw; None lists all, those that are not covered once first, and draws a single one.
        width: most characters in a line of the picture, at least 40.

    Raises:
        BadArgumentError: a state cannot be described, no tensor has this key, or the width is too small.
    """
    if width < _MIN_WIDTH:
        raise BadArgumentError(f"width={width} is too small for a picture: expected at least {_MIN_WIDTH}")
    tensors = _collect(states)
    if key is None and len(tensors) != 1:
        return "\n".join(_table(tensors, len(states), width))
    chosen = [tensor for tensor in tensors if key in (None, tensor.key)]
    if not chosen:
        near = difflib.get_close_matches(str(key), [tensor.key for tensor in tensors], n=3)
        hint = f"nearest: {', '.join(near)}" if near else f"draw(states) lists the {len(tensors)} there are"
        raise BadArgumentError(f"no rank holds a tensor {key!r}: {hint}")
    pictures = ["\n".join(_picture(tensor, len(states), width)) for tensor in chosen[:_MAX_VARIANTS]]
    if len(chosen) > 1:
        pictures.insert(0, f"ranks disagree on what {key!r} is: {len(chosen)} tensors")
    return "\n\n".join(pictures)


def _collect(states: States) -> list[_Tensor]:
    """The tensors, by key."""
    found: dict[tuple[str, str, tuple[int, ...]], _Tensor] = {}
    for rank, described in enumerate(describe_states(states)):
        for leaf in described.leaves:
            tensor = _Tensor(leaf.key, leaf.dtype.torch_name, leaf.global_shape)
            tensor = found.setdefault((tensor.key, tensor.dtype, tensor.shape), tensor)
            regions = tuple(region for region, _ in leaf.pieces if region.elements)
            if regions:
                tensor.shards.append(Shard(rank, leaf.role, regions))
            else:
                tensor.empty.add(rank)
    return [found[name] for name in sorted(found)]


def _problems(cell: Cell) -> str:
    return " ".join(name for name in ("gap", "twice") if getattr(cell, name))


# One tensor.


def _picture(tensor: _Tensor, ranks: int, width: int) -> list[str]:
    held = f"{counted(len(tensor.shards), 'shard')} on {_ranks_text(tensor.ranks, width)}" if tensor.shards else "no shards"
    lines = [f"{tensor.key}  {tensor.dtype} {list(tensor.shape)}  {held}"]
    grid = None
    if 0 not in tensor.shape:
        grid, drawn = _fitted(tensor, width)
        lines += [f"  {line}".rstrip() for line in drawn]
    others = set(range(ranks)) - set(tensor.ranks) - tensor.empty
    for title, which in (("empty shards", tensor.empty), ("no shard", others)):
        if which:
            lines.append(f"  {title}: {_ranks_text(sorted(which), width)}")
    return lines if grid is None else [*lines, *(f"  {line}" for line in _legend(tensor, grid))]


def _fitted(tensor: _Tensor, width: int) -> tuple[Grid, list[str]]:
    """The finest grid that fits, with its picture. One axis runs to the right if all of it fits, else downwards."""
    single = len(long_axes(tensor.shape)) == 1
    columns = max(1, width // 4)
    while True:
        grid = grid_of(tensor.shape, tensor.shards, max_rows=_MAX_ROWS, max_columns=columns)
        if single and grid.coarse:
            break
        drawn = _drawn(grid)
        found = max(map(len, drawn)) + 2
        if found <= width or columns == 1:
            return grid, drawn
        if single:
            break
        columns = max(1, min(columns, len(grid.columns) - 1) * width // (found + 1))
    grid = grid_of(tensor.shape, tensor.shards, max_rows=_MAX_ROWS, max_columns=1, upright=True)
    return grid, _drawn(grid)


def _drawn(grid: Grid) -> list[str]:
    rows, columns = (
        [""] * len(cuts) if axis is None else [str(cut) for cut in cuts]
        for axis, cuts in zip(grid.axes, (grid.rows, grid.columns), strict=True)
    )
    labels = [[_label(cell) for cell in line] for line in grid.cells]
    same = [[(cell.shards, cell.gap, cell.twice) for cell in line] for line in grid.cells]
    return draw_boxes(Boxes(labels, same, rows, columns))


def _label(cell: Cell) -> str:
    equal = len(cell.equals) > 1 and not cell.several
    parts = [
        _ranges(cell.mains, _MAX_LABEL),
        ("=" if equal else "") + _ranges(cell.equals, _MAX_LABEL),
        f"({_ranges(cell.copies, _MAX_LABEL)})" if cell.copies else "",
        _problems(cell),
    ]
    return " ".join(part for part in parts if part)


def _legend(tensor: _Tensor, grid: Grid) -> list[str]:
    cells = [cell for line in grid.cells for cell in line]
    entries = [
        (any(cell.copies for cell in cells), "(n): a copy on rank n"),
        (any(len(cell.equals) > 1 for cell in cells), "=n: equal on the ranks n, none of which is declared the main replica"),
        (any(cell.gap for cell in cells), "gap: held by no rank as main replica"),
        (any(cell.twice for cell in cells), "twice: held by several main replicas"),
        (grid.coarse, "drawn coarsely: some boxes hold several shards"),
    ]
    lines = [text for applies, text in entries if applies]
    if len(long_axes(tensor.shape)) > 2:
        lines.append("drawn: axes " + " and ".join(str(axis) for axis in grid.axes) + f" of {len(tensor.shape)}")
    return lines


# All tensors.


def _table(tensors: Sequence[_Tensor], ranks: int, width: int) -> list[str]:
    covers = {id(tensor): tensor.cover() for tensor in tensors}
    ordered = sorted(tensors, key=lambda tensor: covers[id(tensor)] in ("once", "empty"))
    rows = [_HEADER]
    for tensor in ordered[:_MAX_LISTED]:
        replicas = len(tensor.shards) - len({frozenset(shard.regions) for shard in tensor.shards})
        held = _ranges(tensor.ranks, _MAX_LABEL) or "none"
        counts = (str(len(tensor.shards)), str(replicas))
        rows.append((tensor.key, tensor.dtype, str(list(tensor.shape)), *counts, held, covers[id(tensor)]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    others = sum(widths[1:]) + 2 * (len(widths) - 1)
    widths[0] = min(widths[0], max(_MIN_WIDTH // 2, width - others))
    lines = [f"{counted(len(tensors), 'tensor')} on {counted(ranks, 'rank')}"]
    for row in rows:
        cells = [_shortened(row[0], widths[0]), *row[1:]]
        for place, room in enumerate(widths):
            cells[place] = cells[place].rjust(room) if place in _COUNTS else cells[place].ljust(room)
        lines.append("  ".join(cells).rstrip())
    if len(ordered) > _MAX_LISTED:
        wrong = sum(covers[id(tensor)] not in ("once", "empty") for tensor in ordered[_MAX_LISTED:])
        lines.append(f"... and {len(ordered) - _MAX_LISTED} more" + (f", {wrong} of them not covered once" if wrong else ""))
    return lines


def _shortened(text: str, room: int) -> str:
    """The text, without its middle if it is too long: keys differ at their ends."""
    if len(text) <= room:
        return text
    return text[: room // 2] + "…" + text[len(text) - (room - room // 2 - 1) :]


def _ranks_text(ranks: Sequence[int], room: int) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {_ranges(ranks, room // 2)}"


def _ranges(ranks: Iterable[int], room: int) -> str:
    """Ascending numbers as ranges, `0-3,8`; the last ones are left out if there is no room."""
    ranges: list[list[int]] = []
    for rank in ranks:
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    texts = [str(low) if low == high else f"{low}-{high}" for low, high in ranges]
    text = ",".join(texts)
    if len(text) <= room:
        return text
    shown = texts[:1]
    while len(shown) < len(texts) - 1 and len(",".join([*shown, texts[len(shown)], "…", texts[-1]])) <= room:
        shown.append(texts[len(shown)])
    return ",".join([*shown, "…", texts[-1]])
