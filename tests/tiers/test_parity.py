"""Reed-Solomon parity of blocks."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from giantstep.errors import BadArgumentError
from giantstep.tiers.parity import encode, rebuild


def blocks_of(seed: int, k: int, length: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (k, length), dtype=np.uint8))


@settings(deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(1, 5), st.integers(0, 3000), st.integers(0, 2**32))
def test_any_k_blocks_rebuild_all_others(data: st.DataObject, k: int, m: int, length: int, seed: int) -> None:
    blocks = blocks_of(seed, k, length)
    whole = dict(enumerate([*blocks, *encode(blocks, m)]))
    numbers = data.draw(st.permutations(range(k + m)))
    present = {number: whole[number] for number in numbers[: data.draw(st.integers(k, k + m))]}
    wanted = data.draw(st.lists(st.integers(0, k + m - 1), unique=True))
    found = rebuild(present, k, m, wanted)
    assert list(found) == wanted
    for number in wanted:
        np.testing.assert_array_equal(found[number], whole[number])


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.lists(st.integers(0, 500), max_size=5), st.integers(0, 2**32))
def test_pieces_of_any_length_give_the_bytes_of_the_whole(k: int, m: int, lengths: list[int], seed: int) -> None:
    blocks = blocks_of(seed, k, sum(lengths))
    parity = encode(blocks, m)
    lost = list(range(min(k, m)))
    start = 0
    for length in lengths:
        piece = slice(start, start + length)
        parts = [block[piece] for block in blocks]
        for made, whole in zip(encode(parts, m), parity, strict=True):
            np.testing.assert_array_equal(made, whole[piece])
        kept = {number: block[piece] for number, block in enumerate([*blocks, *parity]) if number not in lost}
        for number, made in rebuild(kept, k, m, lost).items():
            np.testing.assert_array_equal(made, parts[number])
        start += length


@pytest.mark.parametrize(("k", "m"), [(1, 255), (255, 1), (128, 128), (2, 254)])
def test_all_256_blocks_can_be_used(k: int, m: int) -> None:
    blocks = blocks_of(0, k, 130)
    whole = dict(enumerate([*blocks, *encode(blocks, m)]))
    lost = list(range(min(k, m)))
    found = rebuild({number: block for number, block in whole.items() if number not in lost}, k, m, lost)
    assert all(np.array_equal(found[number], whole[number]) for number in lost)


def test_blocks_are_only_read_and_may_lie_anyhow() -> None:
    table = np.random.default_rng(1).integers(0, 256, (50, 3), dtype=np.uint8)
    before = table.copy()
    table.setflags(write=False)
    columns = [table[:, column] for column in range(3)]
    parity = encode(columns, 2)
    for made, expected in zip(parity, encode([column.copy() for column in columns], 2), strict=True):
        np.testing.assert_array_equal(made, expected)
    present = {1: columns[1], 4: parity[1], 3: parity[0]}
    found = rebuild(present, 3, 2, [2, 0, 1])
    assert found[1] is columns[1]
    assert list(present) == [1, 4, 3]
    np.testing.assert_array_equal(np.stack([found[0], found[1], found[2]], axis=1), before)


@pytest.mark.parametrize(("k", "m"), [(0, 1), (3, 0), (3, -1), (200, 57), (0, 0)])
def test_senseless_counts_are_refused(k: int, m: int) -> None:
    blocks = blocks_of(0, max(k, 0), 4)
    with pytest.raises(BadArgumentError, match=f"k={k} and m={m}"):
        encode(blocks, m)
    with pytest.raises(BadArgumentError, match=f"k={k} and m={m}"):
        rebuild(dict(enumerate(blocks)), k, m, [0])


def test_blocks_that_are_not_equally_long_bytes_are_refused() -> None:
    first, second = blocks_of(0, 2, 8)
    for unequal in ([first, second[:7]], [first[:0], second]):
        with pytest.raises(BadArgumentError, match="equally long"):
            encode(unequal, 1)
        with pytest.raises(BadArgumentError, match="equally long"):
            rebuild(dict(enumerate(unequal)), 2, 1, [2])
    with pytest.raises(BadArgumentError, match=r"block 1 .* int64"):
        encode([first, second.view(np.int64)], 1)  # type: ignore[list-item]
    with pytest.raises(BadArgumentError, match=r"block 0 .* \(2, 4\)"):
        encode([first.reshape(2, 4), second], 1)


def test_too_few_blocks_and_numbers_of_no_block_are_refused() -> None:
    blocks = blocks_of(0, 3, 8)
    with pytest.raises(BadArgumentError, match=r"any 3 blocks are needed to rebuild \[2\], found 2: \[0, 1\]"):
        rebuild({0: blocks[0], 1: blocks[1]}, 3, 2, [2])
    with pytest.raises(BadArgumentError, match=r"numbers 0 to 4, found \[5\]"):
        rebuild(dict(enumerate(blocks)), 3, 2, [5])
    with pytest.raises(BadArgumentError, match=r"numbers 0 to 4, found \[-1\]"):
        rebuild({-1: blocks[0], 1: blocks[1], 2: blocks[2]}, 3, 2, [0])
    assert rebuild({0: blocks[0]}, 3, 2, [0])[0] is blocks[0]


def test_without_zfec_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zfec", None)
    blocks = blocks_of(0, 11, 8)  # counts that no other test uses: encoders are kept
    with pytest.raises(BadArgumentError, match=r"giantstep\[parity\]"):
        encode(blocks, 7)
    with pytest.raises(BadArgumentError, match=r"giantstep\[parity\]"):
        rebuild(dict(enumerate(blocks, 1)), 11, 7, [0])
