"""Objects of a request that refuse what is stored, before anything is loaded. Called by `load`, between open and match.

Not here: what they refuse; that is said by their checks (see `CheckedObject`).
"""

from __future__ import annotations

from giantstep.mapping.checked_object import CheckedObject
from giantstep.mapping.describe import Described
from giantstep.options import LoadOptions
from giantstep.stored_state import StoredState


def check_conditions(described: Described, stored: StoredState, options: LoadOptions) -> None:
    """Show every `CheckedObject` the stored value of its position; raises what its check raises."""
    for item in described.objects:
        source = item.source
        key = options.stored_key(source.key) if isinstance(source, CheckedObject) else None
        if not isinstance(source, CheckedObject) or key is None:
            continue
        positions = [position for held in stored.grids.get(key, {}).values() for position in held.values()]
        if not positions:
            continue
        asked = (source.global_shape, source.global_offset)
        position = next((one for one in positions if (one.shape, one.offset) == asked), positions[0])
        checkpoint = stored.checkpoint
        source.check(checkpoint.object(position.unique_key), f"object {position.unique_key!r} in {checkpoint.location}")
