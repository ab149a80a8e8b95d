"""Optimizer state by parameter name, in any layout: what users of optimizers import.

`OptimizerState` is a leaf for `save` and `load`. Below it, with the names of the field:
`get_param_id_to_sharded_param_map`, `make_sharded_optimizer_tensor`, `optim_state_to_sharding_state`.
"""

from __future__ import annotations

from giantstep.mapping.optimizer import (
    ShardedParam,
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
    optim_state_to_sharding_state,
)
from giantstep.optimizer.options import STATISTICS, OptimizerOptions
from giantstep.optimizer.report import OptimizerReport
from giantstep.optimizer.state import OptimizerState

__all__ = [
    "STATISTICS",
    "OptimizerOptions",
    "OptimizerReport",
    "OptimizerState",
    "ShardedParam",
    "get_param_id_to_sharded_param_map",
    "make_sharded_optimizer_tensor",
    "optim_state_to_sharding_state",
]
