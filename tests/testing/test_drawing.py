"""`draw`: the picture says who holds what, of right layouts and of wrong ones, in bounded space."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import giantstep as gs
from giantstep.errors import BadArgumentError
from giantstep.planning.description import COPY, IMPLICIT, MAIN
from giantstep.shards.region import Region
from giantstep.testing import draw
from giantstep.testing.cells import Shard, grid_of
from layouts import partitions


def box(offset: Sequence[int], size: Sequence[int], shape: Sequence[int], replica: int = 0, key: str = "w") -> Any:
    return gs.ShardedTensor(key, None, torch.float32, tuple(size), tuple(shape), tuple(offset), None, replica)


def states(*boxes: Any) -> list[dict[str, Any]]:
    """A rank per shard; None holds nothing."""
    return [{} if shard is None else {"place": shard} for shard in boxes]


def same_text(found: str, expected: str) -> None:
    assert found == textwrap.dedent(expected).strip("\n")


def test_rows_and_copies() -> None:
    layout = [
        {"w": gs.ShardedTensor.from_rank_offsets("w", torch.ones(2, 4), (0, rank % 2, 2), replica_id=rank // 2)}
        for rank in range(6)
    ]
    same_text(
        draw(layout),
        """
        w  float32 [4, 4]  6 shards on ranks 0-5
            0         4
          0 ┌─────────┐
            │ 0 (2,4) │
          2 ├─────────┤
            │ 1 (3,5) │
          4 └─────────┘
          (n): a copy on rank n
        """,
    )


def test_flat_ranges_are_staircases_with_what_is_missing_and_doubled() -> None:
    layout = [
        {
            "m": gs.ShardedTensor.from_rank_offsets_flat(
                "m", torch.ones(stop - start), (4, 6), flattened_range=slice(start, stop)
            )
        }
        for start, stop in ((0, 7), (7, 7), (7, 19), (17, 20))
    ]
    same_text(
        draw(layout, "m"),
        """
        m  float32 [4, 6]  3 shards on ranks 0,2-3
            0           1   2   5           6
          0 ┌───────────────────────────────┐
            │ 0                             │
          1 │           ┌───────────────────┤
            │           │ 2                 │
          2 ├───────────┘       ┌───────────┤
            │                   │ 2-3 twice │
          3 ├───────────┬───┬───┴───────────┤
            │ 2-3 twice │ 3 │ gap           │
          4 └───────────┴───┴───────────────┘
          empty shards: rank 1
          gap: held by no rank as main replica
          twice: held by several main replicas
        """,
    )


def test_an_irregular_grid() -> None:
    layout = states(box((0, 0), (3, 4), (8, 6)), box((0, 4), (8, 2), (8, 6)), box((3, 0), (5, 4), (8, 6)), None)
    same_text(
        draw(layout),
        """
        w  float32 [8, 6]  3 shards on ranks 0-2
            0   4   6
          0 ┌───┬───┐
            │ 0 │ 1 │
          3 ├───┤   │
            │ 2 │   │
          8 └───┴───┘
          no shard: rank 3
        """,
    )


def test_one_axis_runs_to_the_right() -> None:
    same_text(
        draw(states(box((0,), (100,), (300,)), box((100,), (150,), (300,)), box((100,), (200,), (300,), 1))),
        """
        w  float32 [300]  3 shards on ranks 0-2
           0   100     250       300
           ┌───┬───────┬─────────┐
           │ 0 │ 1 (2) │ (2) gap │
           └───┴───────┴─────────┘
          (n): a copy on rank n
          gap: held by no rank as main replica
        """,
    )


def test_plain_tensors_are_equal_wherever_they_are() -> None:
    text = draw([{"scale": torch.ones(())} for _ in range(9)], "scale")
    assert "│ =0-8 │" in text
    assert "=n: equal on the ranks n" in text


def test_of_more_axes_those_that_are_cut_are_drawn() -> None:
    """Layers stacked by pipeline stage, cut along their second axis."""
    layout = [
        {
            "l": [
                gs.ShardedTensor.from_rank_offsets(
                    "l", torch.ones(3, 2, 4), (0, 2 * stage + n, 4), (2, part, 2), prepend_axis_num=1
                )
                for n in range(2)
            ]
        }
        for stage in range(2)
        for part in range(2)
    ]
    text = draw(layout)
    assert "drawn: axes 0 and 2 of 4" in text
    assert text.count("│ 0 │ 1 │") == text.count("│ 2 │ 3 │") == 2


def test_what_lies_behind_the_picture_counts() -> None:
    """Cut along three axes: a cell is covered only if all of the third one is."""
    corners = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    text = draw(states(*(box(corner, (1, 1, 1), (2, 2, 2)) for corner in corners[:-1])))
    assert "│ 0-1 │ 2-3   │" in text
    assert "│ 4-5 │ 6 gap │" in text
    assert "twice" not in text
    assert "drawn: axes 0 and 1 of 3" in text


def test_regions_that_two_main_replicas_claim() -> None:
    assert "│ 0-1 twice │" in draw(states(box((0,), (4,), (4,)), box((0,), (4,), (4,))))
    # Along a third axis, which is cut in one place only, ranks 0 and 1 overlap, and something is left over.
    behind = [box((row, column, 0), (1, 1, 3), (2, 2, 5)) for row in (0, 1) for column in (0, 1)]
    text = draw(states(*behind, *(box((row, column, 2), (1, 1, 2 + row), (2, 2, 5)) for row in (0, 1) for column in (0, 1))))
    assert "│ 0,4 gap twice │ 1,5 gap twice │" in re.sub(" +", " ", text)
    assert "│ 2,6 twice │ 3,7 twice │" in re.sub(" +", " ", text)


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_tensors_without_elements_have_no_picture(shape: tuple[int, ...]) -> None:
    text = draw(states(box((0,) * len(shape), shape, shape), None))
    same_text(text, f"w  float32 {list(shape)}  no shards\n  empty shards: rank 0\n  no shard: rank 1")


def test_a_list_of_all_tensors_begins_with_those_that_are_wrong() -> None:
    layout = [
        {
            "a": box((0,), (0,), (0,), key="a"),
            "b": torch.ones(5),
            "c": box((rank, 0), (1, 4), (4, 4), key="c"),
            "d": box((0,), (2,), (2,), key="d"),
            "e": [box((rank,), (1,), (3,), copy, key="e") for copy in range(2)],
        }
        for rank in range(3)
    ]
    same_text(
        draw(layout),
        """
        5 tensors on 3 ranks
        tensor  dtype    shape   shards  replicas  ranks  covered
        c       float32  [4, 4]       3         0  0-2    gap
        d       float32  [2]          3         2  0-2    twice
        a       float32  [0]          0         0  none   empty
        b       float32  [5]          3         2  0-2    once
        e       float32  [3]          6         3  0-2    once
        """,
    )


def test_ranks_that_mean_different_tensors_are_drawn_apart() -> None:
    text = draw([{"w": torch.ones(3)}, {"w": torch.ones(3, dtype=torch.int8)}, {"w": torch.ones(2)}], "w")
    assert text.startswith("ranks disagree on what 'w' is: 3 tensors\n\nw  float32 [2]  1 shard on rank 2")
    assert "w  int8 [3]  1 shard on rank 1" in text


def test_an_unknown_key_is_answered_with_near_ones() -> None:
    layout = [{"decoder": {"weight": torch.ones(2), "bias": torch.ones(2)}}]
    with pytest.raises(BadArgumentError, match=r"no rank holds a tensor 'decoder.wieght': nearest: decoder.weight"):
        draw(layout, "decoder.wieght")
    with pytest.raises(BadArgumentError, match="draw\\(states\\) lists the 2 there are"):
        draw(layout, "zzz")
    with pytest.raises(BadArgumentError, match="width=10 "):
        draw(layout, width=10)
    with pytest.raises(BadArgumentError, match="rank 1, phase describe"):
        draw([*layout, 5])  # type: ignore[list-item]


@pytest.mark.parametrize("width", [40, 100])
@pytest.mark.parametrize("shape", [(4096,), (4096, 3), (3, 4096), (64, 64), (16, 16, 16)])
def test_thousands_of_shards_are_drawn_coarsely(shape: tuple[int, ...], width: int) -> None:
    cut = [size if size % 2 == 0 else 1 for size in shape]
    step = [1000 if size % 2 == 0 else 3 for size in shape]
    total = tuple(count * size for count, size in zip(cut, step, strict=True))
    places = torch.cartesian_prod(*(torch.arange(count) for count in cut)).reshape(-1, len(shape)).tolist()
    layout = states(*(box([n * size for n, size in zip(place, step, strict=True)], step, total) for place in places))
    text = draw(layout, width=width)
    assert len(layout) == 4096
    assert max(len(line) for line in text.splitlines() if "│" in line or "─" in line) <= width
    assert len(text.splitlines()) <= 55
    assert "gap" not in text
    assert "twice" not in text
    assert "4095" in text
    del layout[1234]
    assert "gap" in draw(layout, width=width)


def test_thousands_of_tensors_are_listed_in_part() -> None:
    layout = [{f"model.layers.{n:04}.{'x' * 100}.weight": torch.ones(2) for n in range(3000)}]
    lines = draw(layout).splitlines()
    assert len(lines) == 43
    assert lines[-1] == "... and 2960 more"
    assert max(map(len, lines)) <= 100
    assert lines[2].startswith("model.layers.0000.x")
    assert ".weight  float32" in lines[2]
    layout[0] |= {f"gap{n}": box((0,), (1,), (2,), key=f"gap{n}") for n in range(50)}
    assert draw(layout).splitlines()[-1] == "... and 3010 more, 10 of them not covered once"


@st.composite
def shardings(draw_from: st.DrawFn) -> tuple[tuple[int, ...], list[Region]]:
    shape = tuple(draw_from(st.lists(st.integers(1, 6), min_size=0, max_size=4)))
    return shape, draw_from(partitions(shape))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(shardings(), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.data())
def test_cells_know_gaps_and_overlaps_exactly(
    drawn: tuple[tuple[int, ...], list[Region]], rows: int, columns: int, upright: bool, data: st.DataObject
) -> None:
    """Against counting: how many main replicas hold each element of each cell."""
    shape, regions = drawn
    implicit = data.draw(st.booleans())
    roles = [IMPLICIT if implicit else data.draw(st.sampled_from([MAIN, MAIN, MAIN, COPY])) for _ in regions]
    shards = [Shard(rank, role, (region,)) for rank, (role, region) in enumerate(zip(roles, regions, strict=True))]
    # Declared twice, or, if nothing is declared, another region across the others.
    repeated = [region for region in regions if not implicit and data.draw(st.integers(0, 9)) == 0]
    again = [Shard(90 + n, MAIN, (region,)) for n, region in enumerate(repeated)]
    if implicit and len(regions) > 1 and data.draw(st.booleans()):
        again = [Shard(90, IMPLICIT, (Region.whole(shape),))]
    shards = [*shards, *again]
    grid = grid_of(shape, shards, max_rows=rows, max_columns=columns, upright=upright)
    assert len(grid.cells) <= rows
    assert len(grid.cells[0]) <= columns
    counts = torch.zeros(shape, dtype=torch.int64)
    for shard in shards:
        if shard.role != COPY:
            counts[shard.regions[0].slices()] += 1
    seen = 0
    for row, line in enumerate(grid.cells):
        for column, cell in enumerate(line):
            index = [slice(None)] * len(shape)
            for axis, cuts, place in ((grid.axes[0], grid.rows, row), (grid.axes[1], grid.columns, column)):
                if axis is not None:
                    index[axis] = slice(cuts[place], cuts[place + 1])
            part = counts[tuple(index)]
            seen += part.numel()
            assert cell.gap == bool((part == 0).any())
            assert cell.twice == bool((part > 1).any())
    assert seen == counts.numel()


def test_the_pictures_in_the_documentation_are_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "testing.md").read_text()
    program = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    exec(compile(program, "testing.md", "exec"), {})  # noqa: S102 - the project's own page
    printed = capsys.readouterr().out
    shown = re.findall(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(shown) == 2
    for picture in shown:
        # An error message is cut short on the page.
        assert picture.rpartition("...\n\n")[2] in printed
        assert picture.partition(" ...\n")[0] in printed
