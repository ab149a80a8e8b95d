"""How ranks divide tensors among them: every rank's `Description`, made with NumPy, without memory or torch.

A layout is a function from tensors and a number of ranks to one description per rank. Ranks that hold the same share one
object, as replicas would share one message.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from tensors import Tensors

from giantstep.planning.description import COPY, IMPLICIT, MAIN, Description
from giantstep.shards.region import Int64s, padded_to_ragged

Layout: TypeAlias = Callable[[Tensors, int], list[Description]]

_MESH = 0x5EED
_TENSOR_PARALLEL = 8
_HSDP_RANKS = 64
# Of a weight that is cut along its columns in tensor parallelism, as Megatron does.
_CUT_BY_COLUMNS = ("o_proj.weight", "down_proj.weight")


class Table:
    """Global tensors as padded arrays; makes descriptions of some of their regions."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self.ndim = np.array([len(shape) for shape in tensors.shapes], dtype=np.int64)
        self.width = max(1, int(self.ndim.max(initial=1)))
        self.shape = np.ones((len(self.ndim), self.width), dtype=np.int64)
        for row, shape in enumerate(tensors.shapes):
            self.shape[row, self.width - len(shape) :] = shape
        self.dims = padded_to_ragged(self.shape, self.ndim)
        # Contents are the same wherever a key is the same, and so are their digests.
        words = b"".join(hashlib.blake2b(key.encode(), digest_size=16).digest() for key in tensors.keys)
        self.digest = np.frombuffer(words, dtype=np.uint64).reshape(-1, 2)

    def describe(
        self, tensor: Int64s, offset: Int64s, size: Int64s, role: NDArray[np.uint8], mesh: Int64s | None = None
    ) -> Description:
        """One rank's shards: rows of tensors, and padded regions. Empty ones are left out, as by `mapping`."""
        kept = np.flatnonzero((size > 0).all(axis=1))
        tensor, dims = tensor[kept], self.ndim[tensor[kept]]
        tied = np.full(len(self.ndim), -1, dtype=np.int64)
        tied[tensor] = tensor
        meshes = np.zeros(len(kept), dtype=np.int64) if mesh is None else mesh[kept]
        # Nobody vouches for plain tensors.
        alone = (role[kept] == IMPLICIT) & (meshes == 0)
        return Description(
            keys=self.tensors.keys,
            dtype=self.tensors.dtype,
            dims_ends=np.concatenate(([0], np.cumsum(self.ndim))),
            dims=self.dims,
            shard_tensor=tensor,
            shard_role=role[kept].astype(np.uint8),
            shard_mesh=meshes,
            shard_offset=padded_to_ragged(offset[kept], dims),
            shard_size=padded_to_ragged(size[kept], dims),
            shard_digest=np.where(alone[:, None], self.digest[tensor], np.uint64(0)),
            tied=tied,
            object_keys=[],
            object_role=np.zeros(0, dtype=np.uint8),
            object_digest=np.zeros((0, 2), dtype=np.uint64),
            object_bytes=np.zeros(0, dtype=np.int64),
        )

    def whole(self, role: int) -> Description:
        """A rank that holds every tensor in full."""
        tensor = np.arange(len(self.ndim))
        return self.describe(tensor, np.zeros_like(self.shape), self.shape, np.full(len(tensor), role))

    def divided(self, axis: Int64s, parts: int, part: int, role: NDArray[np.uint8], mesh: Int64s | None = None) -> Description:
        """A rank that holds one part of every tensor, cut along `axis` as `torch.chunk` does; -1 means in full."""
        tensor = np.arange(len(self.ndim))
        offset, size = np.zeros_like(self.shape), self.shape.copy()
        cut = np.flatnonzero(axis >= 0)
        length = self.shape[cut, axis[cut]]
        piece = -(-length // parts)
        first = np.minimum(piece * part, length)
        offset[cut, axis[cut]] = first
        size[cut, axis[cut]] = np.minimum(first + piece, length) - first
        return self.describe(tensor, offset, size, role, mesh)


def with_objects(descriptions: Sequence[Description], *, per_rank: bool) -> list[Description]:
    """The same with the common state, and if asked a sharded object of each rank's own, such as its random state."""
    ranks = len(descriptions)
    digest = np.random.default_rng(2).integers(1, 1 << 63, (1, 2), dtype=np.uint64)
    role = np.array([IMPLICIT], dtype=np.uint8)
    if not per_rank:
        known: dict[int, Description] = {}
        for found in descriptions:
            if id(found) not in known:
                known[id(found)] = replace(
                    found,
                    object_keys=["common_state"],
                    object_role=role,
                    object_digest=digest,
                    object_bytes=np.zeros(1, dtype=np.int64),
                )
        return [known[id(found)] for found in descriptions]
    return [
        replace(
            found,
            object_keys=["common_state", f"rng_state/shard_{rank}_{ranks}"],
            object_role=np.array([IMPLICIT, MAIN], dtype=np.uint8),
            object_digest=np.concatenate((digest, digest + np.uint64(rank))),
            object_bytes=np.zeros(2, dtype=np.int64),
        )
        for rank, found in enumerate(descriptions)
    ]


def sharing_columns(descriptions: Sequence[Description]) -> list[Description]:
    """The same, with columns that equal the rank's before being one object: so they take memory once."""
    found: list[Description] = []
    for description in descriptions:
        if found:
            shared = {
                name: getattr(found[-1], name)
                for name in ("shard_tensor", "shard_role", "shard_mesh", "shard_size", "shard_digest", "tied", "dims_ends")
                if np.array_equal(getattr(found[-1], name), getattr(description, name))
            }
            description = replace(description, **shared)  # noqa: PLW2901 - the same rank, smaller
        found.append(description)
    return found


def _roles(table: Table, role: int) -> NDArray[np.uint8]:
    return np.full(len(table.ndim), role, dtype=np.uint8)


def _shards(tensors: Tensors, parts: int) -> list[Description]:
    """Rows of every tensor over the ranks of one mesh, which vouches for replicas; scalars are plain tensors."""
    table = Table(tensors)
    axis = np.where(table.ndim > 0, table.width - table.ndim, -1)
    mesh = np.where(table.ndim > 0, _MESH, 0)
    roles = _roles(table, IMPLICIT)
    return sharing_columns([table.divided(axis, parts, part, roles, mesh) for part in range(parts)])


def sharded(tensors: Tensors, ranks: int) -> list[Description]:
    """FSDP: every rank holds some rows of every tensor."""
    return with_objects(_shards(tensors, ranks), per_rank=False)


def replicated(tensors: Tensors, ranks: int) -> list[Description]:
    """Data parallel: plain tensors, the same on all ranks, with digests that say so."""
    return with_objects([Table(tensors).whole(IMPLICIT)] * ranks, per_rank=False)


def hsdp(tensors: Tensors, ranks: int, shards: int = _HSDP_RANKS) -> list[Description]:
    """Hybrid: rows over groups of ranks, the groups replicas of each other; one mesh vouches for them."""
    held = _shards(tensors, min(shards, ranks))
    return with_objects([held[rank % len(held)] for rank in range(ranks)], per_rank=False)


def tensor_parallel(tensors: Tensors, ranks: int, parallel: int = _TENSOR_PARALLEL) -> list[Description]:
    """Tensor parallel times data parallel, as Megatron says it: MAIN on the first replica, COPY on the others.

    Matrices are cut by rows or columns; norms and scalars are on all ranks.
    """
    table = Table(tensors)
    by_columns = np.array([key.endswith(_CUT_BY_COLUMNS) for key in tensors.keys])
    axis = np.where(table.ndim < 2, -1, np.where(by_columns, table.width - 1, table.width - 2))
    everywhere = axis < 0
    kinds = {}
    for part in range(parallel):
        main = np.where(everywhere & (part > 0), COPY, MAIN).astype(np.uint8)
        kinds[part, True] = table.divided(axis, parallel, part, main)
        kinds[part, False] = table.divided(axis, parallel, part, _roles(table, COPY))
    return with_objects([kinds[rank % parallel, rank < parallel] for rank in range(ranks)], per_rank=True)


def flattened(tensors: Tensors, ranks: int) -> list[Description]:
    """ZeRO-1: all tensors laid out in one flat buffer, of which every rank holds an equal range.

    A range of a matrix is up to three boxes: the end of a row, whole rows, the beginning of a row.
    """
    table = Table(tensors)
    elements = table.shape.prod(axis=1)
    ends = np.cumsum(elements)
    share = -(-int(ends[-1]) // ranks)
    borders = np.minimum(np.arange(1, ranks + 1) * share, ends[-1])
    stop = np.unique(np.concatenate((ends, borders)))
    start = np.concatenate(([0], stop[:-1]))
    tensor = np.searchsorted(ends, start, side="right")
    rank = np.searchsorted(borders, start, side="right")
    base = ends[tensor] - elements[tensor]
    piece, offset, size = _boxes(start - base, stop - base, table.shape[tensor, -1])
    first_box = np.searchsorted(rank[piece], np.arange(ranks + 1))
    nothing = Table(Tensors([], [], np.zeros(0, dtype=np.uint8))).whole(MAIN)
    found = []
    for low, high in itertools.pairwise(first_box.tolist()):
        if low == high:
            found.append(nothing)
            continue
        mine = tensor[piece[low:high]]
        some = slice(int(mine[0]), int(mine[-1]) + 1)
        part = Table(Tensors(tensors.keys[some], tensors.shapes[some], tensors.dtype[some]))
        cut = table.width - part.width
        roles = np.full(high - low, MAIN, dtype=np.uint8)
        found.append(part.describe(mine - mine[0], offset[low:high, cut:], size[low:high, cut:], roles))
    return with_objects(found, per_rank=True)


def _boxes(start: Int64s, stop: Int64s, columns: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """Flat ranges of matrices with so many columns as boxes: which range each box is of, its offset and size."""
    first, head = np.divmod(start, columns)
    last, tail = np.divmod(stop, columns)
    within = first == last
    whole = first + (head > 0)
    zero, one = np.zeros_like(first), np.ones_like(first)
    # Per range, in order: what it has of its first row, its whole rows, what it has of its last row.
    offset = np.stack([first, head, whole, zero, last, zero], axis=1).reshape(-1, 3, 2)
    begun = np.where(within, tail - head, np.where(head > 0, columns - head, 0))
    ended = np.where(within, 0, tail)
    size = np.stack([one, begun, np.where(within, 0, last - whole), columns, one, ended], axis=1).reshape(-1, 3, 2)
    kept = (size > 0).all(axis=2)
    return np.nonzero(kept)[0], offset[kept], size[kept]


def joined(*parts: Description) -> Description:
    """One rank that holds all of these; no key is in two of them. Objects are those of the first."""
    tensors = np.cumsum([0, *(len(part.keys) for part in parts)])

    def column(name: str) -> NDArray[np.generic]:
        return np.concatenate([getattr(part, name) for part in parts])

    return replace(
        parts[0],
        keys=[key for part in parts for key in part.keys],
        dims_ends=np.concatenate(([0], np.cumsum(np.concatenate([part.tensor_ndim for part in parts])))),
        shard_tensor=np.concatenate([part.shard_tensor + base for part, base in zip(parts, tensors, strict=False)]),
        tied=np.concatenate(
            [np.where(part.tied < 0, -1, part.tied + base) for part, base in zip(parts, tensors, strict=False)]
        ),
        **{
            name: column(name)
            for name in (
                "dtype",
                "dims",
                "shard_role",
                "shard_mesh",
                "shard_offset",
                "shard_size",
                "shard_digest",
            )
        },
    )


LAYOUTS: dict[str, Layout] = {
    "sharded": sharded,
    "replicated": replicated,
    "tp x dp": tensor_parallel,
    "flattened": flattened,
    "hsdp": hsdp,
}
