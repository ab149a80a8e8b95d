"""What rounds of parity need: how they are carried out, the files of the place, and how long pieces are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import GiantstepError, located
from giantstep.format.names import DATA_DIR
from giantstep.group.base import Group, Parcel
from giantstep.storage.base import ReadHandle, Store, WriteHandle
from giantstep.tiers.parity_layout import ParityLayout, Place

Wire = NDArray[np.uint8]

# What a rank holds in a round: its pieces of all stripes to be sent, and those of one that arrive. Three rounds are under way.
_ROUND_BYTES = 16 << 20


def piece_bytes_for(layout: ParityLayout) -> int:
    """Bytes of a piece of each block, so that a round keeps its bound."""
    widest = max((len(stripe.hosts) for stripe in layout.stripes), default=1)
    return max(64 << 10, _ROUND_BYTES // (2 * widest) // 4096 * 4096)


@dataclass(frozen=True, slots=True)
class Circumstances:
    """How rounds are carried out.

    Attributes:
        group: the ranks.
        store: the place on this rank's host.
        block_bytes: of the checksums.
        phase, timeout_secs: for errors, and how long a rank may do nothing.
        check: called in every round; raises if it is not to be gone on with.
    """

    group: Group
    store: Store
    block_bytes: int
    phase: str
    timeout_secs: float
    check: Callable[[], None] = lambda: None

    @contextmanager
    def telling(self) -> Iterator[None]:
        """The others wait for what this rank would send: they are told at once if the block fails."""
        try:
            yield
        except Exception as error:
            if isinstance(error, GiantstepError) and error.agreed:
                raise
            raise self.group.withdraw(located(error, self.group.rank, self.phase)) from error

    def transfer(self, sends: list[Parcel], receives: list[Parcel]) -> int:
        """Send and receive; return the bytes that were sent."""
        rank, size = self.group.rank, self.group.size
        for parcels in (sends, receives):
            parcels.sort(key=lambda parcel: (parcel.peer - rank) % size)
        if sends or receives:
            self.group.transfer(sends, receives, self.phase, self.timeout_secs)
        return sum(parcel.data.size for parcel in sends)


class Files:
    """Files of the place that are read and written at any offsets, open as long as they are used."""

    def __init__(self, store: Store, stack: ExitStack) -> None:
        self._store = store
        self._read: dict[str, ReadHandle] = {}
        self._written: dict[str, WriteHandle] = {}
        stack.callback(self.close)

    def read(self, place: Place, target: Wire) -> None:
        """Fill `target`."""
        handle = self._read.get(place.name)
        if handle is None:
            handle = self._read[place.name] = self._store.open_read(place.name)
        handle.read_into(place.offset, target.data)

    def create(self, name: str, size: int) -> None:
        """A new file; what a try before has left is in the way."""
        self._store.delete(name)
        self._written[name] = self._store.create(name, size, direct=False)

    def write(self, name: str, offset: int, data: Wire) -> None:
        """Write to a file that was created."""
        self._written[name].write_at(offset, data.data)

    def sync(self) -> None:
        """All that was written is durable."""
        for handle in self._written.values():
            handle.sync()
        if self._written:
            self._store.sync_names(DATA_DIR)

    def close(self) -> None:
        """Close everything."""
        for source in self._read.values():
            source.close()
        for target in self._written.values():
            target.close()
