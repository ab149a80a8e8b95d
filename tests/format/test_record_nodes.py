"""What a commit record says of nodes: nonsense is refused, whoever signed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from giantstep.errors import CorruptionError
from giantstep.format.digests import anchor_digest
from giantstep.format.names import data_file_name, index_file_name
from giantstep.format.record import CommitRecord, FileEntry, IndexEntry, Nodes, Totals, decode_record, encode_record
from giantstep.format.versions import WITH_NODES
from giantstep.tiers.parity_layout import ParityLayout

SAVE_ID = "20260101T000000-0123456789abcdef"
NODES = Nodes("run", 3, 1, None, (("a", "rack", ""), ("b", "b", "")), (0, 1, 0))


def record(nodes: Nodes, *, rank: int = 1) -> CommitRecord:
    return CommitRecord(
        save_id=SAVE_ID,
        library="giantstep",
        created="",
        world_size=3,
        block_bytes=4096,
        index=IndexEntry(index_file_name(SAVE_ID), 10, 10, anchor_digest(b"")),
        files=(FileEntry(data_file_name(SAVE_ID, rank, 0), 10, rank),),
        totals=Totals(0, 0, 0, 0),
        content_metadata=None,
        version=WITH_NODES,
        nodes=nodes,
    )


def test_what_is_written_reads_back_equal() -> None:
    for nodes in (NODES, replace(NODES, replicas=0, parity=(3, 2))):
        assert decode_record(encode_record(record(nodes)), "it") == record(nodes)


STRANGE: dict[str, Callable[[], CommitRecord]] = {
    "fewer ranks than saved": lambda: record(replace(NODES, host_of_rank=(0, 1))),
    "more ranks than saved": lambda: record(replace(NODES, host_of_rank=(0, 1, 0, 1))),
    "a host that is not there": lambda: record(replace(NODES, host_of_rank=(0, 1, 2))),
    "a host without ranks": lambda: record(replace(NODES, host_of_rank=(0, 0, 0))),
    "hosts in another order": lambda: record(replace(NODES, host_of_rank=(1, 0, 0))),
    "a host below the first": lambda: record(replace(NODES, host_of_rank=(0, 1, -1))),
    "no hosts": lambda: record(replace(NODES, hosts=(), host_of_rank=())),
    "two hosts of one name": lambda: record(replace(NODES, hosts=(("a", "x", ""), ("a", "y", "")))),
    "too much parity": lambda: record(replace(NODES, parity=(200, 100))),
    "no parity blocks": lambda: record(replace(NODES, parity=(2, 0))),
    "a file of a rank that did not save": lambda: record(NODES, rank=3),
}


@pytest.mark.parametrize("name", STRANGE)
def test_nonsense_is_corruption(name: str) -> None:
    with pytest.raises(CorruptionError, match="commit record it"):
        decode_record(encode_record(STRANGE[name]()), "it")


def test_parity_that_the_hosts_cannot_have_is_corruption() -> None:
    for parity in ((1, 2), (1, 1)):
        with pytest.raises(CorruptionError, match="parity"):
            ParityLayout.of_record(record(replace(NODES, replicas=0, parity=parity)))
