"""The state of a module: its tensors as they are, and each of its extra states as one object. Called by `expand`.

An extra state (`get_extra_state`) may be anything, of another shape every time, and belongs to a class of layers rather than to
the model: it is never cut, and never a reason not to load a model that another version of the layer has saved.
"""

from __future__ import annotations

from typing import Any

import torch

from giantstep.mapping.placed import StoredNames
from giantstep.mapping.sharded_object import LocalNonpersistentObject, SharedObject
from giantstep.shards.paths import Path, dotted

EXTRA_STATE = "_extra_state"


def module_state(module: torch.nn.Module, where: Path, stored: StoredNames | None) -> tuple[dict[str, Any], bool]:
    """The state dict of a module for `save` or `load`, and whether it is to be asked for again when `stored` is known.

    Args:
        module: its tensors are not copied.
        where: its place in the caller's state dict.
        stored: what the checkpoint holds, while one is loaded. An extra state that it does not hold stays as it is.
    """
    state: dict[str, Any] = module.state_dict()
    extra = [key for key in state if key.endswith(EXTRA_STATE)]
    if not extra:
        return state, False
    found = dict(state)
    for key in extra:
        name = dotted((*where, key))
        if stored is not None and stored.grid(name) is None:
            found[key] = LocalNonpersistentObject(state[key])
            stored.leave(name)
        else:
            found[key] = SharedObject(name, state[key], (), ())
    return found, True
