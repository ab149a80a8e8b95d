"""The tree of ranks, and messages joined and cut on their way through it."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from giantstep.errors import PeerFailureError
from giantstep.group.base import Parts
from giantstep.group.bundle import Bundle, from_wire
from giantstep.group.tree import Tree

# As new objects, so that equal ones are not one object by accident; from nothing to parts that travel by themselves.
_SIZES = (0, 1, 3, 900, 20_000, 300_000)


def _part(number: int) -> bytes:
    return bytes([number]) * _SIZES[number % len(_SIZES)]


def _over_the_wire(bundle: Bundle) -> Bundle:
    messages = [bytes(message) for message in bundle.to_wire()]
    assert all(messages), "gloo sends no empty messages"

    def receive(count: int) -> bytes:
        assert len(messages[0]) == count
        return messages.pop(0)

    arrived = from_wire(receive)
    assert not messages
    return arrived


def _wire_bytes(bundle: Bundle) -> int:
    return sum(map(len, bundle.to_wire()))


def _gather(tree: Tree, reports: list[Parts], rank: int) -> Bundle:
    below = [_over_the_wire(_gather(tree, reports, child)) for child in tree.children(rank)]
    return Bundle.join([Bundle.of([reports[rank]]), *below])


def _scatter(tree: Tree, answers: Bundle, rank: int) -> dict[int, Parts]:
    found = {rank: answers.cut(0, 1).messages()[0]}
    for child in tree.children(rank):
        span = tree.span(child)
        below = _over_the_wire(answers.cut(span.start - rank, span.stop - rank))
        found |= _scatter(tree, below, child)
    return found


@given(size=st.integers(1, 600), fanout=st.integers(2, 9))
def test_the_children_of_a_rank_and_itself_speak_for_its_span_in_order(size: int, fanout: int) -> None:
    tree = Tree(size, fanout)
    assert list(tree.span(0)) == list(range(size))
    for rank in range(size):
        spoken_for = [rank, *(below for child in tree.children(rank) for below in tree.span(child))]
        assert spoken_for == list(tree.span(rank))
        assert all(tree.parent(child) == rank for child in tree.children(rank))


def test_the_first_level_is_the_host() -> None:
    tree = Tree(64, 8)
    assert tree.children(8) == [9, 10, 11, 12, 13, 14, 15]
    assert tree.children(0) == [*range(1, 8), 8, 16, 24, 32, 40, 48, 56]


@given(
    messages=st.lists(st.lists(st.integers(0, 11), max_size=4).map(tuple), min_size=1, max_size=20),
    fanout=st.integers(2, 9),
)
def test_any_messages_survive_any_tree_both_ways_and_equal_parts_become_one_object(
    messages: list[tuple[int, ...]], fanout: int
) -> None:
    tree = Tree(len(messages), fanout)
    reports = [tuple(_part(number) for number in message) for message in messages]
    arrived = _gather(tree, reports, 0).messages()
    assert arrived == reports
    assert len({id(part) for report in arrived for part in report}) == len({part for report in reports for part in report})
    answers = arrived[::-1]
    found = _scatter(tree, Bundle.of(answers), 0)
    assert [found[rank] for rank in range(len(messages))] == answers


def test_equal_messages_take_the_room_of_one() -> None:
    for parts in ((b"abc", b""), (b"a" * 5000, b"b" * 300_000)):
        sizes = {_wire_bytes(_gather(Tree(size, 8), [parts] * size, 0)) for size in (2, 64, 2048)}
        assert len(sizes) == 1


def test_a_cut_holds_only_what_its_ranks_need() -> None:
    bundle = Bundle.of([(bytes([rank]) * 10_000, b"same" * 1000) for rank in range(50)])
    assert _wire_bytes(bundle.cut(7, 8)) < 16_000
    assert bundle.cut(7, 9).messages() == [(bytes([rank]) * 10_000, b"same" * 1000) for rank in (7, 8)]


@example(position=143, bits=128)  # a part of more than 2**63 bytes
@given(position=st.integers(0, 200), bits=st.integers(1, 255))
def test_a_changed_head_is_an_error_of_ours_or_another_bundle(position: int, bits: int) -> None:
    first = bytearray(Bundle.of([(b"one", b"two"), (b"one",), ()] * 3).to_wire()[0])
    first[position] ^= bits

    def receive(count: int) -> bytes:
        return bytes(first) if count == len(first) else np.random.default_rng(count % 97).bytes(min(count, 1000))

    with contextlib.suppress(PeerFailureError):
        assert isinstance(from_wire(receive), Bundle)


def test_nonsense_is_refused() -> None:
    with pytest.raises(PeerFailureError, match="cannot be read"):
        from_wire(lambda count: b"\xff" * min(count, 2000))
