"""gloo connections of our own between the ranks, and the threads that wait on them.

gloo can only be waited for, and closes all connections of a group when one wait times out. Therefore threads of ours wait
for *links* - a message, an answer, a set of parcels - and the caller watches the links (`watching.py`). Links are waited
for one after the other by one thread, since most end at once and threads cost more than messages; if they do not, each
gets a thread, so that none that breaks is hidden behind one that takes long. What is sent, and what to do when a link
breaks, is `torch_group.py`'s.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime as dt
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from giantstep.group.base import Parcel
from giantstep.group.bundle import FIRST_BYTES, Bundle, from_wire

# gloo gets longer than our own clock, so that a fault is announced before connections close.
_EXTRA_SECS = 30.0
_JOIN_SECS = 10.0
_MESSAGE_TAG, _CLOSING_TAG, _FIRST_PARCEL_TAG = 0, 1, 2
_PARCEL_TAGS = 1 << 30
_UNMARKED_BYTES = 4 << 10


# A rank, and gloo's work with it.
Posted = tuple[int, Any]


class Link:
    """Something that is sent or received, or both in turn.

    Attributes:
        peer: the rank that is waited for now.
        moved_at: when something last went through, on the monotonic clock.
        finished: it has ended; then `error` says why nothing came of it, if so, and `bundle` is what was received.
    """

    def __init__(self, peer: int) -> None:
        self.peer = peer
        self.moved_at = time.monotonic()
        self.finished = False
        self.error: Exception | None = None
        self.bundle = Bundle((), (), ())

    def run(self, talk: Talk) -> None:
        """Talk to the end."""
        try:
            self.bundle = talk(self) or self.bundle
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller must hear of it
            # Its traceback would keep the connections in a circle of references.
            self.error = error.with_traceback(None)
        self.finished = True


Talk = Callable[[Link], Bundle | None]


class Connections:
    """Connections of one rank with all others.

    Args:
        store: a `torch.distributed.Store` with names for these connections only.
        rank, size: this rank, and how many there are.
        patience_secs: for connecting.
        address: of this host, for the others; None: gloo chooses.

    Attributes:
        changed: set whenever a link ends.

    Raises:
        RuntimeError: the ranks could not connect.
    """

    def __init__(self, store: Any, rank: int, size: int, patience_secs: float, address: str | None = None) -> None:
        self._rank, self._size = rank, size
        self._gloo: Any = _gloo(store, rank, size, dt.timedelta(seconds=patience_secs), address)
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Link, Talk]] = deque()
        self._threads: set[threading.Thread] = set()
        self.changed = threading.Event()

    def receive(self, source: int, patience_secs: float) -> Link:
        """Receive a bundle."""
        link = Link(source)
        first = _empty(FIRST_BYTES)
        try:
            posted = self._post_receive(link, first, source, _MESSAGE_TAG)
        except RuntimeError as error:
            link.error, link.finished = error.with_traceback(None), True
            return link
        return self._start(link, lambda link: self._receive(link, source, first, posted, patience_secs))

    def ask(self, bundle: Bundle, other: int, patience_secs: float) -> Link:
        """Send a bundle and receive one."""

        def talk(link: Link) -> Bundle:
            sent, first = self._post_bundle(link, bundle, other), _empty(FIRST_BYTES)
            posted = self._post_receive(link, first, other, _MESSAGE_TAG)
            self._await(link, sent, patience_secs)
            return self._receive(link, other, first, posted, patience_secs)

        return self._start(Link(other), talk)

    def send(self, bundles: Mapping[int, Bundle], patience_secs: float) -> Link:
        """Send bundles, to each rank its own. That one does not arrive stops none of the others."""

        def talk(link: Link) -> None:
            posted = [work for peer in bundles for work in self._attempt(partial(self._post_bundle, link, bundles[peer], peer))]
            for work in posted:
                self._attempt(partial(self._await, link, [work], patience_secs))

        return self._start(Link(min(bundles)), talk)

    def move(self, sends: Sequence[Parcel], receives: Sequence[Parcel], patience_secs: float) -> Link:
        """Send and receive parcels, all at once; none are empty."""

        def talk(link: Link) -> None:
            posted = []
            for parcel in receives:
                posted += self._post_receive(link, _tensor(parcel.data), parcel.peer, _parcel_tag(parcel))
            for parcel in sends:
                posted += self._post_send(link, _tensor(parcel.data), parcel.peer, _parcel_tag(parcel))
            self._await(link, posted, patience_secs)

        return self._start(Link((*receives, *sends)[0].peer), talk)

    def part(self) -> None:
        """Give each link a thread: one of them takes long."""
        with self._lock:
            for _ in self._waiting:
                self._start_thread()

    def close(self) -> None:
        """End the connections, and with them the threads that still wait on them.

        A thread inside gloo when the interpreter exits would end the process with SIGABRT.
        """
        # gloo's own way to end all pending waits: a wait of which it is told that it took too long closes everything.
        # A peer whose connection is broken already fails at once, without that effect; so the next one is tried.
        for peer in range(self._size):
            try:
                if peer != self._rank:
                    self._gloo.recv([_empty(1)], peer, _CLOSING_TAG).wait(dt.timedelta(milliseconds=1))
            except RuntimeError as error:
                if "Timed out" in str(error):
                    break
        with self._lock:
            self._waiting.clear()
            threads = list(self._threads)
        for thread in threads:
            thread.join(_JOIN_SECS)

    # Threads.

    def _start(self, link: Link, talk: Talk) -> Link:
        with self._lock:
            self._waiting.append((link, talk))
            if not self._threads:
                self._start_thread()
        return link

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name="giantstep-wait", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads.discard(threading.current_thread())
                    return
                link, talk = self._waiting.popleft()
            link.run(talk)
            # Buffers that gloo may still have are let go here, not by the caller.
            del talk
            self.changed.set()

    # Talk.

    def _post_bundle(self, link: Link, bundle: Bundle, target: int) -> list[Posted]:
        posted = []
        for message in bundle.to_wire():
            # If it is no part of the bundle it is writable, and the tensor keeps it; parts are kept by the bundle.
            posted += self._post_send(link, _tensor(np.frombuffer(message, np.uint8)), target, _MESSAGE_TAG)
        return posted

    def _receive(self, link: Link, source: int, first: torch.Tensor, posted: list[Posted], patience_secs: float) -> Bundle:
        arriving = iter([(first, posted)])

        def receive(count: int) -> bytes:
            message, posted = next(arriving, (None, []))
            if message is None:
                message = _empty(count)
                posted = self._post_receive(link, message, source, _MESSAGE_TAG)
            self._await(link, posted, patience_secs)
            return message.numpy().tobytes()

        return from_wire(receive)

    def _attempt(self, step: Callable[[], list[Posted] | None]) -> list[Posted]:
        # A broken connection is found again by the next call.
        with contextlib.suppress(RuntimeError):
            return step() or []
        return []

    # If a connection breaks in the middle of a message, gloo does not end the wait of the rank that receives it. So all
    # but small ones are followed by a byte, which cannot be in the middle of arriving, and the byte is waited for first.

    def _post_send(self, link: Link, data: torch.Tensor, target: int, tag: int) -> list[Posted]:
        link.peer = target
        posted = [(target, self._gloo.send([data], target, tag))]
        if len(data) > _UNMARKED_BYTES:
            posted.append((target, self._gloo.send([_empty(1).zero_()], target, tag)))
        return posted

    def _post_receive(self, link: Link, room: torch.Tensor, source: int, tag: int) -> list[Posted]:
        link.peer = source
        posted = [(source, self._gloo.recv([room], source, tag))]
        if len(room) > _UNMARKED_BYTES:
            posted.append((source, self._gloo.recv([_empty(1)], source, tag)))
        return posted[::-1]

    def _await(self, link: Link, posted: Sequence[Posted], patience_secs: float) -> None:
        patience = dt.timedelta(seconds=patience_secs + _EXTRA_SECS)
        for peer, work in posted:
            link.peer = peer
            work.wait(patience)
            link.moved_at = time.monotonic()


def _gloo(store: Any, rank: int, size: int, patience: dt.timedelta, address: str | None) -> Any:
    kind: Any = dist.ProcessGroupGloo
    if address is None:
        return kind(store, rank, size, patience)
    options = kind._Options()
    options._devices = [kind.create_device(hostname=address)]
    options._timeout = patience
    return kind(store, rank, size, options)


def cause(message: str) -> str:
    """A message of gloo's without its source file and advice."""
    first = message.splitlines()[0] if message else "connection lost"
    return re.sub(r"^\[[^\]]*\] *", "", first).split(". ")[0]


def _parcel_tag(parcel: Parcel) -> int:
    # gloo would put a parcel into larger room without a word. With a tag for each size they do not meet.
    return _FIRST_PARCEL_TAG + parcel.data.size % _PARCEL_TAGS


def _tensor(array: NDArray[np.uint8]) -> torch.Tensor:
    """The array's memory as a tensor. The caller keeps the array for as long as it uses the tensor."""
    if not array.flags.writeable:
        # torch warns of read-only memory, which gloo only sends.
        array = np.ctypeslib.as_array((ctypes.c_uint8 * array.size).from_address(array.ctypes.data))
    return torch.from_numpy(array.reshape(-1))


def _empty(count: int) -> torch.Tensor:
    # Always on the CPU, whatever the caller's default device is.
    return torch.empty(count, dtype=torch.uint8, device="cpu")
