"""Any cuts: state that was saved in one random layout is the same in another; and loads that keep plans."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import giantstep as gs
from giantstep.mapping.optimizer import ShardedParam
from giantstep.optimizer import OptimizerState
from giantstep.testing.ranks import run_ranks

SHAPE = (7, 5)
WHOLE = torch.arange(35.0).reshape(SHAPE)


@st.composite
def layouts(draw: st.DrawFn) -> list[list[Any]]:
    """By rank, its pieces: boxes of a random cut of one axis, some of them flat ranges, some held twice."""
    ranks, axis = draw(st.integers(1, 4)), draw(st.integers(0, 1))
    cuts = sorted(draw(st.lists(st.integers(0, SHAPE[axis]), min_size=ranks - 1, max_size=ranks - 1)))
    pieces: list[list[Any]] = [[] for _ in range(ranks)]
    for start, stop in zip([0, *cuts], [*cuts, SHAPE[axis]], strict=True):
        offset, size = [0, 0], list(SHAPE)
        offset[axis], size[axis] = start, stop - start
        owner, count = draw(st.integers(0, ranks - 1)), size[0] * size[1]
        middle = draw(st.integers(0, count))
        if draw(st.booleans()):
            other = draw(st.integers(0, ranks - 1))
            pieces[owner].append((tuple(offset), tuple(size), slice(0, middle), 0))
            pieces[other].append((tuple(offset), tuple(size), slice(middle, count), 0))
        else:
            pieces[owner].append((tuple(offset), tuple(size), None, 0))
            other = draw(st.integers(0, ranks - 1))
            if other != owner:
                pieces[other].append((tuple(offset), tuple(size), None, 1))
    return pieces


def cut(whole: torch.Tensor, piece: Any) -> torch.Tensor:
    (row, column), (rows, columns), flat, _ = piece
    box = whole[row : row + rows, column : column + columns]
    return (box if flat is None else box.reshape(-1)[flat]).clone()


class Held:
    """A rank's pieces of the tensor, each a parameter, in groups of one."""

    def __init__(self, pieces: list[Any]) -> None:
        self.params = [torch.nn.Parameter(torch.zeros_like(cut(WHOLE, piece))) for piece in pieces]
        leaves: list[ShardedParam] = [
            gs.ShardedTensor("w", param.detach(), torch.float32, size, SHAPE, offset, None, replica, 0, False, flat)
            for param, (offset, size, flat, replica) in zip(self.params, pieces, strict=True)
        ]
        # A rank without a piece still has an optimizer.
        self.other = torch.nn.Parameter(torch.ones(2))
        self.optimizer = torch.optim.Adam([{"params": [*self.params, self.other]}])
        self.state = OptimizerState(self.optimizer, {"w": leaves, "other": self.other})


@settings(max_examples=40, deadline=None)
@given(layouts(), layouts(), st.booleans())
def test_any_layout_loads_into_any_other(source: list[Any], target: list[Any], keep_plans: bool) -> None:
    moments = {"exp_avg": WHOLE * 2, "exp_avg_sq": (WHOLE + 0.5).double()}
    with tempfile.TemporaryDirectory() as folder:

        def save(group: Any) -> None:
            held = Held(source[group.rank])
            for param, piece in zip(held.params, source[group.rank], strict=True):
                held.optimizer.state[param] = {"step": torch.tensor(4.0)}
                held.optimizer.state[param].update({name: cut(moment, piece) for name, moment in moments.items()})
            gs.save({"optimizer": held.state}, f"{folder}/c", process_group=group)

        def load(group: Any) -> None:
            options = gs.LoadOptions(plan_cache=gs.PlanCache() if keep_plans else None)
            for _ in range(1 + keep_plans):
                held = Held(target[group.rank])
                report = gs.load({"optimizer": held.state}, f"{folder}/c", process_group=group, options=options).report
                assert report.missing == report.unexpected == ()
                for param, piece in zip(held.params, target[group.rank], strict=True):
                    state = held.optimizer.state[param]
                    assert state["step"] == 4
                    assert all(torch.equal(state[name], cut(moment, piece)) for name, moment in moments.items())
                assert held.other not in held.optimizer.state

        run_ranks(len(source), save)
        run_ranks(len(target), load)
