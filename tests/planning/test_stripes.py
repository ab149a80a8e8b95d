"""Groups of hosts, stripes of parity over them, and what can be rebuilt after losses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from giantstep.errors import BadArgumentError
from giantstep.planning.stripe_losses import Damage, losses
from giantstep.planning.stripes import (
    PART_ALIGNMENT_BYTES,
    Piece,
    Stream,
    Stripe,
    block_bytes,
    data_range,
    parity_groups,
    stored_bytes,
    stripes_of,
    touched,
)

SIZES = st.one_of(st.just(0), st.integers(0, 300), st.integers(0, 10**12))


def partitions(hosts: list[int]) -> Iterator[list[list[int]]]:
    """Every way to divide hosts into groups."""
    if not hosts:
        yield []
        return
    for rest in partitions(hosts[1:]):
        yield [[hosts[0]], *rest]
        for position, group in enumerate(rest):
            yield [*rest[:position], [hosts[0], *group], *rest[position + 1 :]]


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=80), st.integers(1, 8), st.integers(1, 4))
def test_groups_have_all_hosts_once_and_no_domain_twice(domains: list[int], k: int, m: int) -> None:
    hosts = len(domains)
    largest = max(domains.count(domain) for domain in domains)
    try:
        groups = parity_groups(domains, k, m)
    except BadArgumentError:
        assert largest * (m + 1) > hosts
        return
    assert sorted(host for group in groups for host in group) == list(range(hosts))
    for group in groups:
        assert len({domains[host] for host in group}) == len(group)
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= m + 1
    # No other number of groups comes nearer, unless its groups would be too small or bring a domain together.
    for count in range(max(1, largest), hosts // (m + 1) + 1):
        assert abs(hosts / (k + m) - len(groups)) <= abs(hosts / (k + m) - count)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=7), st.integers(1, 3))
def test_groups_are_found_whenever_there_are_any(domains: list[int], m: int) -> None:
    possible = any(
        all(len(group) > m and len({domains[host] for host in group}) == len(group) for group in groups)
        for groups in partitions(list(range(len(domains))))
    )
    if possible:
        parity_groups(domains, 2, m)
    else:
        with pytest.raises(BadArgumentError, match=rf"parity=\(2, {m}\)"):
            parity_groups(domains, 2, m)


@pytest.mark.parametrize(
    ("hosts", "k", "m", "sizes"),
    [
        (8, 6, 2, [8]),
        (16, 6, 2, [8, 8]),
        (17, 6, 2, [9, 8]),
        (20, 6, 2, [7, 7, 6]),
        (9, 6, 2, [9]),
        (4, 6, 2, [4]),
        (3, 1, 1, [3]),
        (5, 2, 2, [5]),
    ],
)
def test_sizes_of_groups(hosts: int, k: int, m: int, sizes: list[int]) -> None:
    assert [len(group) for group in parity_groups(range(hosts), k, m)] == sizes


def test_racks_are_spread_over_smaller_groups() -> None:
    assert parity_groups([0, 0, 1, 1, 2, 2, 3, 3], 6, 2) == [(0, 2, 4, 6), (1, 3, 5, 7)]


def test_too_few_domains_are_refused_with_the_number_that_is_needed() -> None:
    message = r"8 hosts need at least 4 domains with at most 2 hosts each; found 3 domains, the largest with 4 hosts"
    with pytest.raises(BadArgumentError, match=message):
        parity_groups([0, 0, 0, 0, 1, 1, 2, 2], 6, 2)
    with pytest.raises(BadArgumentError, match=r"at least 3 hosts, each in a failure domain of its own; found 2 hosts"):
        parity_groups([0, 1], 6, 2)
    with pytest.raises(BadArgumentError, match="found 0 hosts"):
        parity_groups([], 1, 1)


@pytest.mark.parametrize(("k", "m"), [(0, 2), (-1, 2), (6, 0), (6, -2), (200, 57)])
def test_senseless_counts_are_refused(k: int, m: int) -> None:
    with pytest.raises(BadArgumentError, match=rf"parity=\({k}, {m}\)"):
        parity_groups(range(300), k, m)


def test_groups_that_the_remainder_makes_too_large_for_the_field_are_refused() -> None:
    assert len(parity_groups(range(256), 1, 200)) == 1
    with pytest.raises(BadArgumentError, match="300 hosts give 1 groups of 300"):
        parity_groups(range(300), 1, 200)


def test_stripes_are_rotated() -> None:
    assert stripes_of([(3, 5, 7, 9)], 2) == [
        Stripe(0, 0, (3, 5), (7, 9)),
        Stripe(0, 1, (5, 7), (9, 3)),
        Stripe(0, 2, (7, 9), (3, 5)),
        Stripe(0, 3, (9, 3), (5, 7)),
    ]
    assert stripes_of([(3, 5, 7, 9)], 2)[1].hosts == (9, 3, 5, 7)
    assert [stripe.block_of(3) for stripe in stripes_of([(3, 5, 7, 9)], 2)] == [2, 1, 0, 3]


@pytest.mark.parametrize(("groups", "m"), [([(0, 1)], 2), ([(0, 1)], 0), ([()], 1), ([(0, 1), (1, 2)], 1), ([(0, 0)], 1)])
def test_stripes_of_senseless_groups_are_refused(groups: list[tuple[int, ...]], m: int) -> None:
    with pytest.raises(BadArgumentError, match="parity group"):
        stripes_of(groups, m)


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), SIZES)
def test_parts_follow_each_other_in_ring_order_and_make_up_the_stream(m: int, data: int, length: int) -> None:
    size = m + data
    stripes = stripes_of([tuple(range(size))], m)
    for host in range(size):
        ring = [stripes[(host + 1 + step) % size] for step in range(size)]
        assert [host in stripe.data for stripe in ring] == [True] * data + [False] * m
        ranges = [data_range(stripe, host, length) for stripe in ring[:data]]
        assert [0, *(stop for _, stop in ranges)] == [*(start for start, _ in ranges), length]
        longest = ranges[0][1]
        assert longest * data < length + data * PART_ALIGNMENT_BYTES
        assert all(start % PART_ALIGNMENT_BYTES == 0 for start, _ in ranges if start < length)
        full = length // longest if longest else 0
        assert [stop - start == longest for start, stop in ranges[:full]] == [True] * full


@settings(deadline=None)
@given(st.integers(1, 3), st.lists(SIZES, min_size=4, max_size=9))
def test_parity_of_each_host_is_at_most_its_share_of_the_largest_stream(m: int, lengths: list[int]) -> None:
    hosts = len(lengths)
    stripes = stripes_of([tuple(range(hosts))], m)
    share = -(-max(lengths) // ((hosts - m) * PART_ALIGNMENT_BYTES)) * PART_ALIGNMENT_BYTES
    for host in range(hosts):
        held = [stripe for stripe in stripes if host in stripe.parity]
        assert len(held) == m
        assert sum(block_bytes(stripe, lengths) for stripe in held) <= m * share


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=3, max_size=30), st.integers(1, 5), st.integers(1, 3))
def test_parity_is_in_other_domains_than_the_data(domains: list[int], k: int, m: int) -> None:
    try:
        groups = parity_groups(domains, k, m)
    except BadArgumentError:
        return
    for stripe in stripes_of(groups, m):
        parity, data = ({domains[host] for host in hosts} for hosts in (stripe.parity, stripe.data))
        assert not parity & data
        assert len(parity) == m
        assert len(data) == len(stripe.data)


def test_what_a_host_does_not_give_is_refused() -> None:
    stripe = stripes_of([(0, 1, 2)], 1)[0]
    with pytest.raises(BadArgumentError, match=r"host 0 holds parity, data come from \[1, 2\]"):
        data_range(stripe, 0, 100)
    with pytest.raises(BadArgumentError, match=r"host 7 is not of the group, whose hosts are \[0, 1, 2\]"):
        data_range(stripe, 7, 100)


def test_short_parts_are_not_stored_in_full() -> None:
    stripe = stripes_of([(0, 1, 2)], 1)[0]
    lengths = [0, 100, 1000]
    assert [stored_bytes(stripe, block, lengths) for block in range(3)] == [36, 512, 512]
    assert block_bytes(stripe, lengths) == 512


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=8), st.data())
def test_pieces_are_the_bytes_of_the_files(sizes: list[int], data: st.DataObject) -> None:
    stream = Stream.of(sizes)
    places = [(file, offset) for file, size in enumerate(sizes) for offset in range(size)]
    assert stream.stream_bytes == len(places)
    start = data.draw(st.integers(0, len(places)))
    stop = data.draw(st.integers(start, len(places)))
    pieces = stream.pieces(start, stop)
    assert [(piece.file, piece.offset + step) for piece in pieces for step in range(piece.length)] == places[start:stop]
    assert len({piece.file for piece in pieces}) == len(pieces)
    for file, size in enumerate(sizes):
        assert stream.pieces(*stream.range_of(file)) == ([Piece(file, 0, size)] if size else [])


def test_ranges_beyond_a_stream_and_negative_sizes_are_refused() -> None:
    for start, stop in ((0, 6), (-1, 2), (3, 2)):
        with pytest.raises(BadArgumentError, match=f"within its 5 bytes, found {start} to {stop}"):
            Stream.of([2, 0, 3]).pieces(start, stop)
        with pytest.raises(BadArgumentError, match=f"within its 5 bytes, found {start} to {stop}"):
            touched(stripes_of([(0, 1)], 1), 0, 5, start, stop)
    with pytest.raises(BadArgumentError, match="found -3"):
        Stream.of([2, -3])


@settings(deadline=None)
@given(st.integers(1, 2), st.integers(1, 4), st.integers(0, 2000), st.data())
def test_touched_blocks_are_the_range(m: int, k: int, length: int, data: st.DataObject) -> None:
    stripes = stripes_of([tuple(range(k + m))], m)
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    found = []
    for stripe, first, last in touched(stripes, 0, length, start, stop):
        assert first < last
        base, _ = data_range(stripe, 0, length)
        found.append((base + first, base + last))
    assert sorted(position for first, last in found for position in range(first, last)) == list(range(start, stop))


def test_one_lost_host_is_rebuilt_from_data_and_one_parity() -> None:
    stripes, lengths = stripes_of([(0, 1, 2, 3)], 2), [512] * 4
    found = losses(stripes, lengths, {1})
    assert found.missing == ()
    assert [(repair.damage.stripe.number, repair.damage.lost) for repair in found.repairs] == [
        (0, (3,)),
        (1, (2,)),
        (2, (1,)),
        (3, (0,)),
    ]
    assert [[source.host for source in repair.sources] for repair in found.repairs] == [[2, 3], [3, 0], [0, 2], [2, 3]]
    last = found.repairs[-1]
    assert [(source.block, source.start, source.stop) for source in last.sources] == [(1, 0, 256), (2, 0, 256)]
    assert last.damage.lost_data(lengths) == [(1, 256, 512)]


def test_more_lost_hosts_than_parity_say_what_is_missing() -> None:
    stripes, lengths = stripes_of([(0, 1, 2, 3)], 1), [1152] * 4
    found = losses(stripes, lengths, {1, 2})
    gone = sorted(part for damage in found.missing for part in damage.lost_data(lengths))
    # All bytes of both, as each host has a block in each stripe.
    assert gone == [(1, 0, 384), (1, 384, 768), (1, 768, 1152), (2, 0, 384), (2, 384, 768), (2, 768, 1152)]
    assert {damage.stripe.number for damage in found.missing} == {0, 1, 2, 3}


def test_bytes_that_a_lost_host_never_had_are_known() -> None:
    stripes = stripes_of([(0, 1, 2, 3)], 1)
    assert losses(stripes, [1000, 0, 1000, 1000], {1, 2}).missing != ()  # the parity of host 1
    # Neither data nor parity: a stripe of empty parts.
    empty = losses(stripes, [0, 0, 0, 0], {0, 1, 2, 3})
    assert empty.repairs == empty.missing == ()
    # Behind the 22 bytes that host 1 gave, host 2 is rebuilt although both are lost.
    stripe = stripes[0]
    found = losses([stripe], [0, 150, 400, 400], {1, 2})
    assert [(damage.start, damage.stop, damage.lost) for damage in found.missing] == [(0, 22, (0, 1))]
    assert [(repair.damage.start, repair.damage.stop, repair.damage.lost) for repair in found.repairs] == [(22, 192, (1,))]
    assert [(source.host, source.start, source.stop) for source in found.repairs[0].sources] == [
        (1, 150, 150),
        (3, 22, 192),
        (0, 22, 192),
    ]


def test_files_lost_at_different_bytes_are_rebuilt_on_more_hosts_than_parity() -> None:
    stripes, lengths = stripes_of([(0, 1, 2)], 1), [512] * 3
    # Stripe 0: parity at host 0; blocks are bytes 256 to 512 of host 1, and 0 to 256 of host 2.
    first = losses(stripes, lengths, lost_ranges={1: [(256, 300)], 2: [(100, 256)]})
    assert first.missing == ()
    assert [(repair.damage.start, repair.damage.stop, repair.damage.lost) for repair in first.repairs] == [
        (0, 44, (0,)),
        (100, 256, (1,)),
    ]
    second = losses(stripes, lengths, lost_ranges={1: [(256, 300), (280, 370)], 2: [(100, 256)]})
    assert second.missing == (Damage(stripes[0], 100, 114, (0, 1)),)
    third = losses(stripes, lengths, lost_ranges={1: [(256, 300)]}, lost_parity={0: {0}})
    assert third.missing == (Damage(stripes[0], 0, 44, (0, 2)),)
    assert [(repair.damage.start, repair.damage.stop, repair.damage.lost) for repair in third.repairs] == [(44, 256, (2,))]


def test_nothing_lost_is_nothing_to_do() -> None:
    found = losses(stripes_of([(0, 1, 2)], 1), [5, 5, 5], lost_ranges={0: [(3, 3)]}, lost_parity={1: []})
    assert found.repairs == found.missing == ()


def test_losses_of_what_is_not_there_are_refused() -> None:
    stripes, lengths = stripes_of([(0, 1, 2)], 1), [512] * 3
    with pytest.raises(BadArgumentError, match=r"hosts \[3\] are in no stripe, which are of 3 hosts"):
        losses(stripes, lengths, {3})
    with pytest.raises(BadArgumentError, match=r"hosts up to 2, found lengths of 2 streams"):
        losses(stripes, [512, 512], {0})
    with pytest.raises(BadArgumentError, match=r"host 1 holds parity of stripes \[1\] of its group, found \[0\]"):
        losses(stripes, lengths, lost_parity={1: [0, 1]})
    with pytest.raises(BadArgumentError, match="within its 512 bytes, found 500 to 513"):
        losses(stripes, lengths, lost_ranges={1: [(500, 513)]})
