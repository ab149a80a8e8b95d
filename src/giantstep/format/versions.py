"""Versions of the format, and what a reader does about each.

A newer minor version only adds what an older reader may ignore, so it is read; a newer major version is
refused. The envelope (first keys and digest line of the commit record) never changes, so that every reader
can tell a newer version from a damaged file.
"""

from __future__ import annotations

import re

from giantstep.errors import CorruptionError, VersionError

MAJOR = 1
MINOR = 2
CURRENT = f"{MAJOR}.{MINOR}"
WITH_NODES = CURRENT
# What is written where nothing of 1.2 is used, but something of 1.1.
WITH_DIGESTS = f"{MAJOR}.1"
# What is written where nothing of a newer minor version is used.
PLAIN = "1.0"

_PATTERN = re.compile(r"(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})")


def check_version(version: object, what: str) -> None:
    """Return if this library can read `version`; raise `VersionError` if it is newer by a major number."""
    match = _PATTERN.fullmatch(version) if isinstance(version, str) else None
    if match is None:
        raise CorruptionError(f"{what} states format version {version!r}: expected MAJOR.MINOR")
    if int(match[1]) != MAJOR:
        raise VersionError(
            f"{what} is written in format version {version}; this library reads {MAJOR}.x. "
            "Upgrade giantstep to read it; nothing was changed."
        )
