"""What a rank writes, from its part of the plan: sources of bytes before, the report of where they lie after. For `save`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from giantstep.codecs import OBJECT_CODEC
from giantstep.format.data_file import ChunkEntries, object_entry
from giantstep.mapping.describe import Described, StoredObject
from giantstep.planning.description import COPY, Description
from giantstep.planning.index_plan import WriteReport
from giantstep.planning.save_plan import WritePart, cut_regions
from giantstep.shards.object_keys import COMMON_KEY
from giantstep.staging.host import host_pieces
from giantstep.writing.write import Source, Written


def encoded(stored: Mapping[str, StoredObject]) -> dict[str, bytes]:
    """Objects that this rank may write, as bytes by name; no bytes for a common state without anything in it."""
    return {
        name: b"" if name == COMMON_KEY and item.value == {} else OBJECT_CODEC.encode(item.value, item.path)
        for name, item in stored.items()
        if item.role != COPY
    }


def sources_of(
    part: WritePart, description: Description, described: Described, objects: Mapping[str, bytes], piece_bytes: int
) -> list[Source]:
    """This rank's chunks, in the order of its part, then its objects.

    Args:
        part: what the rank writes.
        description: to which the part refers.
        described: the state.
        objects: encoded objects by name.
        piece_bytes: how much of a tensor that must be copied is copied at a time.
    """
    pieces = [piece for leaf in described.leaves for piece in leaf.pieces]
    leaves = [leaf for leaf in described.leaves for _ in leaf.pieces]
    cuts = dict(zip(part.cut.tolist(), cut_regions(part, description), strict=True))
    entry_of = ChunkEntries().entry
    sources = []
    for chunk, row in enumerate(part.row.tolist()):
        leaf, (region, view) = leaves[row], pieces[row]
        if chunk in cuts:
            held, region = region, cuts[chunk]
            view = view[region.relative_to(held.offset).slices()]
        dtype = leaf.extent.dtype
        sources.append(Source(entry_of(leaf.key, dtype, region), dtype.item_bytes, partial(host_pieces, view, piece_bytes)))
    for name in part.objects:
        data = objects[name]
        if data:
            sources.append(Source(object_entry(name, len(data)), 1, partial(_array_of, data)))
    return sources


def _array_of(data: bytes) -> Iterable[NDArray[np.uint8]]:
    return [np.frombuffer(data, dtype=np.uint8)]


def write_report(written: Written, sources: Sequence[Source], chunks: int) -> WriteReport:
    """Where everything lies, for the index; the first `chunks` sources are chunks."""
    file, start = np.array(written.file, dtype=np.int64), np.array(written.start, dtype=np.int64)
    checksums = [found.checksums for found in written.files]
    return WriteReport(
        file_names=[found.name for found in written.files],
        file_bytes=np.array([found.bytes for found in written.files], dtype=np.int64),
        file_blocks=np.array([len(found) for found in checksums], dtype=np.int64),
        block_checksum=np.concatenate([np.empty(0, np.uint64), *checksums]),
        chunk_file=file[:chunks],
        chunk_start=start[:chunks],
        object_keys=[source.entry.name[1:-1] for source in sources[chunks:]],
        object_file=file[chunks:],
        object_start=start[chunks:],
        object_bytes=np.array([source.entry.bytes for source in sources[chunks:]], dtype=np.int64),
    )
