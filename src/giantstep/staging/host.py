"""`host_pieces`: a tensor's elements in row-major order as byte arrays, a bounded amount at a time.

Contiguous tensors on the CPU are not copied: the arrays are their memory. Everything else is copied piece by piece,
never whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from giantstep.format.digests import ContentDigest
from giantstep.shards.region import Region, split_region
from giantstep.words import bytes_of, words_of

Bytes = NDArray[np.uint8]


def host_pieces(tensor: torch.Tensor, piece_bytes: int) -> Iterator[Bytes]:
    """The bytes of a dense tensor of any device, strides and dtype, in row-major order.

    Args:
        tensor: not changed; must stay unchanged as long as pieces of it are used.
        piece_bytes: pieces that need a copy are not larger than this; others may be.

    Yields:
        One-dimensional arrays, each of which keeps its bytes as long as it is referred to.
    """
    if not tensor.numel():
        return
    tensor = tensor.detach()
    if tensor.is_contiguous() and tensor.device.type == "cpu" and not tensor.is_conj() and not tensor.is_neg():
        yield bytes_of(tensor)
        return
    words = words_of(tensor.resolve_conj().resolve_neg())
    for part in split_region(Region.whole(tuple(tensor.shape)), max(1, piece_bytes // tensor.element_size())):
        yield bytes_of(words[part.slices()].cpu().contiguous())


def content_digest(tensor: torch.Tensor, piece_bytes: int) -> tuple[int, int]:
    """128-bit digest of the tensor's bytes in row-major order."""
    digest = ContentDigest()
    for piece in host_pieces(tensor, piece_bytes):
        digest.update(piece.data)
    return digest.halves()
