"""Which bytes are read: all that are needed, few others, in bounded reads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from giantstep.errors import CorruptionError
from giantstep.planning.load_plan import ChunkTable, Read, WantedTable, plan_load, tabulate_wanted
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


def total(reads: list[Read]) -> int:
    return sum(read.stop - read.start for read in reads)


@settings(max_examples=200)
@given(partitions((6, 5, 4)), regions((6, 5, 4)), st.sampled_from([16, 64, 4096]), st.sampled_from([64, 256, 4096]))
def test_pieces_hold_exactly_the_wanted_elements_within_bounds(
    chunks: list[Region], wanted: Region, block: int, buffer: int
) -> None:
    if not wanted.elements:
        return
    table = chunk_table(chunks, 2)
    reads = plan_load(table, wanted_table(wanted), block_bytes=block, buffer_bytes=buffer)
    count = np.zeros((6, 5, 4), dtype=int)
    for read in reads:
        assert read.start % block == 0
        assert read.stop % block == 0
        assert read.stop - read.start <= buffer + 2 * block
        for piece in read.pieces:
            assert read.start <= piece.start < piece.stop <= read.stop
            assert piece.stop - piece.start <= max(buffer, 2)
            box = Region(piece.offset, piece.size)
            count[box.slices()] += 1
            chunk = chunks[piece.chunk]
            assert box.intersect(chunk) == box
    expected = np.zeros((6, 5, 4), dtype=int)
    expected[wanted.slices()] = 1
    assert (count == expected).all()


def test_a_row_range_reads_its_bytes_and_no_others_but_for_blocks() -> None:
    table = chunk_table([Region((0, 0), (1000, 1000))], 4)
    reads = plan_load(table, wanted_table(Region((100, 0), (50, 1000))), block_bytes=4096, buffer_bytes=1 << 20)
    assert 200_000 <= total(reads) <= 200_000 + 2 * 4096
    assert len(reads) == 1


def test_large_gaps_between_rows_are_skipped_and_small_ones_read() -> None:
    """One column of a matrix with rows of 64 KiB needs one block per row; with rows of 1 KiB all blocks are needed."""
    wide = chunk_table([Region((0, 0), (50, 16384))], 4)
    reads = plan_load(wide, wanted_table(Region((0, 5), (50, 1))), block_bytes=4096, buffer_bytes=1 << 20)
    assert total(reads) == 50 * 4096
    narrow = chunk_table([Region((0, 0), (50, 256))], 4)
    reads = plan_load(narrow, wanted_table(Region((0, 5), (50, 1))), block_bytes=4096, buffer_bytes=1 << 20)
    assert total(reads) <= 50 * 1024 + 4096
    assert len(reads) == 1


def test_neighbouring_chunks_are_read_together_up_to_the_buffer() -> None:
    chunks = [Region((n,), (1,)) for n in range(10_000)]
    reads = plan_load(chunk_table(chunks, 8), wanted_table(Region((0,), (10_000,))), block_bytes=4096, buffer_bytes=1 << 20)
    assert len(reads) == 1
    assert len(reads[0].pieces) == 10_000


def test_an_index_that_lacks_part_of_a_wanted_region_is_corrupt_unless_partial_is_fine() -> None:
    table = chunk_table([Region((0,), (4,)), Region((6,), (4,))], 4)
    wanted = Region((2,), (6,))
    with pytest.raises(CorruptionError, match="4 of the 6 elements"):
        plan_load(table, wanted_table(wanted), block_bytes=16, buffer_bytes=64)
    reads = plan_load(table, wanted_table(wanted, partial=True), block_bytes=16, buffer_bytes=64)
    assert sum(piece.stop - piece.start for read in reads for piece in read.pieces) == 16
