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

from giantstep.errors import (
    BadArgumentError,
    CheckpointNotFoundError,
    CorruptionError,
    GiantstepError,
    IncompleteError,
    LayoutError,
    MismatchError,
    OpenError,
    PeerError,
    StoreError,
    VersionError,
)
from giantstep.options import LoadOptions, SaveOptions, StrictHandling

if TYPE_CHECKING:
    from giantstep.loading import load
    from giantstep.mapping.sharded_tensor import ShardedTensor
    from giantstep.opening import open_checkpoint
    from giantstep.reading.checkpoint import Checkpoint
    from giantstep.reports import LoadedState, LoadReport, SaveReport
    from giantstep.saving import save

_LAZY = {
    "Checkpoint": "giantstep.reading.checkpoint",
    "LoadReport": "giantstep.reports",
    "LoadedState": "giantstep.reports",
    "SaveReport": "giantstep.reports",
    "ShardedTensor": "giantstep.mapping.sharded_tensor",
    "load": "giantstep.loading",
    "open_checkpoint": "giantstep.opening",
    "save": "giantstep.saving",
}

__all__ = [
    "BadArgumentError",
    "Checkpoint",
    "CheckpointNotFoundError",
    "CorruptionError",
    "GiantstepError",
    "IncompleteError",
    "LayoutError",
    "LoadOptions",
    "LoadReport",
    "LoadedState",
    "MismatchError",
    "OpenError",
    "PeerError",
    "SaveOptions",
    "SaveReport",
    "ShardedTensor",
    "StoreError",
    "StrictHandling",
    "VersionError",
    "load",
    "open_checkpoint",
    "save",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
