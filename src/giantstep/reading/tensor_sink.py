"""Sinks that fill torch tensors: straight into host memory where possible, else by way of torch."""

from __future__ import annotations

import numpy as np
import torch

from giantstep.errors import MismatchError
from giantstep.reading.array_sink import ArraySink
from giantstep.reading.placing import WORDS, Bits, Sink
from giantstep.shards.dtypes import DType
from giantstep.words import torch_dtype, words_of


def sink_for(view: torch.Tensor, stored: DType, origin: tuple[int, ...]) -> Sink:
    """The sink that fills `view` with stored elements of dtype `stored`.

    Args:
        view: tensor of the wanted region's shape, any device and strides; owned by the caller.
        stored: dtype in the checkpoint; if it is not the view's, elements are cast as `Tensor.copy_` does.
        origin: offset of the region in its global tensor.
    """
    same = str(view.dtype) == f"torch.{stored.torch_name}"
    if same and view.device.type == "cpu" and not view.is_conj() and not view.is_neg():
        return ArraySink(words_of(view).numpy(), origin)
    return TensorSink(view, stored, origin)


class _Boxes:
    """Boxes of stored elements as tensors, and where in a target they belong."""

    def __init__(self, target: torch.Tensor, stored: DType, origin: tuple[int, ...]) -> None:
        self._target = target
        self._stored = torch_dtype(stored)
        self._words = WORDS[stored.item_bytes]
        self._origin = origin

    def _box(self, offset: tuple[int, ...], size: tuple[int, ...], bits: Bits) -> tuple[torch.Tensor, torch.Tensor]:
        """The part of the target, and a copy of the elements for it."""
        skip = len(offset) - len(self._origin)
        box = size[skip:]
        where = tuple(
            slice(start - zero, start - zero + count)
            for start, zero, count in zip(offset[skip:], self._origin, box, strict=True)
        )
        # The buffer is reused when this returns, and copies to a device may be asynchronous: copy first.
        plain = torch.from_numpy(np.array(bits.reshape(box), dtype=self._words, order="C").reshape(-1))
        return self._target[where], plain.view(self._stored).reshape(box)


class TensorSink(_Boxes):
    """Copies boxes into a tensor of another device or dtype; see `sink_for`."""

    def put(self, offset: tuple[int, ...], size: tuple[int, ...], bits: Bits) -> None:
        target, elements = self._box(offset, size, bits)
        target.copy_(elements)


class CompareSink(_Boxes):
    """Raises `MismatchError` where boxes, cast as they would be for loading, are not what the target holds, bit for bit."""

    def __init__(self, target: torch.Tensor, stored: DType, origin: tuple[int, ...], key: str) -> None:
        super().__init__(target, stored, origin)
        self._key = key

    def put(self, offset: tuple[int, ...], size: tuple[int, ...], bits: Bits) -> None:
        target, elements = self._box(offset, size, bits)
        if elements.dtype != target.dtype:
            elements = elements.to(target.dtype)
        found = words_of(target.resolve_conj().resolve_neg().cpu())
        if not torch.equal(words_of(elements).reshape(-1), found.contiguous().reshape(-1)):
            raise MismatchError(
                f"tensor {self._key!r} shares memory with another tensor of the state dict, but other values are stored for "
                "it: one of them cannot be loaded. Load into tensors with memory of their own; this state must not be used."
            )
