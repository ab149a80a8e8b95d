"""Which bytes are read: all that are needed, few others, in bounded reads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from giantstep.errors import CorruptionError
from giantstep.planning import intersections
from giantstep.planning.load_plan import LoadPlan, plan_load
from giantstep.planning.load_tables import ChunkTable, WantedTable, tabulate_wanted
from giantstep.shards.region import Region
from layouts import partitions, regions


def chunk_table(chunks: list[Region], item: int, gap: int = 0) -> ChunkTable:
    """Chunks of one tensor, one after another in file 0."""
    starts, position = [], 4096
    for chunk in chunks:
        starts.append(position)
        position += chunk.elements * item + gap
    return ChunkTable(
        ends=np.array([0, len(chunks)]),
        item_bytes=np.array([item]),
        file=np.zeros(len(chunks), dtype=np.int64),
        start=np.array(starts, dtype=np.int64),
        offset=np.array([chunk.offset for chunk in chunks], dtype=np.int64).reshape(len(chunks), -1),
        size=np.array([chunk.size for chunk in chunks], dtype=np.int64).reshape(len(chunks), -1),
    )


def wanted_table(*wanted: Region, partial: bool = False) -> WantedTable:
    return tabulate_wanted([0] * len(wanted), wanted, [partial] * len(wanted), len(wanted[0].size))


def boxes_of(plan: LoadPlan, first: int, last: int) -> list[tuple[int, Region, int, int]]:
    """Chunk, box, and bytes in the file of some pieces."""
    found = []
    for row in range(first, last):
        read = next(read for read in plan.reads if read.first <= row < read.last)
        shift = read.start - read.position
        box = Region(tuple(plan.pieces.offset[row].tolist()), tuple(plan.pieces.size[row].tolist()))
        start, stop = int(plan.pieces.start[row]) + shift, int(plan.pieces.stop[row]) + shift
        found.append((int(plan.pieces.chunk[row]), box, start, stop))
    return found


def wanted_blocks(chunks: list[Region], wanted: Region, item: int, block: int) -> set[int]:
    """Blocks of file 0 that hold at least one wanted byte, element by element."""
    found: set[int] = set()
    position = 4096
    for chunk in chunks:
        inside = np.zeros((6, 5, 4), dtype=bool)
        inside[wanted.slices()] = True
        for element in np.flatnonzero(inside[chunk.slices()]).tolist():
            found |= {(position + element * item) // block, (position + element * item + item - 1) // block}
        position += chunk.elements * item
    return found


@settings(max_examples=400)
@given(partitions((6, 5, 4)), regions((6, 5, 4)), st.sampled_from([16, 64, 4096]), st.sampled_from([64, 256, 4096]))
def test_pieces_hold_exactly_the_wanted_elements_within_bounds(
    chunks: list[Region], wanted: Region, block: int, buffer: int
) -> None:
    if not wanted.elements:
        return
    table = chunk_table(chunks, 2)
    plan = plan_load(table, wanted_table(wanted), block_bytes=block, buffer_bytes=buffer)
    count = np.zeros((6, 5, 4), dtype=int)
    blocks: list[int] = []
    segment = max(1, buffer // block) * block
    for read in plan.reads:
        assert read.start % block == 0
        assert read.stop % block == 0
        assert read.start // segment == (read.stop - 1) // segment
        blocks += range(read.start // block, read.stop // block)
        for chunk, box, start, stop in boxes_of(plan, read.first, read.last):
            assert read.start <= start < stop <= read.stop
            count[box.slices()] += 1
            assert box.intersect(chunks[chunk]) == box
    assert len(blocks) == len(set(blocks))
    assert plan.reads == [] or plan.reads[-1].last == len(plan.pieces)
    assert set(blocks) == wanted_blocks(chunks, wanted, 2, block)
    expected = np.zeros((6, 5, 4), dtype=int)
    expected[wanted.slices()] = 1
    assert (count == expected).all()


def test_a_row_range_reads_its_bytes_and_no_others_but_for_blocks() -> None:
    table = chunk_table([Region((0, 0), (1000, 1000))], 4)
    plan = plan_load(table, wanted_table(Region((100, 0), (50, 1000))), block_bytes=4096, buffer_bytes=1 << 20)
    assert 200_000 <= plan.bytes <= 200_000 + 2 * 4096
    assert len(plan.reads) == 1


def test_large_gaps_between_rows_are_skipped_and_small_ones_read() -> None:
    """One column of a matrix with rows of 64 KiB needs one block per row; with rows of 1 KiB all blocks are needed."""
    wide = chunk_table([Region((0, 0), (50, 16384))], 4)
    plan = plan_load(wide, wanted_table(Region((0, 5), (50, 1))), block_bytes=4096, buffer_bytes=1 << 20)
    assert plan.bytes == 50 * 4096
    narrow = chunk_table([Region((0, 0), (50, 256))], 4)
    plan = plan_load(narrow, wanted_table(Region((0, 5), (50, 1))), block_bytes=4096, buffer_bytes=1 << 20)
    assert plan.bytes <= 50 * 1024 + 4096
    assert len(plan.reads) == 1


def test_neighbouring_chunks_are_read_together_up_to_the_buffer() -> None:
    chunks = [Region((n,), (1,)) for n in range(10_000)]
    plan = plan_load(chunk_table(chunks, 8), wanted_table(Region((0,), (10_000,))), block_bytes=4096, buffer_bytes=1 << 20)
    assert len(plan.reads) == 1
    assert len(plan.pieces) == 10_000


def test_an_index_that_lacks_part_of_a_wanted_region_is_corrupt_unless_partial_is_fine() -> None:
    table = chunk_table([Region((0,), (4,)), Region((6,), (4,))], 4)
    wanted = Region((2,), (6,))
    with pytest.raises(CorruptionError, match="4 of the 6 elements"):
        plan_load(table, wanted_table(wanted), block_bytes=16, buffer_bytes=64)
    plan = plan_load(table, wanted_table(wanted, partial=True), block_bytes=16, buffer_bytes=64)
    assert int((plan.pieces.stop - plan.pieces.start).sum()) == 16


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_few_and_many_chunks_of_a_tensor_meet_the_same_regions(data: st.DataObject) -> None:
    shape = (6, 5, 4)
    chunks = chunk_table([chunk for chunk in data.draw(partitions(shape)) if chunk.elements], 2)
    wanted = wanted_table(*data.draw(st.lists(regions(shape), min_size=1, max_size=4)))
    found = []
    # With 0, chunks are sorted and swept, however few there are.
    for few in (1_000, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(intersections, "_FEW_CANDIDATES", few)
            met = intersections.intersections(chunks, wanted)
        rows = zip(met.wanted.tolist(), met.chunk.tolist(), met.offset.tolist(), met.size.tolist(), strict=True)
        found.append(sorted(rows))
    assert found[0] == found[1]


def test_regions_of_one_object_are_tabulated_as_others_are() -> None:
    shared, own = Region((2, 3), (4, 5)), Region((7,), (8,))
    table = tabulate_wanted([3, 1, 2], [shared, own, shared], [False, True, False], 3)
    assert table.tensor.tolist() == [3, 1, 2]
    assert table.offset.tolist() == [[0, 2, 3], [0, 0, 7], [0, 2, 3]]
    assert table.size.tolist() == [[1, 4, 5], [1, 1, 8], [1, 4, 5]]
    assert table.partial.tolist() == [False, True, False]
