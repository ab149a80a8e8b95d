"""The dtype table against torch, NumPy and safetensors."""

from __future__ import annotations

import pytest
import torch

from giantstep.errors import BadArgumentError
from giantstep.reading.lazy_array import numpy_dtype
from giantstep.shards.dtypes import BY_CODE, BY_TORCH_NAME, ITEM_BYTES, DType, dtype_of_torch_name


@pytest.mark.parametrize("dtype", BY_CODE.values(), ids=lambda dtype: dtype.name)
def test_item_sizes_are_torchs(dtype: DType) -> None:
    kind = getattr(torch, dtype.torch_name)
    assert torch.empty(0, dtype=kind).element_size() == dtype.item_bytes == ITEM_BYTES[dtype.code]
    assert dtype_of_torch_name(str(kind)) is dtype
    assert dtype.item_bytes % numpy_dtype(dtype).itemsize == 0


def test_every_dtype_of_torch_is_stored_but_quantised_and_sub_byte_ones() -> None:
    known = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}
    names = {str(getattr(torch, name)).removeprefix("torch.") for name in known}
    refused = {name for name in names if name not in BY_TORCH_NAME}
    assert all(name.startswith(("quint", "qint", "bits", "int", "uint")) for name in refused), refused
    for name in refused:
        with pytest.raises(BadArgumentError, match="cannot be stored"):
            dtype_of_torch_name(name)
