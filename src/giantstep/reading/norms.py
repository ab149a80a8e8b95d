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
        self._squares = self._first_squares = self._max_abs = 0.0

    @staticmethod
    def can(dtype: DType) -> bool:
        """Whether elements of this dtype are numbers here: packed and complex half-precision ones are not."""
        return dtype.name not in ("F4X2", "C32")

    def add(self, first: NDArray[Any], second: NDArray[Any]) -> None:
        """Take corresponding words of both into account; the same array twice means that they are equal."""
        ours = _numbers(first, self._dtype)
        finite = np.isfinite(ours)
        self._first_squares += _squares(ours[finite])
        if second is first:
            return
        theirs = _numbers(second, self._dtype)
        width = first.dtype.itemsize
        other = (_rows(first, width) != _rows(second, width)).any(axis=1)
        usable = other & finite & np.isfinite(theirs)
        with np.errstate(over="ignore"):
            difference = np.abs(ours[usable] - theirs[usable])
        self._elements += int(other.sum())
        self._not_finite += int(other.sum() - usable.sum())
        self._squares += _squares(difference)
        self._max_abs = max(self._max_abs, float(difference.max(initial=0.0)))

    def norms(self) -> Norms:
        """The result."""
        l2, whole = math.sqrt(self._squares), math.sqrt(self._first_squares)
        relative = l2 / whole if whole else (math.inf if l2 else 0.0)
        return Norms(self._elements, self._not_finite, l2, self._max_abs, relative)


def _numbers(words: NDArray[Any], dtype: DType) -> NDArray[Any]:
    values = view_as(np.ascontiguousarray(words), dtype).reshape(-1)
    # NaNs of some payloads cannot be cast without being made quiet.
    with np.errstate(invalid="ignore"):
        return values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)


def _rows(words: NDArray[Any], width: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(words).reshape(-1).view(np.uint8).reshape(-1, width)


def _squares(values: NDArray[Any]) -> float:
    # Of the largest values the squares are infinite, and so is the norm.
    with np.errstate(over="ignore"):
        return float(np.vdot(values, values).real)
