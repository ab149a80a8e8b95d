"""A kind of wrapper tensor, so that stored descriptions of wrapper tensors are followed when they are loaded.

Called by `seeds` and `exercise`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import giantstep as gs

NAME = "fuzzed"
KEY, SHAPE = "quantised", (6, 4)
DESCRIPTION = {
    "wrapper": NAME,
    "shape": list(SHAPE),
    "dtype": "float32",
    "parts": ["data", "scale"],
    "attributes": {"block": 4},
}


class Fuzzed(torch.Tensor):
    """Is never made: its functions take any parts, so that whatever fails is the library."""


def _put_together(parts: Mapping[str, torch.Tensor], _attributes: dict[str, Any]) -> torch.Tensor:
    return torch.zeros(next(iter(parts.values())).shape)


gs.register_wrapper(
    Fuzzed,
    name=NAME,
    take_apart=lambda tensor: ({"data": tensor}, {}),
    put_together=_put_together,
    dequantise=lambda tensor: tensor,
)


def wanted_wrapper() -> gs.ShardedTensor:
    """The wrapper tensor of the valid checkpoint, to be dequantised."""
    return gs.ShardedTensor(KEY, None, torch.float32, SHAPE, SHAPE, (0, 0), None)
