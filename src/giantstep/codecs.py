"""The codec of this library's objects: the base kinds, and torch's once something of torch's is met."""

from __future__ import annotations

from collections.abc import Iterable

from giantstep.format.codec import Codec, Kind
from giantstep.format.kinds import BASE_KINDS


def _torch_kinds() -> Iterable[Kind]:
    # Looking into a checkpoint needs torch only where torch's values are.
    from giantstep.mapping.torch_kinds import torch_kinds  # noqa: PLC0415 - imports torch

    return torch_kinds()


OBJECT_CODEC = Codec(BASE_KINDS, _torch_kinds)
