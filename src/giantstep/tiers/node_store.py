"""`NodeStore`: one place in name, on every host its own.

Given as `path` to `save`, `async_save` and `load`, it makes them keep a checkpoint in the hosts' own places: each rank writes
to its host's, copies go to other hosts, and commit record and index are on every host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from giantstep.errors import BadArgumentError
from giantstep.storage.base import ReadHandle, Store, WriteHandle
from giantstep.tiers.hosts import Standing

MOST_COPIES = 16


@dataclass(frozen=True, slots=True)
class Protection:
    """What is to be survived, and whose the checkpoints are.

    Attributes:
        replicas: copies on hosts of other failure domains, besides the first.
        parity: (k, m): m lost hosts of each k + m are survived; None: no parity.
        run: name of the run; checkpoints of others are not used.
        generation: greater each time that the run goes on from a checkpoint; a later one's checkpoints are preferred.
    """

    replicas: int = 1
    parity: tuple[int, int] | None = None
    run: str = ""
    generation: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.replicas, bool) or not isinstance(self.replicas, int) or not 0 <= self.replicas <= MOST_COPIES:
            raise BadArgumentError(f"replicas={self.replicas!r} cannot be: expected an int from 0 to {MOST_COPIES}")
        pair = self.parity
        if pair is not None:
            fits = isinstance(pair, tuple) and len(pair) == 2 and all(type(part) is int and part > 0 for part in pair)
            if not fits or sum(pair) > 255:
                raise BadArgumentError(f"parity={pair!r} cannot be: expected (k, m), two ints from 1 on, together at most 255")
            if self.replicas:
                raise BadArgumentError(
                    f"replicas={self.replicas} with parity={pair} cannot be: parity takes the place of copies, replicas=0"
                )
        if not isinstance(self.run, str):
            raise BadArgumentError(f"run={self.run!r} cannot be: expected a str")


@dataclass(frozen=True, slots=True)
class NodeStore:
    """A place on each host. All methods of `Store` are about this host's.

    Attributes:
        here: the place on this host.
        name: of all these places together, the same on every host.
        standing: where this rank stands.
        protection: what is to be survived.
    """

    here: Store
    name: str
    standing: Standing
    protection: Protection = field(default_factory=Protection)

    @property
    def location(self) -> str:
        """The same on all hosts."""
        return f"node-local {self.name}"

    def exists(self) -> bool:
        return self.here.exists()

    def prepare(self, folder: str) -> None:
        self.here.prepare(folder)

    def create(self, name: str, size: int, *, direct: bool) -> WriteHandle:
        return self.here.create(name, size, direct=direct)

    def sync_names(self, folder: str) -> None:
        self.here.sync_names(folder)

    def publish(self, name: str, data: bytes, temporary: str) -> None:
        self.here.publish(name, data, temporary)

    def open_read(self, name: str, *, direct: bool = False) -> ReadHandle:
        return self.here.open_read(name, direct=direct)

    def size(self, name: str) -> int:
        return self.here.size(name)

    def names(self, folder: str) -> Iterator[str]:
        return self.here.names(folder)

    def delete(self, name: str) -> None:
        self.here.delete(name)

    def link(self, name: str, source: Store, source_name: str) -> None:
        self.here.link(name, source.here if isinstance(source, NodeStore) else source, source_name)

    def free_bytes(self) -> int | None:
        return self.here.free_bytes()

    def folder(self, name: str) -> NodeStore:
        return replace(self, here=self.here.folder(name), name=f"{self.name}/{name}")

    def folders(self) -> Iterator[str]:
        return self.here.folders()

    def remove_empty(self, folder: str) -> None:
        self.here.remove_empty(folder)
