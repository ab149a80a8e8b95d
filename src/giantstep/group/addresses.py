"""By which address other hosts reach this one, where gloo would not find it. Called by `torch_group.py`.

gloo takes what the host's name resolves to. On many hosts that is a loopback address (Debian writes 127.0.1.1 into /etc/hosts),
by which only ranks of the same host find each other; who trains over NCCL alone does not notice before.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from typing import Any

from giantstep.options import gloo_interface


def address_for(store: Any) -> str | None:
    """The address of this host to be told to other ranks; None if gloo is to choose.

    It is the one from which this host reaches the store's. With GLOO_SOCKET_IFNAME, and where the host's name leads to an
    address that others can reach, gloo chooses.

    Args:
        store: that started torch.distributed.
    """
    if gloo_interface() is not None or not _is_loopback(_of_own_name()):
        return None
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    host, port = getattr(store, "host", None), getattr(store, "port", None)
    found = _toward(host, port) if isinstance(host, str) and isinstance(port, int) else None
    return None if _is_loopback(found) else found


def _of_own_name() -> str | None:
    """What gloo would take: the first address of the host's name that is one of this host."""
    return next((found for family, found in _resolved(socket.gethostname(), 0) if _can_bind(family, found)), None)


def _toward(host: str, port: int) -> str | None:
    for family, address in _resolved(host, port):
        # Nothing is sent: the system only looks for the way.
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as way:
            way.connect((address, port))
            return str(way.getsockname()[0])
    return None


def _resolved(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [(family, str(where[0])) for family, _, _, _, where in found if family in {socket.AF_INET, socket.AF_INET6}]


def _can_bind(family: socket.AddressFamily, address: str) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as taken:
            taken.bind((address, 0))
    except OSError:
        return False
    return True


def _is_loopback(address: str | None) -> bool:
    return address is None or ipaddress.ip_address(address.partition("%")[0]).is_loopback
