"""What a `LocalTier` may be given."""

from __future__ import annotations

from collections.abc import Sequence

from giantstep.errors import BadArgumentError, DisagreementError
from giantstep.options import LoadOptions, SaveOptions, host_name
from giantstep.storage.base import Store
from giantstep.storage.memory import MemoryStore
from giantstep.tiers.hosts import HostMap, Standing


def check_settings(every: int | None, keep: int, asynchronous: bool) -> None:
    """Raise `BadArgumentError` for values that can never work."""
    if not isinstance(asynchronous, bool):
        raise BadArgumentError(f"asynchronous={asynchronous!r} cannot be: expected True or False")
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise BadArgumentError(f"every={every!r} cannot be: expected None or a number of steps from 1 on")
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise BadArgumentError(f"keep={keep!r} cannot be: expected an int from 1 on")


def check_options(save_options: SaveOptions | None, load_options: LoadOptions | None) -> None:
    """Raise `BadArgumentError` for what are no options."""
    if not isinstance(save_options, SaveOptions | None):
        raise BadArgumentError(f"save_options must be SaveOptions, not {type(save_options).__name__}")
    if not isinstance(load_options, LoadOptions | None):
        raise BadArgumentError(f"load_options must be LoadOptions, not {type(load_options).__name__}")


def check_places(hosts: HostMap, locations: Sequence[str]) -> None:
    """Raise `DisagreementError` if ranks of one host have different places."""
    for rank, location in enumerate(locations):
        lead = hosts.leads[hosts.host[rank]]
        if location != locations[lead]:
            raise DisagreementError(
                f"ranks {lead} and {rank} are both on host {hosts.standings[hosts.host[rank]].host!r}, where rank {lead} has "
                f"{locations[lead]}, and rank {rank} {location}. Ranks of one host share its place: give them one path, or "
                "hosts of different names."
            )


def standing_of(here: Store, host: str | None, domain: str | None, circle: str) -> Standing:
    """Where this rank stands: as given, or by the name of the host."""
    for name, value in (("host", host), ("domain", domain), ("circle", circle)):
        if (value is not None and not isinstance(value, str)) or (value == "" and name != "circle"):
            raise BadArgumentError(f"{name}={value!r} cannot be: expected a name")
    named = host if host is not None else host_name(of_process=isinstance(here, MemoryStore))
    return Standing(named, domain if domain is not None else (host or host_name()), circle)
