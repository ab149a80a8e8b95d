"""Torch tensors as plain words: integers of the elements' size, so that bytes move whatever they mean.

torch lacks operations (fill, copy, even contiguous) for some of its smaller dtypes; for integers it has them all.
Called by `staging`, `reading` and `mapping`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from giantstep.errors import UnsupportedTypeError
from giantstep.shards.dtypes import BY_TORCH_NAME, DType, dtype_of_torch_name


def torch_dtype(dtype: DType) -> torch.dtype:
    """Torch's dtype of a stored one.

    Raises:
        UnsupportedTypeError: this version of torch has no such dtype.
    """
    found = getattr(torch, dtype.torch_name, None)
    if not isinstance(found, torch.dtype):
        raise UnsupportedTypeError(f"torch {torch.__version__} has no dtype {dtype.torch_name}: a newer one is needed")
    return found


_STORED = {
    found: dtype for name, dtype in BY_TORCH_NAME.items() if isinstance(found := getattr(torch, name, None), torch.dtype)
}


def stored_dtype(dtype: torch.dtype) -> DType:
    """The inverse of `torch_dtype`; raises `BadArgumentError` for others."""
    found = _STORED.get(dtype) if isinstance(dtype, torch.dtype) else None
    return dtype_of_torch_name(str(dtype)) if found is None else found


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def words_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as words of its element size, sharing memory, shape and strides.

    16-byte elements stay complex128, which every operation knows. The tensor must not be lazily conjugated or negated.
    """
    word = _WORDS.get(tensor.element_size())
    return tensor if word is None else tensor.view(word)


def bytes_of(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The memory of a contiguous, non-empty CPU tensor as a one-dimensional array; no copy."""
    # Not reshape: a contiguous tensor of one element may keep any stride, with which it cannot be viewed as bytes.
    flat = tensor.as_strided((tensor.numel(),), (1,))
    array: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return array
