"""How many bytes a save will put on each host, worked out from the plan before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from giantstep.format.names import data_file_name
from giantstep.format.record import FileEntry
from giantstep.planning.save_plan import SavePlan
from giantstep.planning.stripes import block_bytes
from giantstep.planning.twins import file_groups
from giantstep.tiers.copying import FileFacts, plan_copies
from giantstep.tiers.file_numbers import FILES_PER_GROUP
from giantstep.tiers.hosts import HostMap, Ring
from giantstep.tiers.parity_layout import ParityLayout

_NO_SAVE = "00000000T000000-0000000000000000"


def needed_bytes(plan: SavePlan, hosts: HostMap, copies: int, parity: tuple[int, int] | None) -> list[int]:
    """[hosts] payload of all files: own ones, twins' and copies, and parity. Headers and padding are not counted.

    Args:
        plan: of the save.
        hosts: all of them.
        copies, parity: what is to be survived.
    """
    own, twins = _planned_files(plan, len(hosts.host))
    needed = [0] * len(hosts.standings)
    for rank, host in enumerate(hosts.host):
        needed[host] += sum(own[rank].bytes) + sum(twins[rank].bytes)
    for _, size, _, target, _ in plan_copies(plan, hosts, copies, own, twins).moves:
        needed[hosts.host[target]] += size
    if parity is not None:
        files = [
            FileEntry(name, size, rank)
            for rank, facts in enumerate(own)
            for name, size in zip(facts.names, facts.bytes, strict=True)
        ]
        _add_parity(needed, hosts, parity, files)
    return needed


def most_bytes(held: Sequence[int], hosts: HostMap, copies: int, parity: tuple[int, int] | None) -> list[int]:
    """[hosts] what a save puts on each at most, before it is known what ranks hold alike. Headers and padding are not counted.

    Args:
        held: by rank, the bytes of its state. What it writes, as a twin too, is no more.
        hosts, copies, parity: as for `needed_bytes`.
    """
    needed = [0] * len(hosts.standings)
    ring = Ring(hosts)
    for rank, size in enumerate(held):
        for target in (rank, *ring.targets(rank, (), copies)):
            needed[hosts.host[target]] += size
    if parity is not None:
        files = [FileEntry(data_file_name(_NO_SAVE, rank, 0), size, rank) for rank, size in enumerate(held)]
        _add_parity(needed, hosts, parity, files)
    return needed


def _add_parity(needed: list[int], hosts: HostMap, parity: tuple[int, int], files: Sequence[FileEntry]) -> None:
    layout = ParityLayout.of(_NO_SAVE, hosts, parity, files)
    for stripe in layout.stripes:
        for host in stripe.parity:
            needed[host] += block_bytes(stripe, layout.stream_bytes)


def _planned_files(plan: SavePlan, ranks: int) -> tuple[list[FileFacts], list[FileFacts]]:
    """By rank, its own files and those that it writes as a twin, one for each group of chunks."""
    sizes: Counter[tuple[int, int]] = Counter()
    groups = file_groups(plan.writer, plan.twin)
    for writer, group, size in zip(plan.writer.tolist(), groups.tolist(), plan.bytes.tolist(), strict=True):
        sizes[writer, group] += size
    behind = int(groups.max(initial=-1)) + 1
    for writer, size in zip(plan.objects.writer.tolist(), plan.objects.bytes.tolist(), strict=True):
        sizes[writer, behind] += size
    found = ([FileFacts([], [], []) for _ in range(ranks)], [FileFacts([], [], []) for _ in range(ranks)])
    for writer, group in sorted(sizes):
        _add(found[0][writer], writer, group, sizes[writer, group])
    for writer, group, *held in _twin_rows(plan, groups):
        for twin in held:
            if twin >= 0:
                _add(found[1][twin], writer, group, sizes[writer, group])
    return found


def _add(facts: FileFacts, writer: int, group: int, size: int) -> None:
    facts.names.append(data_file_name(_NO_SAVE, writer, group * FILES_PER_GROUP))
    facts.bytes.append(size)
    facts.checksums.append(np.zeros(0, dtype=np.uint64))


def _twin_rows(plan: SavePlan, groups: np.ndarray) -> list[list[int]]:
    """Distinct (writer, group, twins ...)."""
    if not plan.twin.shape[1] or not len(groups):
        return []
    rows: list[list[int]] = np.unique(np.column_stack((plan.writer, groups, plan.twin)), axis=0).tolist()
    return rows
