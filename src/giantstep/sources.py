"""What a rank writes, from its part of the plan: sources of bytes before, the report of where they lie after. For `save`."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from giantstep.codecs import OBJECT_CODEC
from giantstep.format.data_file import ChunkLayout, DataFilePlan, chunk_entry, object_entry, plan_data_files
from giantstep.held_memory import Held, hold
from giantstep.mapping.describe import Described, StoredObject
from giantstep.planning.contents import ContentReport
from giantstep.planning.description import COPY, Description
from giantstep.planning.index_plan import WriteReport
from giantstep.planning.write_part import WritePart, cut_regions
from giantstep.shards.dtypes import DType
from giantstep.shards.object_keys import COMMON_KEY
from giantstep.shards.region import Region
from giantstep.staging.host import host_pieces
from giantstep.writing.contents import heads_of
from giantstep.writing.write import Sources, Written


def encoded(stored: Mapping[str, StoredObject]) -> dict[str, bytes]:
    """Objects that this rank may write, as bytes by name; no bytes for a common state without anything in it."""
    return {
        name: b"" if name == COMMON_KEY and item.value == {} else OBJECT_CODEC.encode(item.value, item.path)
        for name, item in stored.items()
        if item.role != COPY
    }


class PartSources:
    """What a rank writes by its part of a plan: its chunks, in the order of the part, then its objects.

    Args:
        part: what the rank writes.
        description: to which the part refers.
        described: the state.
        objects: encoded objects by name.

    Attributes:
        objects: those that are written, by name: all of the part's that have bytes.
    """

    def __init__(self, part: WritePart, description: Description, described: Described, objects: Mapping[str, bytes]) -> None:
        self.objects = {name: objects[name] for name in part.objects if objects[name]}
        self._rows = part.row.tolist()
        self._described = described
        self._cuts = dict(zip(part.cut.tolist(), cut_regions(part, description), strict=True))

    def layout(self) -> ChunkLayout:
        """How the chunks follow one another in one file. Says the same for all states of this part and description."""
        return ChunkLayout.of(*self._chunks())

    def _chunks(self) -> tuple[list[str], list[DType], list[Region]]:
        """Key, dtype and region of each chunk."""
        keys, dtypes, regions = self._described.shards
        found = [regions[row] for row in self._rows]
        for chunk, region in self._cuts.items():
            found[chunk] = region
        return [keys[row] for row in self._rows], [dtypes[row] for row in self._rows], found

    def plans(self, layout: ChunkLayout, max_file_bytes: int, metadata: dict[str, str]) -> list[DataFilePlan]:
        """The data files; mostly one. `layout` is that of `layout()`, made now or for an earlier state."""
        entries = [object_entry(name, len(data)) for name, data in self.objects.items()]
        if not self._rows and not entries:
            return []
        single = layout.with_objects(entries, max_file_bytes, metadata)
        if single is not None:
            return [single]
        keys, dtypes, regions = self._chunks()
        chunks = [chunk_entry(*chunk) for chunk in zip(keys, dtypes, regions, strict=True)]
        alignments = [*(dtype.item_bytes for dtype in dtypes), *(1 for _ in entries)]
        return plan_data_files([*chunks, *entries], alignments, max_file_bytes, metadata)

    def plans_of(self, groups: Sequence[NDArray[np.intp]], max_file_bytes: int, metadata: dict[str, str]) -> list[DataFilePlan]:
        """The data files of some entries (chunks, then objects), each group in files of its own."""
        keys, dtypes, regions = self._chunks()
        objects = list(self.objects.items())
        found = []
        for group in groups:
            rows = group.tolist()
            chunks = [row for row in rows if row < len(keys)]
            entries = [chunk_entry(keys[row], dtypes[row], regions[row]) for row in chunks]
            entries += [
                object_entry(name, len(data)) for name, data in (objects[row - len(keys)] for row in rows[len(chunks) :])
            ]
            alignments = [dtypes[row].item_bytes for row in chunks] + [1] * (len(rows) - len(chunks))
            plans = plan_data_files(entries, alignments, max_file_bytes, metadata)
            found += [replace(plan, order=group[plan.order]) for plan in plans]
        return found

    def sources(self, layout: ChunkLayout, piece_bytes: int) -> Sources:
        """Where the bytes come from.

        Args:
            layout: as for `plans`.
            piece_bytes: how much of a tensor that must be copied is copied at a time.
        """
        views = self._described.views_of(self._rows)
        for chunk, region in self._cuts.items():
            whole = self._described.shards[2][self._rows[chunk]]
            views[chunk] = views[chunk][region.relative_to(whole.offset).slices()]
        objects = list(self.objects.values())

        def pieces(position: int) -> Iterable[NDArray[np.uint8]]:
            if position < len(views):
                return host_pieces(views[position], piece_bytes)
            return [np.frombuffer(objects[position - len(views)], dtype=np.uint8)]

        held = _addresses(views, lambda chunk: self._described.shards[0][self._rows[chunk]])
        return Sources(
            bytes=np.concatenate((layout.bytes, np.array([len(data) for data in objects], dtype=np.int64))),
            address=np.concatenate((held.address, np.zeros(len(objects), dtype=np.int64))),
            owner=held.owner,
            pieces=pieces,
        )


@dataclass(frozen=True, slots=True)
class Content:
    """What a rank is to write, by its part of the plan: chunks, then objects."""

    chosen: PartSources
    layout: ChunkLayout
    sources: Sources

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return len(self.sources.bytes) - len(self.chosen.objects)


def _addresses(views: Sequence[torch.Tensor], key_of: Callable[[int], str]) -> Held:
    """Where the bytes of each lie as they are to be stored; 0 for those that must be gathered, or computed, first."""
    ready = np.ones(len(views), dtype=bool)
    for fact, wanted in _READY.items():
        ready &= np.fromiter(map(fact, views), dtype=bool, count=len(views)) == wanted
    rows = np.flatnonzero(ready)
    held = hold(list(itertools.compress(views, ready.tolist())), lambda row: key_of(int(rows[row])))
    found = np.zeros(len(views), dtype=np.int64)
    found[ready] = held.address
    return Held(found, held.owner)


_READY: dict[Callable[[torch.Tensor], bool], bool] = {
    torch.Tensor.is_contiguous: True,
    operator.attrgetter("is_cpu"): True,
    torch.Tensor.is_neg: False,
    torch.Tensor.is_conj: False,
}


def write_report(written: Written, sources: Sources, objects: Sequence[str]) -> WriteReport:
    """Where everything lies, for the index; sources are chunks, then these objects."""
    chunks = len(sources.bytes) - len(objects)
    checksums = [found.checksums for found in written.files]
    return WriteReport(
        file_names=[found.name for found in written.files],
        file_bytes=np.array([found.bytes for found in written.files], dtype=np.int64),
        file_blocks=np.array([len(found) for found in checksums], dtype=np.int64),
        block_checksum=np.concatenate([np.empty(0, np.uint64), *checksums]),
        chunk_file=written.file[:chunks],
        chunk_start=written.start[:chunks],
        object_keys=[*objects],
        object_file=written.file[chunks:],
        object_start=written.start[chunks:],
        object_bytes=sources.bytes[chunks:],
    )


def content_report(content: Content, digests: NDArray[np.uint64]) -> ContentReport:
    """Digests of all that a rank is to write, and of the heads of its chunks."""
    chunks, sources = content.chunks, content.sources
    heads, objects = heads_of(sources)[:chunks], list(content.chosen.objects)
    return ContentReport(heads, digests[:chunks], objects, sources.bytes[chunks:], digests[chunks:])
