"""Ranks of torch.distributed, over gloo connections of our own beside the user's groups.

Reports travel over a tree of ranks (`tree.py`) to rank 0, joined on the way (`bundle.py`), and answers back; parcels go
from rank to rank. Each call starts links (`connections.py`) and waits for them with an eye on the clock and on a notice
board (`watching.py`, `notices.py`), on which whoever finds a fault tells the others. After a fault the connections are
closed, and the next call makes new ones (`rendezvous.py`). Called by the flows, by way of `group_of`.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from giantstep.errors import BadArgumentError, GiantstepError, PeerError, PeerFailureError, located
from giantstep.group.addresses import address_for
from giantstep.group.answering import within
from giantstep.group.base import Answer, Group, Parcel, Parts, check_parcels
from giantstep.group.bundle import Bundle
from giantstep.group.connections import Connections, cause
from giantstep.group.faults import ended, idle, late, mark_told, standing
from giantstep.group.notices import Board
from giantstep.group.rendezvous import meet, withdraw
from giantstep.group.single import SingleGroup
from giantstep.group.tree import Tree
from giantstep.group.watching import Overdue, Watch

_CONNECT_SECS = 10.0
# Rank 0 waits up to the timeout for the last report, may itself come that much later, and then tells what it found.
_EXTRA_SECS = 10.0
# A little more than ranks take to look at the board.
_HEAR_SECS = 2.0

# Our group for each of the user's, so that its connections are made once. Forgotten with the user's group.
_OURS: weakref.WeakKeyDictionary[Any, TorchGroup] = weakref.WeakKeyDictionary()
_OURS_LOCK = threading.Lock()
_ALONE = SingleGroup()


def group_of(process_group: Any = None) -> Group:
    """The group for a caller's `process_group`: None means the default group, or one process without any.

    A `Group` is returned as it is.
    """
    if process_group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return _ALONE
        process_group = dist.group.WORLD
    if not isinstance(process_group, dist.ProcessGroup):
        if all(hasattr(process_group, name) for name in ("rank", "size", "exchange", "transfer", "withdraw")):
            found: Group = process_group
            return found
        raise BadArgumentError(
            f"process_group must be a torch.distributed.ProcessGroup, a giantstep Group or None, not "
            f"{type(process_group).__name__}; if this rank is not in the group, do not call from it"
        )
    with _OURS_LOCK:
        ours = _OURS.get(process_group)
        if ours is None:
            ours = _OURS[process_group] = _made_for(process_group)
    return ours


def _made_for(process_group: dist.ProcessGroup) -> TorchGroup:
    ranks = dist.get_process_group_ranks(process_group)
    # Groups of the same ranks made in the same order share a name: all their ranks do, so they meet rightly.
    name = f"{process_group.group_name}/{'.'.join(map(str, ranks))}"
    store = c10d.PrefixStore(f"giantstep/{name}", c10d._get_default_store())
    return TorchGroup(store, dist.get_rank(process_group), len(ranks))


class TorchGroup:
    """A `Group` over the ranks of a `ProcessGroup`. Calls from several threads take turns.

    Args:
        store: a `torch.distributed.Store` that all ranks see, with names for this group only.
        rank, size: this rank, and how many there are.

    Attributes:
        fanout: of the tree; 8, so that with 8 ranks per host its first level stays within hosts.
    """

    fanout: ClassVar[int] = 8

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._tree = Tree(self._size, self.fanout)
        self._turn = threading.RLock()
        self._connected: tuple[Connections, Board] | None = None
        self._made_beside = 0
        # How often this rank has tried to connect, or has withdrawn when it was not connected.
        self._attempts = 0

    def beside(self) -> TorchGroup:
        # Not by way of the process group, which may be destroyed by now.
        self._made_beside += 1
        store = c10d.PrefixStore(f"beside/{self._made_beside}", self._store)
        return TorchGroup(store, self._rank, self._size)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def exchange(self, report: Parts, answer: Answer, phase: str, timeout_secs: float) -> Parts:
        if self._size == 1:
            return answer([report])[0]
        with self._turn, self._call(phase, timeout_secs, late) as (connections, watch):
            return self._exchange(connections, watch, report, answer, timeout_secs)

    def transfer(self, sends: Sequence[Parcel], receives: Sequence[Parcel], phase: str, timeout_secs: float) -> None:
        check_parcels(self, sends, receives)
        sends = [parcel for parcel in sends if parcel.data.size]
        receives = [parcel for parcel in receives if parcel.data.size]
        if sends or receives:
            with self._turn, self._call(phase, timeout_secs, idle) as (connections, watch):
                watch.until([connections.move(sends, receives, timeout_secs)], timeout_secs)

    def withdraw(self, error: GiantstepError) -> GiantstepError:
        if error.rank is None:
            error.rank = self._rank
        told: str | None = None
        if self._size > 1:
            with self._turn:
                if self._connected is None:
                    self._attempts += 1
                    withdraw(self._store, self._rank, self._size, self._attempts, error)
                else:
                    told = self._tell(error)
                    self._close(error)
        return standing(error, told)

    def _exchange(self, connections: Connections, watch: Watch, report: Parts, answer: Answer, timeout_secs: float) -> Parts:
        children = self._tree.children(self._rank)
        patience_secs = timeout_secs if self._rank == 0 else 2 * timeout_secs + _EXTRA_SECS
        below = [connections.receive(child, patience_secs) for child in children]
        watch.until(below, patience_secs)
        reports = Bundle.join([Bundle.of([report]), *(link.bundle for link in below)])
        if self._rank == 0:
            answers = Bundle.of(answer(reports.messages()))
        else:
            above = connections.ask(reports, self._tree.parent(self._rank), patience_secs)
            watch.until([above], patience_secs)
            answers = above.bundle
        if children:
            spans = {child: self._tree.span(child) for child in children}
            cuts = {child: answers.cut(span.start - self._rank, span.stop - self._rank) for child, span in spans.items()}
            # A rank that is lost now is found by the next call; the others must get their answers.
            watch.until_ended(connections.send(cuts, timeout_secs), timeout_secs)
        return answers.cut(0, 1).messages()[0]

    # Making and ending connections.

    @contextlib.contextmanager
    def _call(self, phase: str, timeout_secs: float, overdue: Overdue) -> Iterator[tuple[Connections, Watch]]:
        """Connections for one call; a fault or an interrupt in it ends them."""
        try:
            connections, board = self._connect(phase, timeout_secs)
            yield connections, Watch(self._rank, self._size, connections, board, phase, overdue)
        except GiantstepError as error:
            self._close(error)
            raise
        except Exception as error:
            raise self.withdraw(located(error, self._rank, phase)) from error
        except BaseException as error:
            # An interrupt in the middle of a message: the others cannot go on either.
            self._tell(ended(error, self._rank, phase))
            self._close(error)
            mark_told(error)
            raise

    def _connect(self, phase: str, timeout_secs: float) -> tuple[Connections, Board]:
        if self._connected is None:
            self._attempts += 1
            place = meet(self._store, self._rank, self._size, self._attempts, phase, timeout_secs)
            store = c10d.PrefixStore(place, self._store)
            patience_secs = max(_CONNECT_SECS, timeout_secs)
            address = address_for(self._store)
            try:
                # gloo keeps to its timeout, but for answers of the store.
                connections = within(
                    2 * patience_secs, lambda: Connections(store, self._rank, self._size, patience_secs, address)
                )
            except RuntimeError as error:
                raise PeerFailureError(
                    f"the ranks met but could not connect: {cause(str(error))}. If they are on several hosts, set "
                    "GLOO_SOCKET_IFNAME to the network interface by which these reach each other.",
                    phase=phase,
                ) from error
            self._connected = connections, Board(store, self._rank)
        return self._connected

    def _close(self, error: BaseException) -> None:
        connected, self._connected = self._connected, None
        if connected is None:
            return
        connections, board = connected
        connections.close()
        if self._rank:
            board.heard()
        else:
            # The store may be in this process, which may end now. A rank that is gone or late will not hear.
            board.until_heard(self._size - 1 - isinstance(error, PeerError), _HEAR_SECS)

    def _tell(self, error: GiantstepError) -> str | None:
        """Put an error on the board; return what stands there, if anything can."""
        if self._connected is not None:
            # Without the board the others find the connections closed.
            with contextlib.suppress(PeerFailureError):
                return self._connected[1].tell(error)
        return None
