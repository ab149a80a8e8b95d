"""Copies of many tensors: one by one, by runs of neighbours, and divided between two threads."""

from __future__ import annotations

import pytest
import torch

from giantstep.staging import copying
from giantstep.staging.copying import as_copied, copy_all


def neighbours(sizes: list[int], gaps: dict[int, int]) -> list[torch.Tensor]:
    """Tensors one after another in one memory, with a gap of some elements before those named."""
    total = sum(sizes) + sum(gaps.values())
    flat, found, begin = torch.full((total,), -1.0), [], 0
    for number, size in enumerate(sizes):
        begin += gaps.get(number, 0)
        found.append(flat[begin : begin + size])
        begin += size
    return found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shared_from", [1, 1 << 30])
@pytest.mark.parametrize(
    ("gaps_of_sources", "gaps_of_copies"),
    [({}, {}), ({5: 3}, {}), ({}, {2: 1, 9: 4}), ({7: 2}, {7: 5}), (dict.fromkeys(range(40), 1), {})],
    ids=["one run", "gap before", "gaps behind", "gaps at one place", "no neighbours"],
)
def test_every_tensor_is_copied_whole_and_nothing_else_is_touched(
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    shared_from: int,
    gaps_of_sources: dict[int, int],
    gaps_of_copies: dict[int, int],
) -> None:
    monkeypatch.setattr(copying, "_SHARED_FROM_BYTES", shared_from)
    sizes = [1 + (7 * number) % 13 for number in range(40)]
    sources, copies = neighbours(sizes, gaps_of_sources), neighbours(sizes, gaps_of_copies)
    for number, source in enumerate(sources):
        source.copy_(torch.arange(sizes[number]) + 100 * number)
    copy_all(copies, sources, threads)
    assert all(torch.equal(copy, source) for copy, source in zip(copies, sources, strict=True))
    whole = copies[0]._base
    assert whole is not None
    assert int((whole == -1).sum()) == sum(gaps_of_copies.values())


def test_neighbours_are_copied_as_one_and_others_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[int] = []
    real = copying._copy_spans
    monkeypatch.setattr(
        copying, "_copy_spans", lambda found, owners: spans.extend(length for _, _, length in found) or real(found, owners)
    )
    sources, copies = neighbours([4] * 12, {6: 1}), neighbours([4] * 12, {})
    copy_all(copies, sources, 1)
    assert spans == [96, 96]
    spans.clear()
    copy_all(copies, [source.clone() for source in sources], 1)
    copy_all([copy.view(2, 2) for copy in copies], [source.view(2, 2).t() for source in sources], 1)
    assert not spans


def test_no_tensors_are_no_work() -> None:
    copy_all([], [], 2)


def test_what_is_negated_or_conjugated_when_it_is_read_is_copied_as_it_reads() -> None:
    plain = torch.complex(torch.arange(3.0), torch.ones(3))
    for lazy in (plain.conj(), plain.conj().imag):
        copy = torch.empty_like(as_copied(lazy))
        copy_all([copy], [as_copied(lazy)], 1)
        assert torch.equal(copy.view(lazy.dtype), lazy)
