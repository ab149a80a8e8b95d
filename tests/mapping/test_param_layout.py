"""What a rank holds of a parameter, in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.mapping.param_layout import layout_of, reduced, reduced_shape


def test_a_whole_tensor_has_no_cut_and_a_shard_is_named_by_its_region() -> None:
    plain = layout_of("w", torch.ones(4, 6))
    assert (plain.cut, plain.grid, plain.elements) == ("", (), 24)
    assert layout_of("w", gs.ShardedTensor.from_rank_offsets("w", torch.ones(4, 6))).cut == ""
    assert layout_of("w", gs.ShardedTensor.from_rank_offsets("w", torch.ones(4, 6), (0, 1, 2))).cut == "[4:8,0:6]"


@pytest.mark.parametrize(("flat", "cut"), [(slice(0, 24), ""), (slice(3, 24), "[0:4,0:6;3:24]")])
def test_a_flat_range_is_named_unless_it_is_everything(flat: slice, cut: str) -> None:
    data = torch.ones(flat.stop - flat.start)
    assert layout_of("w", gs.ShardedTensor.from_rank_offsets_flat("w", data, (4, 6), flattened_range=flat)).cut == cut


def test_a_stacked_shard_knows_its_position_and_those_of_other_depths() -> None:
    leaf = gs.ShardedTensor.from_rank_offsets("w", torch.ones(2, 3), (0, 1, 4), (1, 2, 5), prepend_axis_num=2)
    layout = layout_of("w", leaf)
    assert (layout.grid, layout.position) == ((4, 5), (1, 2))
    assert layout.positions((4, 5)) == [(1, 2)]
    assert layout.positions((4,)) == [(1,)]
    assert layout.positions(()) == [()]
    assert layout.positions((4, 5, 2)) == [(1, 2, 0), (1, 2, 1)]
    assert layout.positions((3,)) is None


def test_a_factory_is_as_its_parts_are() -> None:
    def build(key: str, data: torch.Tensor, _replica: Any, _flat: Any) -> Any:
        offsets = [(0, 1, 3), (1, 0, 2)]
        return [gs.ShardedTensor.from_rank_offsets(f"{key}.{n}", half, *offsets, prepend_axis_num=1) for n, half in parts(data)]

    def parts(data: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        return list(enumerate(data.chunk(2)))

    layout = layout_of("w", gs.ShardedTensorFactory("w", torch.ones(4, 2), build, torch.cat))
    assert (layout.grid, layout.position) == ((3,), (1,))
    assert layout.cut.startswith("[")
    again = layout_of("w", gs.ShardedTensorFactory("w", torch.zeros(4, 2), build, torch.cat))
    assert again.cut == layout.cut


@pytest.mark.parametrize(
    ("axis", "keeps", "shape"), [(-1, True, (4, 1)), (-1, False, (4,)), (-2, True, (1, 6)), (-3, True, None)]
)
def test_shapes_of_statistics(axis: int, keeps: bool, shape: Any) -> None:
    assert reduced_shape((4, 6), axis, keeps_axis=keeps) == shape


def test_a_statistic_is_cut_like_its_parameter_where_its_axis_is_whole() -> None:
    leaf = gs.ShardedTensor.from_rank_offsets("w", torch.ones(4, 6), (0, 2, 3), (1, 1, 2), prepend_axis_num=1)
    found = reduced(leaf, torch.ones(4, 1), -1, "p", keeps_axis=True)
    assert (found.key, found.global_shape, found.global_offset, found.axis_fragmentations) == (
        "p.w",
        (3, 8, 1),
        (2, 4, 0),
        (3, 2, 1),
    )
    assert reduced(leaf, torch.ones(1, 6), -2, "p", keeps_axis=True) is None
    dropped = reduced(leaf, torch.ones(4), -1, "p", keeps_axis=False)
    assert (dropped.global_shape, dropped.local_shape) == ((3, 8), (4,))
