"""giantstep: save, reshard and restore giant PyTorch models at any step, on any number of ranks.

    import giantstep as gs

    gs.save({"model": model.state_dict(), "step": 100}, "checkpoints/step_00000100")
    state = gs.load({"model": model.state_dict()}, "checkpoints/step_00000100")
    gs.open_checkpoint("checkpoints/step_00000100")["model.weight"][:4]

Importing has no effects, and torch is imported only when a name that needs it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from giantstep import errors
from giantstep.errors import GiantstepError
from giantstep.options import LoadOptions, SaveOptions, StrictHandling
from giantstep.plan_cache import PlanCache

if TYPE_CHECKING:
    from giantstep import metadata
    from giantstep.async_saving import async_save
    from giantstep.codecs import register_type
    from giantstep.loading import load
    from giantstep.manager import CheckpointManager
    from giantstep.mapping.factory import ShardedTensorFactory
    from giantstep.mapping.sharded_object import LocalNonpersistentObject, ShardedObject
    from giantstep.mapping.sharded_tensor import ShardedTensor
    from giantstep.mapping.wrappers import register_wrapper
    from giantstep.opening import open_checkpoint
    from giantstep.pending import PendingSave, staging_guard
    from giantstep.reading.checkpoint import Checkpoint
    from giantstep.removal import remove_sharded_tensors
    from giantstep.reports import LoadedState, LoadReport, SaveReport
    from giantstep.saver import finish_saves
    from giantstep.saving import save
    from giantstep.tiered import LocalTier, Tiers

_LAZY = {
    "Checkpoint": "giantstep.reading.checkpoint",
    "CheckpointManager": "giantstep.manager",
    "LoadReport": "giantstep.reports",
    "LoadedState": "giantstep.reports",
    "LocalNonpersistentObject": "giantstep.mapping.sharded_object",
    "LocalTier": "giantstep.tiered",
    "SaveReport": "giantstep.reports",
    "PendingSave": "giantstep.pending",
    "ShardedObject": "giantstep.mapping.sharded_object",
    "ShardedTensor": "giantstep.mapping.sharded_tensor",
    "ShardedTensorFactory": "giantstep.mapping.factory",
    "Tiers": "giantstep.tiered",
    "async_save": "giantstep.async_saving",
    "finish_saves": "giantstep.saver",
    "load": "giantstep.loading",
    "metadata": "giantstep.metadata",
    "open_checkpoint": "giantstep.opening",
    "register_type": "giantstep.codecs",
    "register_wrapper": "giantstep.mapping.wrappers",
    "remove_sharded_tensors": "giantstep.removal",
    "save": "giantstep.saving",
    "staging_guard": "giantstep.pending",
}

__all__ = [
    "Checkpoint",
    "CheckpointManager",
    "GiantstepError",
    "LoadOptions",
    "LoadReport",
    "LoadedState",
    "LocalNonpersistentObject",
    "LocalTier",
    "PendingSave",
    "PlanCache",
    "SaveOptions",
    "SaveReport",
    "ShardedObject",
    "ShardedTensor",
    "ShardedTensorFactory",
    "StrictHandling",
    "Tiers",
    "async_save",
    "errors",
    "finish_saves",
    "load",
    "metadata",
    "open_checkpoint",
    "register_type",
    "register_wrapper",
    "remove_sharded_tensors",
    "save",
    "staging_guard",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = import_module(module) if module.rpartition(".")[2] == name else getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
