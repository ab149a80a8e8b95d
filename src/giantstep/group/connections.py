"""gloo connections of our own between the ranks, and the threads that wait on them.

gloo can only be waited for, and closes all connections of a group when one wait times out. Therefore a thread per
*link* - one message, or one set of parcels - does the waiting, and the caller watches the link (`watching.py`). What
is sent, and what to do when a link breaks, is `torch_group.py`'s.
"""

from __future__ import annotations

import ctypes
import datetime as dt
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from giantstep.group.base import Parcel
from giantstep.group.bundle import Buffer, Bundle, from_wire

# gloo gets longer than our own clock, so that a fault is announced before connections close.
_EXTRA_SECS = 30.0
_JOIN_SECS = 10.0
_MESSAGE_TAG, _CLOSING_TAG, _FIRST_PARCEL_TAG = 0, 1, 2
_PARCEL_TAGS = 1 << 30
_UNMARKED_BYTES = 4 << 10


class Link:
    """A thread that talks to other ranks, so that the caller can stop waiting without closing the connections.

    Attributes:
        peer: the rank that it waits for now.
        moved_at: when something last went through, on the monotonic clock.
        finished: it has ended; then `error` says why nothing came of it, if so, and `bundle` is what was received.
    """

    def __init__(self, peer: int, talk: Callable[[Link], Bundle | None], changed: threading.Event) -> None:
        self.peer = peer
        self.moved_at = time.monotonic()
        self.finished = False
        self.error: Exception | None = None
        self.bundle = Bundle((), (), ())
        self._talk: Callable[[Link], Bundle | None] | None = talk
        self._changed = changed
        self._thread = threading.Thread(target=self._run, name="giantstep-wait", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            if self._talk is not None:
                self.bundle = self._talk(self) or self.bundle
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller must hear of it
            # Its traceback would keep the connections in a circle of references.
            self.error = error.with_traceback(None)
        # Buffers that gloo may still have are let go here, not by the caller.
        self._talk = None
        self.finished = True
        self._changed.set()

    def join(self, patience_secs: float) -> None:
        """Return when the thread ended, or its patience did."""
        self._thread.join(patience_secs)


class Connections:
    """Connections of one rank with all others.

    Attributes:
        changed: set whenever a link ends.

    Raises:
        RuntimeError: the ranks could not connect.
    """

    def __init__(self, store: Any, rank: int, size: int, patience_secs: float) -> None:
        self._rank, self._size = rank, size
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, dt.timedelta(seconds=patience_secs))
        self._links: list[Link] = []
        self.changed = threading.Event()

    def receive(self, source: int, patience_secs: float) -> Link:
        """Receive a bundle."""
        return self._start(source, lambda link: self._receive(link, source, patience_secs))

    def ask(self, bundle: Bundle, other: int, patience_secs: float) -> Link:
        """Send a bundle and receive one."""

        def talk(link: Link) -> Bundle:
            self._send(link, bundle.to_wire(), other, patience_secs)
            return self._receive(link, other, patience_secs)

        return self._start(other, talk)

    def send(self, bundle: Bundle, target: int, patience_secs: float) -> Link:
        """Send a bundle."""

        def talk(link: Link) -> None:
            self._send(link, bundle.to_wire(), target, patience_secs)

        return self._start(target, talk)

    def move(self, sends: Sequence[Parcel], receives: Sequence[Parcel], patience_secs: float) -> Link:
        """Send and receive parcels, all at once; none are empty."""

        def talk(link: Link) -> None:
            posted = []
            for parcel in receives:
                posted += self._post_receive(link, _tensor(parcel.data), parcel.peer, _parcel_tag(parcel))
            for parcel in sends:
                posted += self._post_send(link, _tensor(parcel.data), parcel.peer, _parcel_tag(parcel))
            self._await(link, posted, patience_secs)

        return self._start((*receives, *sends)[0].peer, talk)

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
        for link in self._links:
            link.join(_JOIN_SECS)

    def _start(self, peer: int, talk: Callable[[Link], Bundle | None]) -> Link:
        self._links = [link for link in self._links if not link.finished]
        link = Link(peer, talk, self.changed)
        self._links.append(link)
        return link

    # On the link's thread.

    def _send(self, link: Link, messages: Sequence[Buffer], target: int, patience_secs: float) -> None:
        posted = []
        for message in messages:
            # If it is no part of a bundle it is writable, and the tensor keeps it; parts are kept by the bundle.
            posted += self._post_send(link, _tensor(np.frombuffer(message, np.uint8)), target, _MESSAGE_TAG)
        self._await(link, posted, patience_secs)

    def _receive(self, link: Link, source: int, patience_secs: float) -> Bundle:
        def receive(count: int) -> bytes:
            message = _empty(count)
            self._await(link, self._post_receive(link, message, source, _MESSAGE_TAG), patience_secs)
            return message.numpy().tobytes()

        return from_wire(receive)

    # If a connection breaks in the middle of a message, gloo does not end the wait of the rank that receives it. So all
    # but small ones are followed by a byte, which cannot be in the middle of arriving, and the byte is waited for first.

    def _post_send(self, link: Link, data: torch.Tensor, target: int, tag: int) -> list[tuple[int, Any]]:
        link.peer = target
        posted = [(target, self._gloo.send([data], target, tag))]
        if len(data) > _UNMARKED_BYTES:
            posted.append((target, self._gloo.send([_empty(1).zero_()], target, tag)))
        return posted

    def _post_receive(self, link: Link, room: torch.Tensor, source: int, tag: int) -> list[tuple[int, Any]]:
        link.peer = source
        posted = [(source, self._gloo.recv([room], source, tag))]
        if len(room) > _UNMARKED_BYTES:
            posted.append((source, self._gloo.recv([_empty(1)], source, tag)))
        return posted[::-1]

    def _await(self, link: Link, posted: Sequence[tuple[int, Any]], patience_secs: float) -> None:
        patience = dt.timedelta(seconds=patience_secs + _EXTRA_SECS)
        for peer, work in posted:
            link.peer = peer
            work.wait(patience)
            link.moved_at = time.monotonic()


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
    return torch.from_numpy(array)


def _empty(count: int) -> torch.Tensor:
    # Always on the CPU, whatever the caller's default device is.
    return torch.empty(count, dtype=torch.uint8, device="cpu")
