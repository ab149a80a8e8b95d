"""Who writes what several ranks hold: policies for `SaveOptions(writers=...)`.

A policy is an object with one method, `cell`, which names the ranks among which a rank shares writing. Regions that
several ranks hold are written, in equal shares, by the holders in the cell of their main replica (for plain tensors and
DTensors, the lowest rank that holds them). So any division of ranks is a policy of a few lines.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any, Protocol

import xxhash

from giantstep.errors import BadArgumentError
from giantstep.group.subgroup import ranks_within


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks a policy: this rank among the `size` that save together, and the process group that the caller gave."""

    rank: int
    size: int
    process_group: Any = None


class Writers(Protocol):
    """A policy. Called once per save on every rank; all ranks must give one of the same class."""

    def cell(self, caller: Caller) -> str:
        """Name of the ranks among which `caller` shares writing: equal for those, different for others."""
        ...


@dataclass(frozen=True, slots=True)
class Balanced:
    """Every holder writes an equal share; tensors are divided where that is needed. The default.

    Attributes:
        over: share only within this group: a `torch.distributed.ProcessGroup` or a sequence of ranks, on each rank the
            one that it is in, such as its data-parallel group. None: among all that save.
    """

    over: Any = None

    def cell(self, caller: Caller) -> str:
        """A name made of the ranks of the group."""
        if self.over is None:
            return ""
        ranks = ranks_within(self.over, caller.process_group, caller.rank, caller.size, "Balanced.over")
        # Short, however many they are.
        return xxhash.xxh3_128_hexdigest(",".join(map(str, ranks)).encode("ascii"))


@dataclass(frozen=True, slots=True)
class LowestRank:
    """The main replica alone writes: of plain tensors and DTensors the lowest rank that holds them.

    For disks that not all replicas see, and for runs in which the other ranks are to do nothing.
    """

    def cell(self, caller: Caller) -> str:
        """Each rank is a cell of its own."""
        return str(caller.rank)


@dataclass(frozen=True, slots=True)
class SameHost:
    """Holders on the host of the main replica share its writing, so that a region's bytes come from one file system.

    Attributes:
        host: name of this rank's host; None for what the system calls it. Give one where containers share a name.
    """

    host: str | None = None

    def cell(self, caller: Caller) -> str:
        """The host."""
        name = platform.node() if self.host is None else self.host
        if not isinstance(name, str) or not name:
            raise BadArgumentError(f"SameHost.host={name!r} cannot be: expected a name. Give one if the system has none.")
        return name
