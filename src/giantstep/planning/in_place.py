"""Which pieces of a load can be read straight to where they are wanted, as far as the file is concerned.

Pure. Called by `reading.placing`, which knows the memory.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from giantstep.planning.load_plan import LoadPlan


def lie_alone(plan: LoadPlan) -> NDArray[np.bool_]:
    """[pieces] whether the elements follow each other in the file, and no byte of them belongs to another piece."""
    pieces = plan.pieces
    dense = pieces.stop - pieces.start == pieces.size.prod(axis=1) * plan.chunks.chunk_item_bytes()[pieces.chunk]
    # Pieces are in order of their first bytes.
    before = np.concatenate(([0], np.maximum.accumulate(pieces.stop)))[: len(pieces)]
    after = np.append(pieces.start, np.iinfo(np.int64).max)[1:]
    alone: NDArray[np.bool_] = dense & (before <= pieces.start) & (pieces.stop <= after)
    return alone
