"""Hosts with addresses of their own on one machine: Linux network namespaces, joined by a bridge in one more.

Nothing is made outside the namespaces: links and bridge go with them, and the machine's own network is not touched. Names
have the process id in them, so that test processes beside each other have networks of their own, and so that what one has
left that was killed is removed by the next.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

INTERFACE = "gs0"
_FOLDER = Path("/run/netns")
_OWN_NAME = re.compile(r"giantstep-(\d+)-")
_NEW_NETWORK = 0x40000000


class NamespaceError(RuntimeError):
    """A command of `ip` failed."""


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise NamespaceError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@functools.cache
def why_not() -> str:
    """Why namespaces cannot be made here; "" if they can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the command ip (Debian: iproute2)"
    try:
        with Network(2) as network:
            network.cut(0)
    except (NamespaceError, OSError) as error:
        return f"network namespaces are not permitted here: {error}"
    return ""


def needs_namespaces() -> None:
    """Skip the test where namespaces cannot be made. Asked by tests that run, not when they are collected."""
    if reason := why_not():
        pytest.skip(reason)


class Network:
    """So many hosts, each with an address of its own. A context manager.

    Args:
        hosts: at first.

    Attributes:
        names: of the namespaces, in the order of the addresses.
    """

    def __init__(self, hosts: int) -> None:
        self._first = hosts
        self._switch = f"giantstep-{os.getpid()}-switch"
        self.names: list[str] = []

    def __enter__(self) -> Self:
        remove_stale()
        try:
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
            for _ in range(self._first):
                self.add()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove()

    def add(self) -> int:
        """One more host, at an address that none had before; return its number."""
        number = len(self.names)
        name = f"giantstep-{os.getpid()}-{number}"
        self.names.append(name)
        _ip("netns", "add", name)
        _ip("-n", self._switch, "link", "add", f"to{number}", "type", "veth", "peer", "name", INTERFACE, "netns", name)
        _ip("-n", self._switch, "link", "set", f"to{number}", "master", "bridge", "up")
        _ip("-n", name, "address", "add", f"{self.address(number)}/24", "dev", INTERFACE)
        _ip("-n", name, "link", "set", INTERFACE, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        return number

    def address(self, number: int) -> str:
        """Of a host."""
        return f"10.199.7.{10 + 3 * number}"

    def path(self, number: int) -> str:
        """What `enter` takes."""
        return str(_FOLDER / self.names[number])

    def cut(self, number: int) -> None:
        """Nothing gets through to a host or from it."""
        _ip("-n", self._switch, "link", "set", f"to{number}", "down")

    def mend(self, number: int) -> None:
        """Undo `cut`."""
        _ip("-n", self._switch, "link", "set", f"to{number}", "up")

    def _remove(self) -> None:
        for name in (*self.names, self._switch):
            _remove(name)


def _remove(name: str) -> None:
    if (_FOLDER / name).exists():
        _ip("netns", "delete", name)


def remove_stale() -> None:
    """Remove namespaces of test processes that are no more."""
    for name in [path.name for path in _FOLDER.iterdir()] if _FOLDER.is_dir() else []:
        own = _OWN_NAME.match(name)
        if own and not Path("/proc", own[1]).exists():
            _remove(name)


def enter(path: str) -> None:
    """Have this thread, and those that it starts, in a namespace from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(descriptor, _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"namespace {path} cannot be entered")
    finally:
        os.close(descriptor)
