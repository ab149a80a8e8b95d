"""State of distributed optimizers (ZeRO-1 and ZeRO-2): flat buffers of which each data-parallel rank owns a part.

A `FlatLayout` says how parameters lie in buckets and which rank owns what, made by `lay_out`, `lay_out_whole`, or stated
with `Bucket`s. Of it and the rank's own buffers two forms of state dict are made: `reshardable_state` loads under any other
layout and into optimizers that are not sharded; `same_layout_state` is quicker to save and loads only where it was saved.

Not here: an optimizer. See `docs/zero.md`.
"""

from giantstep.shards.bucketing import BucketRules, lay_out, lay_out_whole
from giantstep.shards.flat_buffers import Bucket, FlatLayout, FlatParameter, OwnedRange
from giantstep.zero.buffers import empty_buffers
from giantstep.zero.reshardable import reshardable_state
from giantstep.zero.same_layout import same_layout_state

__all__ = [
    "Bucket",
    "BucketRules",
    "FlatLayout",
    "FlatParameter",
    "OwnedRange",
    "empty_buffers",
    "lay_out",
    "lay_out_whole",
    "reshardable_state",
    "same_layout_state",
]
