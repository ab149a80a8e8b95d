"""What hosts hold of a checkpoint, and whether that is all of it. Functions of what they report."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from giantstep.errors import CorruptionError, GiantstepError, IncompleteError, PeerFailureError, VersionError
from giantstep.format.names import RECORD_NAME
from giantstep.format.record import CommitRecord, decode_record
from giantstep.tiers.file_numbers import parity_of_file
from giantstep.tiers.hosts import HostMap, Standing
from giantstep.tiers.parity_layout import ParityLayout


@dataclass(frozen=True, slots=True)
class Holding:
    """What one rank reports; of the ranks of a host only the lead names files.

    Attributes:
        standing: where it stands.
        record: bytes of the commit record in its place, b"" if there is none.
        has_index: whether the index is there, and is what the record says.
        files: sizes of data files by name, without those that are known to be damaged.
        problem: in words why the place cannot be read, or what in it is damaged, or "".
    """

    standing: Standing
    record: bytes
    has_index: bool
    files: dict[str, int]
    problem: str = ""

    def encode(self) -> tuple[bytes, bytes, bytes]:
        """As a message."""
        told = json.dumps([self.has_index, self.files, self.problem]).encode("ascii")
        return self.standing.encode(), self.record, told

    @classmethod
    def decode(cls, parts: Sequence[bytes]) -> Holding:
        """Inverse of `encode`."""
        if len(parts) != 3:
            raise PeerFailureError(f"a rank reports what its host holds in {len(parts)} parts, expected 3")
        has_index, files, problem = json.loads(parts[2])
        return cls(Standing.decode(parts[0]), parts[1], has_index, files, problem)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A save of which some host has the commit record.

    Attributes:
        record, data: the commit record, and its bytes.
        holders: by file, the hosts that hold it in full; empty for files that none has.
    """

    record: CommitRecord
    data: bytes
    holders: dict[str, list[int]]

    @property
    def lost(self) -> list[str]:
        """Files that no host has."""
        return [name for name, hosts in self.holders.items() if not hosts]


def is_enough(candidate: Candidate) -> bool:
    """Whether all data files are there, or can be rebuilt."""
    lost = [name for name in candidate.lost if parity_of_file(name) is None]
    if not lost:
        return True
    layout = ParityLayout.of_record(candidate.record)
    return layout is not None and layout.is_enough(candidate.lost)


def candidates(holdings: Sequence[Holding], run: str) -> tuple[list[Candidate], list[str]]:
    """All saves of the run that hosts have records of, the best first; and why others are not among them.

    Later generations come first, and of one generation later saves: what an older incarnation of the run has left, on hosts
    that were away meanwhile, must not win over what was saved since.

    Args:
        holdings: by host.
        run: name of the run.
    """
    found: dict[bytes, CommitRecord] = {}
    refused: list[str] = []
    for holding in holdings:
        if holding.problem:
            refused.append(f"host {holding.standing.host}: {holding.problem}")
        if not holding.record or holding.record in found:
            continue
        try:
            record = decode_record(holding.record, f"{RECORD_NAME} on host {holding.standing.host}")
            # Raises if no such save can have been.
            ParityLayout.of_record(record)
        except (CorruptionError, VersionError) as error:
            refused.append(f"host {holding.standing.host}: {error.message}")
            continue
        if record.nodes is None:
            refused.append(f"host {holding.standing.host}: save {record.save_id} is no node-local one")
        elif record.nodes.run != run:
            refused.append(
                f"host {holding.standing.host}: save {record.save_id} is of the run {record.nodes.run!r}, not {run!r}"
            )
        else:
            found[holding.record] = record
    ordered = sorted(found.items(), key=lambda item: _rank_of(item[1]), reverse=True)
    return [Candidate(record, data, _holders(record, holdings)) for data, record in ordered], refused


def _rank_of(record: CommitRecord) -> tuple[int, str]:
    return (record.nodes.generation if record.nodes else 0), record.save_id


def _holders(record: CommitRecord, holdings: Sequence[Holding]) -> dict[str, list[int]]:
    return {
        file.name: [host for host, holding in enumerate(holdings) if holding.files.get(file.name) == file.bytes]
        for file in record.files
    }


def nothing_complete(location: str, found: Sequence[Candidate], refused: Collection[str], hosts: HostMap) -> GiantstepError:
    """The error that says what is missing where."""
    if not found:
        told = f" Not used: {'; '.join([*refused][:10])}." if refused else ""
        return IncompleteError(
            f"{location}: none of the {len(hosts.standings)} hosts has a commit record of this run.{told} Load another step, "
            "or from the durable place."
        )
    lines = []
    for candidate in found[:3]:
        nodes, lost = candidate.record.nodes, candidate.lost
        if not lost:
            lines.append(f"the index of save {candidate.record.save_id} is damaged on every host that has its commit record")
            continue
        where: dict[str, int] = {}
        for file in candidate.record.files:
            if file.name in lost and nodes is not None:
                owner = nodes.hosts[nodes.host_of_rank[file.rank]][0]
                where[owner] = where.get(owner, 0) + 1
        told = ", ".join(f"{count} written on host {name}" for name, count in sorted(where.items())[:10])
        lines.append(f"save {candidate.record.save_id} lacks {len(lost)} of {len(candidate.record.files)} data files: {told}")
    told = "; ".join([*lines, *[*refused][:10]])
    return IncompleteError(
        f"{location} is not all there on the hosts {', '.join(one.host for one in hosts.standings[:20])}: {told}. Bring a "
        "host back that holds it, or load another step, or from the durable place."
    )
