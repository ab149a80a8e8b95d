"""Which address other ranks are told, where gloo would tell them one that leads to themselves."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

import pytest

from giantstep.group import addresses
from giantstep.group.addresses import address_for


@dataclass
class StoreAt:
    """A TCP store, as far as is looked at it."""

    host: str
    port: int = 29500


@dataclass
class Prefixed:
    """A store within another."""

    underlying_store: Any


@pytest.fixture(autouse=True)
def way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose name leads to loopback, and that reaches 10.0.0.1 from 10.0.0.7."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(addresses, "_of_own_name", lambda: "127.0.1.1")
    monkeypatch.setattr(addresses, "_toward", lambda host, port: {"10.0.0.1": "10.0.0.7", "localhost": "127.0.0.1"}.get(host))


def test_where_the_own_name_leads_to_loopback_it_is_the_address_that_reaches_the_store() -> None:
    assert address_for(Prefixed(Prefixed(StoreAt("10.0.0.1")))) == "10.0.0.7"


@pytest.mark.parametrize("store", [StoreAt("localhost"), StoreAt("unknown"), object()], ids=["here", "unknown", "no address"])
def test_gloo_chooses_where_the_store_says_nothing_of_other_hosts(store: Any) -> None:
    assert address_for(store) is None


def test_gloo_chooses_where_the_own_name_leads_to_an_address_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_of_own_name", lambda: "10.1.0.7")
    assert address_for(StoreAt("10.0.0.1")) is None


def test_gloo_chooses_where_the_interface_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    assert address_for(StoreAt("10.0.0.1")) is None


def test_a_name_that_leads_to_another_hosts_address_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("192.0.2.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert addresses._of_own_name() is None
