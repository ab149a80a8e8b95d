"""What two indexes tell of equal and different chunks, by places, digests, heads and blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from giantstep.format.index import Index
from giantstep.planning.index_difference import DIFFERENT, EQUAL, UNKNOWN, Side, compare_chunks, compare_objects
from handmade import index_of

BLOCK = 100


def side(index: Index, keys: str, names: list[str], objects: str = "", block_bytes: int = BLOCK) -> Side:
    return Side(index, list(keys), list(objects), names, block_bytes)


def words(*values: int, width: int = 2) -> np.ndarray:
    return np.array([[value] * width for value in values], dtype=np.uint64).reshape(-1, width)


def one_chunk(start: int, length: int, checksums: list[int], **columns: Any) -> Index:
    index = index_of({"a": [(0, start, length)]}, {}, 1)
    blocks = np.array(checksums, dtype=np.uint64)
    return dataclasses.replace(index, file_block_ends=np.array([0, len(blocks)]), block_checksum=blocks, **columns)


def state(first: Index, second: Index, names: tuple[str, str] = ("x", "y"), blocks: int = BLOCK) -> int:
    found = compare_chunks(side(first, "a", [names[0]]), side(second, "a", [names[1]], block_bytes=blocks))
    return int(found[0])


def test_chunks_at_one_place_of_one_file_are_equal() -> None:
    first, second = one_chunk(100, 50, [1, 2]), one_chunk(100, 50, [3, 4])
    assert state(first, second, ("x", "x")) == EQUAL
    assert state(first, second) == UNKNOWN


def test_digests_decide_and_heads_only_tell_what_differs() -> None:
    places = (100, 50, [1, 2])
    assert state(one_chunk(*places, chunk_digest=words(5)), one_chunk(1, 50, [3], chunk_digest=words(5))) == EQUAL
    assert state(one_chunk(*places, chunk_digest=words(5)), one_chunk(1, 50, [3], chunk_digest=words(6))) == DIFFERENT
    assert state(one_chunk(*places, chunk_digest=words(5)), one_chunk(1, 50, [3], chunk_digest=words(0))) == UNKNOWN
    heads = [{"chunk_head": words(value, width=1), "chunk_digest": words(0)} for value in (7, 8, 0)]
    assert state(one_chunk(*places, **heads[0]), one_chunk(1, 50, [3], **heads[0])) == UNKNOWN
    assert state(one_chunk(*places, **heads[0]), one_chunk(1, 50, [3], **heads[1])) == DIFFERENT
    assert state(one_chunk(*places, **heads[0]), one_chunk(1, 50, [3], **heads[2])) == UNKNOWN


def test_blocks_decide_where_chunks_begin_at_the_same_byte_of_one() -> None:
    # Bytes 150 to 400: half of the block 1, all of 2 and 3.
    first = one_chunk(150, 250, [1, 2, 3, 4])
    assert state(first, one_chunk(150, 250, [9, 2, 3, 4])) == EQUAL
    assert state(first, one_chunk(250, 250, [9, 9, 2, 3, 4])) == EQUAL
    assert state(first, one_chunk(150, 250, [1, 9, 3, 4])) == UNKNOWN
    assert state(first, one_chunk(150, 250, [1, 2, 9, 4])) == DIFFERENT
    assert state(first, one_chunk(150, 250, [1, 2, 3, 9])) == DIFFERENT
    assert state(first, one_chunk(160, 250, [1, 2, 3, 4])) == UNKNOWN
    assert state(first, one_chunk(150, 250, [1, 2, 3, 4]), blocks=50) == UNKNOWN
    # Within one block.
    assert state(one_chunk(110, 20, [1, 2]), one_chunk(110, 20, [1, 3])) == UNKNOWN


def test_other_regions_are_not_known() -> None:
    first = index_of({"a": [(0, 0, 4), (0, 4, 4)]}, {}, 1)
    second = index_of({"a": [(0, 0, 8)]}, {}, 1)
    assert compare_chunks(side(first, "a", ["x"]), side(second, "a", ["x"])).tolist() == [UNKNOWN, UNKNOWN]


def test_objects_of_other_sizes_differ() -> None:
    first = index_of({}, {"o": (0, 0, 8), "p": (0, 8, 8), "q": (0, 16, 8), "r": (0, 24, 8)}, 1)
    second = index_of({}, {"o": (0, 0, 9), "p": (0, 9, 8), "q": (0, 17, 8)}, 1)
    first = dataclasses.replace(first, object_digest=words(1, 2, 3, 4))
    second = dataclasses.replace(second, object_digest=words(1, 2, 4))
    found = compare_objects(side(first, "", ["x"], "opqr"), side(second, "", ["y"], "opq"))
    assert found.tolist() == [DIFFERENT, EQUAL, DIFFERENT, UNKNOWN]
