"""`Watch`: tensors that must not change for a while, and whether they did. Called by `snapshot`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch

from giantstep.errors import ChangedTooSoonError

_version = operator.attrgetter("_version")


class Watch(NamedTuple):
    """Tensors that are not to change, and how often each was changed in place so far; None where torch does not count."""

    names: Sequence[str]
    tensors: Sequence[torch.Tensor]
    versions: list[int | None]

    @classmethod
    def of(cls, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> Watch:
        return cls(names, tensors, _versions(tensors))

    def check(self) -> None:
        """Raise if one was changed."""
        now = _versions(self.tensors)
        if now == self.versions:
            return
        changed = [name for name, old, new in zip(self.names, self.versions, now, strict=True) if old != new]
        raise ChangedTooSoonError(
            f"tensor {changed[0]!r} was changed in place before it was staged, so what would be stored is neither its old "
            "value nor its new one"
            + (f" (and so were {len(changed) - 1} more)" if len(changed) > 1 else "")
            + ". Call PendingSave.wait_staged before tensors change, or PendingSave.guard once with the optimizer."
        )

    def check_memory(self) -> None:
        """Raise if one has lost its memory, as when a storage was resized."""
        for name, tensor in zip(self.names, self.tensors, strict=True):
            reach = sum((count - 1) * step for count, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            if (tensor.storage_offset() + reach) * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise ChangedTooSoonError(f"the memory of tensor {name!r} was freed before it was staged")


def _versions(tensors: Sequence[torch.Tensor]) -> list[int | None]:
    try:
        return list(map(_version, tensors))
    except RuntimeError:
        # Tensors made in inference mode have no counter.
        return [None if tensor.is_inference() else tensor._version for tensor in tensors]
