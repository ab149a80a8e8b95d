"""What one rank writes, as it learns it from rank 0. Made by `save_plan`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np

from giantstep.errors import PeerFailureError
from giantstep.planning.columns import pack_column, pack_texts, unpack_column, unpack_texts
from giantstep.planning.description import Description, Parts
from giantstep.shards.region import Int64s, Region


@dataclass(frozen=True, slots=True)
class CopyPart:
    """What one rank writes as a twin of others: the same files as these (`twins`). In the order of owner, group and chunk.

    Attributes:
        owner, group: [chunks] whose file it belongs to, and which of its groups of files.
        row, cut, offset, size: as in `WritePart`.
    """

    owner: Int64s
    group: Int64s
    row: Int64s
    cut: Int64s
    offset: Int64s
    size: Int64s

    @classmethod
    def of_nothing(cls) -> CopyPart:
        """No twin of anybody."""
        return cls(*(np.zeros(0, dtype=np.int64) for _ in _COPY_COLUMNS))


_COPY_COLUMNS = ("owner", "group", "row", "cut", "offset", "size")


@dataclass(frozen=True, slots=True)
class WritePart:
    """What one rank writes, as it learns it from rank 0.

    Attributes:
        row: [chunks] row of this rank's description that holds the chunk.
        cut: chunks that are not all of that row's region; ascending.
        offset, size: their regions of the global tensor, ragged.
        objects: names of the objects that it writes.
        differing: names of objects that are not the same on all ranks that hold them.
        weights: per object of this rank's description, by what its digest is multiplied in the sum over all ranks that
            is 0 as long as their values are equal (`planning.reuse`).
        group: [chunks] number of the group of files that each lies in (`twins`); empty if there are no copies.
        copies: what it writes as a twin of others.
    """

    row: Int64s
    cut: Int64s
    offset: Int64s
    size: Int64s
    objects: list[str]
    differing: list[str]
    weights: Int64s
    group: Int64s = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    copies: CopyPart = field(default_factory=CopyPart.of_nothing)

    def encode(self) -> Parts:
        """As a message, in parts of which most are equal on many ranks."""
        copies = (getattr(self.copies, name) for name in _COPY_COLUMNS)
        columns = (self.row, self.cut, self.offset, self.size, self.weights, self.group, *copies)
        return (*map(pack_column, columns), *pack_texts(self.objects), *pack_texts(self.differing))

    @classmethod
    def decode(cls, parts: Parts) -> WritePart:
        """Inverse of `encode`."""
        if len(parts) != _WRITE_PARTS:
            raise PeerFailureError(f"rank 0 sent a part of the plan in {len(parts)} parts, expected {_WRITE_PARTS}")
        row, cut, offset, size, weights, group, *copies = (unpack_column(part) for part in parts[:-4])
        objects, differing = unpack_texts(*parts[-4:-2]), unpack_texts(*parts[-2:])
        return cls(row, cut, offset, size, objects, differing, weights, group, CopyPart(*copies))


_WRITE_PARTS = 6 + len(_COPY_COLUMNS) + 4


def cut_regions(part: WritePart, description: Description) -> list[Region]:
    """The regions of those chunks of a rank's part that are cut, in their order.

    Raises:
        PeerFailureError: the part does not fit the description.
    """
    dims = description.tensor_ndim[description.shard_tensor]
    count = len(part.row)
    fits = not count or 0 <= int(part.row.min()) <= int(part.row.max()) < len(dims)
    fits = fits and (not len(part.cut) or 0 <= int(part.cut.min()) <= int(part.cut.max()) < count)
    cut = dims[part.row[part.cut]] if fits else dims
    if not fits or int(cut.sum()) != len(part.offset) or len(part.offset) != len(part.size):
        raise PeerFailureError("rank 0 sent a part of the plan that does not fit this rank's tensors")
    ends = np.cumsum(cut).tolist()
    offset, size = part.offset.tolist(), part.size.tolist()
    return [Region(tuple(offset[first:last]), tuple(size[first:last])) for first, last in itertools.pairwise([0, *ends])]
