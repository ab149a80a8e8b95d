"""By how much two tensors differ, from parts of both. Called by `difference`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from giantstep.reading.lazy_array import view_as
from giantstep.shards.dtypes import DType


@dataclass(frozen=True, slots=True)
class Norms:
    """Norms of the difference of two tensors, in double precision.

    Attributes:
        elements: how many differ, to the bit.
        not_finite: of these, where either is NaN or infinite; they are left out of what follows.
        l2: Euclidean norm.
        max_abs: largest magnitude.
        relative: `l2` divided by the Euclidean norm of the first tensor; infinite if that is 0 and `l2` is not.
    """

    elements: int
    not_finite: int
    l2: float
    max_abs: float
    relative: float


class NormsSoFar:
    """Norms of what was added so far.

    Args:
        dtype: of both tensors.
    """

    def __init__(self, dtype: DType) -> None:
        self._dtype = dtype
        self._elements = self._not_finite = 0
        self._l2 = self._first_l2 = self._max_abs = 0.0

    @staticmethod
    def can(dtype: DType) -> bool:
        """Whether elements of this dtype are numbers here: packed and complex half-precision ones are not."""
        return dtype.name not in ("F4X2", "C32")

    def add(self, first: NDArray[Any], second: NDArray[Any]) -> None:
        """Take corresponding words of both into account; the same array twice means that they are equal."""
        ours = _values(first, self._dtype)
        finite = _finite(ours)
        self._first_l2 = math.hypot(self._first_l2, _l2(_doubles(ours[finite])))
        if second is first:
            return
        theirs = _values(second, self._dtype)
        width = first.dtype.itemsize
        other = (_rows(first, width) != _rows(second, width)).any(axis=1)
        usable = other & finite & _finite(theirs)
        difference = _distance(ours[usable], theirs[usable])
        self._elements += int(other.sum())
        self._not_finite += int(other.sum() - usable.sum())
        self._l2 = math.hypot(self._l2, _l2(difference))
        self._max_abs = max(self._max_abs, float(difference.max(initial=0.0)))

    def norms(self) -> Norms:
        """The result."""
        l2, whole = self._l2, self._first_l2
        # Of an infinite norm of the difference no ratio is known: it is more than any.
        relative = math.inf if math.isinf(l2) or (l2 and not whole) else l2 / whole if whole else 0.0
        return Norms(self._elements, self._not_finite, l2, self._max_abs, relative)


def _values(words: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """Integers as they are, everything else in double precision."""
    values = view_as(np.ascontiguousarray(words), dtype).reshape(-1)
    return values if values.dtype.kind in "iu" else _doubles(values)


def _doubles(values: NDArray[Any]) -> NDArray[Any]:
    # NaNs of some payloads cannot be cast without being made quiet.
    with np.errstate(invalid="ignore"):
        return values.astype(np.complex128 if values.dtype.kind == "c" else np.float64, copy=False)


def _finite(values: NDArray[Any]) -> NDArray[np.bool_]:
    return np.ones(values.shape, dtype=bool) if values.dtype.kind in "iu" else np.isfinite(values)


def _distance(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
    """Magnitudes of differences. Of large integers they are exact, though these are no doubles."""
    if first.dtype.kind in "iu":
        # As residues, so that the difference of any two of the dtype has room.
        low, high = (edge(first, second).astype(np.uint64) for edge in (np.minimum, np.maximum))
        between: NDArray[np.float64] = (high - low).astype(np.float64)
        return between
    # Two of the largest values may lie further apart than any double is large.
    with np.errstate(over="ignore"):
        found: NDArray[np.float64] = np.abs(first - second)
    return found


def _rows(words: NDArray[Any], width: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(words).reshape(-1).view(np.uint8).reshape(-1, width)


def _l2(values: NDArray[Any]) -> float:
    """Euclidean norm, also where squares would be too large or too small for doubles."""
    with np.errstate(over="ignore"):
        largest = float(np.abs(values).max(initial=0.0))
    if not 0 < largest < math.inf:
        return largest
    if not 1e-140 < largest < 1e140:
        scaled = values / largest
        return largest * math.sqrt(float(np.vdot(scaled, scaled).real))
    return math.sqrt(float(np.vdot(values, values).real))
