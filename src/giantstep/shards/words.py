"""Well-mixed 64-bit words of integers: sums of them recognise sets. Called by `partition` and by `planning`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_STEP = 0x9E3779B97F4A7C15
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def mixed(values: NDArray[Any], salt: int | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A word for each value as splitmix64 mixes it (Steele, Lea and Flood, OOPSLA 2014); another one for each salt."""
    # Of arrays, unlike of scalars, products wrap around without a warning.
    salts = np.atleast_1d(np.asarray(salt, dtype=np.uint64))
    value = values.astype(np.uint64) + salts * np.uint64(_STEP)
    shifted = np.empty_like(value)
    # In place: of large tables every temporary copy costs more than the arithmetic.
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        value ^= np.right_shift(value, np.uint64(shift), out=shifted)
        value *= factor
    value ^= np.right_shift(value, np.uint64(31), out=shifted)
    found: NDArray[np.uint64] = value
    return found
