"""How `OptimizerState` meets what does not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from giantstep.errors import BadArgumentError

OnGroupConflict = Literal["raise", "keep"]
OnUncuttable = Literal["raise", "drop"]

STATISTICS: Mapping[str, tuple[int, bool]] = {
    "row_var": (-1, True),
    "col_var": (-2, True),
    "exp_avg_sq_row": (-1, False),
    "exp_avg_sq_col": (-2, False),
}
"""Factored second moments of `torch.optim.Adafactor`, and of the Adafactor of transformers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerOptions:
    """Settings of `OptimizerState`."""

    on_group_conflict: OnGroupConflict = "raise"
    """On load, parameters of one group were saved with different hyper-parameters: `raise`, naming them, or `keep` the
    optimizer's own values of those that differ."""

    on_uncuttable: OnUncuttable = "raise"
    """On load, state that was computed from a rank's shard of a parameter as a whole (a statistic over an axis that is cut,
    a preconditioner), and the shard is another now: `raise`, or `drop` the state of that parameter, which then begins anew."""

    statistics: Mapping[str, tuple[int, bool]] = field(default_factory=lambda: dict(STATISTICS))
    """State that is a statistic over one axis of the parameter, by name: the axis, counted from the last (-1, -2, ...), and
    whether the statistic keeps it, with size 1. Such state can be cut anew as long as that axis is whole."""

    of_shards: Collection[str] = ()
    """Names of state that was computed from a rank's shard as a whole, as preconditioners are, and may yet have the shape of
    its elements, as it has of square weights."""

    device: torch.device | str | None = None
    """Where state that does not exist yet is made on load. None: where the optimizer's parameter is."""

    def __post_init__(self) -> None:
        for name, kind in (("on_group_conflict", OnGroupConflict), ("on_uncuttable", OnUncuttable)):
            if getattr(self, name) not in get_args(kind):
                raise BadArgumentError(f"{name} must be one of {get_args(kind)}, not {getattr(self, name)!r}")
        if isinstance(self.of_shards, str) or not all(isinstance(name, str) for name in self.of_shards):
            raise BadArgumentError(f"of_shards must be names of state, as {{'left', 'right'}}, not {self.of_shards!r}")
        for name, entry in dict(self.statistics).items():
            fits = isinstance(name, str) and isinstance(entry, tuple) and len(entry) == 2
            if not fits or type(entry[0]) is not int or entry[0] >= 0 or not isinstance(entry[1], bool):
                raise BadArgumentError(
                    f"statistics[{name!r}] must be (axis, keeps_axis) with a negative axis, as (-1, True), not {entry!r}"
                )
