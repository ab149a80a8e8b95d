"""Bytes are read to where they are wanted if they can, else through a buffer; the result is the same."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from giantstep.errors import CorruptionError
from giantstep.format.digests import block_checksums
from giantstep.options import Threads
from giantstep.planning.in_place import Memory, lie_alone, runs_in_place
from giantstep.planning.load_plan import plan_load
from giantstep.planning.load_tables import ChunkTable, tabulate_wanted
from giantstep.reading.array_sink import ArraySink, ArraySinks
from giantstep.reading.fetch import Source, fetch
from giantstep.shards.region import Region
from giantstep.storage.base import Access, ReadHandle
from giantstep.storage.buffers import address_of, device_buffer
from giantstep.storage.memory import MemoryStore
from layouts import partitions, regions

BLOCK = 4096
START = 4096
_NAMES = itertools.count()


class Aligned(ReadHandle):
    """A handle of a device that wants alignment, and notes which memory it is given."""

    def __init__(self, handle: ReadHandle, access: Access, notes: list[tuple[int, int, int]]) -> None:
        self._handle = handle
        self._access = access
        self._notes = notes

    @property
    def size(self) -> int:
        return self._handle.size

    def read_into(self, offset: int, target: memoryview) -> None:
        self._handle.read_into(offset, target)

    def read_parts(self, offset: int, targets: Sequence[memoryview], access: Access) -> None:
        for target in targets:
            address = address_of(np.frombuffer(target, dtype=np.uint8))
            self._notes.append((offset, address, len(target)))
            if self.size - offset > len(target):
                assert not (offset | address | len(target)) % access.alignment_bytes
            self._handle.read_into(offset, target)
            offset += len(target)

    def access_at(self, offset: int) -> Access:
        return self._access

    def close(self) -> None:
        self._handle.close()


class AlignedStore(MemoryStore):
    """A store of one file of chunks."""

    def __init__(self, data: bytes, access: Access) -> None:
        super().__init__(f"placing-{next(_NAMES)}")
        self.notes: list[tuple[int, int, int]] = []
        self._access = access
        self.prepare("")
        handle = self.create("f", len(data), direct=False)
        handle.write_at(0, data)

    def open_read(self, name: str, *, direct: bool = False) -> Any:
        return Aligned(super().open_read(name, direct=direct), self._access, self.notes)


def _source(store: AlignedStore, data: bytes, table: ChunkTable) -> Source:
    from types import SimpleNamespace

    checksums = block_checksums(memoryview(data), BLOCK)
    record: Any = SimpleNamespace(files=[SimpleNamespace(name="f", bytes=len(data), rank=3)], block_bytes=BLOCK)
    return Source(store, record, lambda _file, first, last: checksums[first:last], table, lambda _chunk: "w")


def stored(whole: NDArray[Any], chunks: Sequence[Region]) -> tuple[bytes, ChunkTable]:
    """Chunks of a tensor, one after another in a file."""
    parts = [whole[chunk.slices()].tobytes() for chunk in chunks]
    ends = list(itertools.accumulate(map(len, parts), initial=START))
    table = ChunkTable(
        ends=np.array([0, len(chunks)]),
        item_bytes=np.array([whole.itemsize]),
        file=np.zeros(len(chunks), dtype=np.int64),
        start=np.array(ends[:-1], dtype=np.int64),
        offset=np.array([chunk.offset for chunk in chunks], dtype=np.int64),
        size=np.array([chunk.size for chunk in chunks], dtype=np.int64),
    )
    return b"\0" * START + b"".join(parts), table


def tensor(shape: tuple[int, ...]) -> NDArray[np.int16]:
    seed = int.from_bytes(hashlib.sha256(repr(shape).encode()).digest()[:4], "little")
    return np.random.default_rng(seed).integers(-(1 << 15), 1 << 15, shape, dtype=np.int16)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_regions_are_filled_from_any_chunks_at_any_alignment(data: st.DataObject) -> None:
    shape = (7, 9, 300)
    whole = tensor(shape)
    chunks = [chunk for chunk in data.draw(partitions(shape)) if chunk.elements]
    content, table = stored(whole, chunks)
    wanted = [region for region in data.draw(st.lists(regions(shape), min_size=1, max_size=4)) if region.elements]
    if not wanted:
        return
    access = data.draw(st.sampled_from([Access(), Access(nearby=True), Access(16), Access(64), Access(512)]))
    store = AlignedStore(content, access)
    strided = data.draw(st.booleans())
    targets = [
        np.zeros((*region.size, 2), dtype=np.int16)[..., 0] if strided else np.zeros(region.size, np.int16) for region in wanted
    ]
    plan = plan_load(
        table, tabulate_wanted([0] * len(wanted), wanted, [False] * len(wanted), 3), block_bytes=BLOCK, buffer_bytes=3 * BLOCK
    )
    sinks = ArraySinks([ArraySink(target, region.offset) for target, region in zip(targets, wanted, strict=True)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("giantstep.reading.placing._DIRECT_PART_BYTES", 1)
        fetch(_source(store, content, table), plan, sinks, Threads(2, 2))
    for target, region in zip(targets, wanted, strict=True):
        assert np.array_equal(target, whole[region.slices()])
    store.clear()


def _large(shift: int) -> tuple[AlignedStore, Source, Any, NDArray[np.uint8]]:
    """8 MiB of which all is wanted, in memory that is so far from aligned."""
    whole = np.random.default_rng(1).integers(0, 256, (8 << 20,), dtype=np.uint8)
    region = Region.whole(whole.shape)
    content, table = stored(whole, [region])
    store = AlignedStore(content, Access(4096))
    target = device_buffer(len(whole) + shift)[shift:]
    plan = plan_load(table, tabulate_wanted([0], [region], [False], 1), block_bytes=BLOCK, buffer_bytes=2 << 20)
    fetch(_source(store, content, table), plan, ArraySinks([ArraySink(target, (0,))]), Threads(2, 2))
    assert np.array_equal(target, whole)
    return store, _source(store, content, table), plan, target


@pytest.mark.parametrize(("shift", "in_place"), [(0, True), (64, False)])
def test_large_regions_are_read_in_place_if_their_memory_is_aligned(shift: int, in_place: bool) -> None:
    store, _, _, target = _large(shift)
    low = address_of(target)
    direct = sum(size for _, address, size in store.notes if low <= address < low + len(target))
    # The last read is too short to be worth it.
    assert direct == (len(target) - START if in_place else 0)
    store.clear()


def test_damage_is_found_where_it_was_read_to() -> None:
    store, source, plan, target = _large(0)
    handle = MemoryStore.open_read(store, "f")
    handle.write_at(5 << 20, b"\xff" * 16)
    with pytest.raises(CorruptionError, match=f"bytes {5 << 20} to {(5 << 20) + BLOCK} .*written by rank 3"):
        fetch(source, plan, ArraySinks([ArraySink(target, (0,))]), Threads(2, 2))
    store.clear()


def test_pieces_lie_alone_if_they_are_whole_and_nobody_else_wants_their_bytes() -> None:
    whole = Region.whole((4, 8))
    _, table = stored(np.zeros((4, 8), dtype=np.int16), [whole])

    def alone(*wanted: Region) -> list[bool]:
        asked = tabulate_wanted([0] * len(wanted), wanted, [False] * len(wanted), 2)
        return lie_alone(plan_load(table, asked, block_bytes=BLOCK, buffer_bytes=BLOCK)).tolist()

    first, last, column = Region((0, 0), (2, 8)), Region((2, 0), (2, 8)), Region((0, 3), (4, 1))
    assert alone(whole) == [True]
    assert alone(first, last) == [True, True]
    assert alone(column) == [False]
    assert alone(first, whole) == [False, False]
    assert alone(Region((0, 0), (1, 4)), Region((0, 2), (1, 4)), last) == [False, False, True]


def test_neighbours_in_the_file_and_in_memory_are_read_as_one_part() -> None:
    whole = tensor((4, 2, 300))
    rows = [Region((row, 0, 0), (1, 2, 300)) for row in range(4)]
    content, table = stored(whole, rows)
    store = AlignedStore(content, Access(nearby=True))
    # The third row lies elsewhere.
    memory, elsewhere = np.zeros((4, 2, 300), np.int16), np.zeros((1, 2, 300), np.int16)
    targets = [memory[0:1], memory[1:2], elsewhere, memory[3:4]]
    plan = plan_load(table, tabulate_wanted([0] * 4, rows, [False] * 4, 3), block_bytes=BLOCK, buffer_bytes=3 * BLOCK)
    sinks = [ArraySink(target, region.offset) for target, region in zip(targets, rows, strict=True)]
    fetch(_source(store, content, table), plan, ArraySinks(sinks), Threads(1, 1))
    assert np.array_equal(np.concatenate(targets), whole)
    row_bytes = whole[0].nbytes
    first, apart, last = address_of(memory), address_of(elsewhere), address_of(targets[3])
    inside = [(first, 2 * row_bytes), (apart, row_bytes), (last, row_bytes)]
    assert [(address, size) for _, address, size in store.notes if size % row_bytes == 0] == inside
    store.clear()


def test_regions_are_filled_in_place_only_where_they_lie_as_they_are_stored() -> None:
    region = Region.whole((4, 8))
    _, table = stored(np.zeros((4, 8), dtype=np.int16), [region])
    plan = plan_load(table, tabulate_wanted([0], [region], [False], 2), block_bytes=BLOCK, buffer_bytes=BLOCK)

    def in_place(start: int, strides: tuple[int, int]) -> bool:
        found = runs_in_place(plan, Memory(np.array([start]), np.array([strides])))
        return (found.address.tolist(), found.left.tolist()) == ([start], [])

    assert in_place(64, (16, 2))
    assert not in_place(64, (2, 8)), "transposed"
    assert not in_place(64, (32, 2)), "rows of a wider array"
    assert not in_place(0, (16, 2)), "nowhere"
