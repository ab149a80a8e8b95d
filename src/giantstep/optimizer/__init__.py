"""Optimizer state by parameter name, in any layout: what users of optimizers import.

Low level, with the names of the field: `get_param_id_to_sharded_param_map`, `make_sharded_optimizer_tensor`,
`optim_state_to_sharding_state`.
"""

from __future__ import annotations

from giantstep.mapping.optimizer import (
    ShardedParam,
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
    optim_state_to_sharding_state,
)

__all__ = [
    "ShardedParam",
    "get_param_id_to_sharded_param_map",
    "make_sharded_optimizer_tensor",
    "optim_state_to_sharding_state",
]
