"""Every setting of giantstep: frozen, keyword-only, documented at the field, validated when made.

The only module that reads the environment. Not here: what the settings cause.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass, field
from typing import Literal, get_args

from giantstep.errors import BadArgumentError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

DirectIo = Literal["auto", "never"]
OnCommonDifference = Literal["warn", "raise"]
Cast = Literal["never", "floating", "any"]
Verify = Literal["reading", "before", "never"]


class StrictHandling(enum.Enum):
    """What to do about keys that the request and the checkpoint do not share.

    "Unexpected" means requested but not in the checkpoint; "missing" means in the checkpoint but
    requested by no rank. Values are those of Megatron-Core.
    """

    RAISE_UNEXPECTED = "raise_unexpected"
    """Raise on unexpected keys; missing keys are fine (a partial load)."""
    RAISE_ALL = "raise_all"
    """Raise on unexpected and on missing keys."""
    IGNORE_ALL = "ignore_all"
    """Load what both sides have; leave unexpected tensors as they are."""


def _require(condition: bool, field: str, value: object, expected: str) -> None:
    if not condition:
        raise BadArgumentError(f"{field}={value!r} cannot be: expected {expected}")


def _require_int(field: str, value: object, low: int, high: int) -> None:
    _require(
        isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
        field,
        value,
        f"an int from {low} to {high}",
    )


def _require_secs(field: str, value: object) -> None:
    _require(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9,
        field,
        value,
        "a positive number of seconds",
    )


def default_timeout_secs() -> float:
    """GIANTSTEP_TIMEOUT_SECS, else 1800."""
    text = os.environ.get("GIANTSTEP_TIMEOUT_SECS", "1800")
    try:
        return float(text)
    except ValueError as error:
        raise BadArgumentError(f"GIANTSTEP_TIMEOUT_SECS={text!r} cannot be: expected a number of seconds") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveOptions:
    """Settings of `save`."""

    timeout_secs: float = field(default_factory=default_timeout_secs)
    """How long a rank may keep the others waiting in one phase before all of them raise
    `PhaseTimeoutError` naming it. Default: GIANTSTEP_TIMEOUT_SECS, else 1800."""

    block_bytes: int = 256 * KIB
    """Size of the blocks that are checksummed and so the unit of a verified partial read. A multiple of 4096."""

    max_file_bytes: int = 64 * GIB
    """A rank starts another data file where one would grow beyond this; larger chunks are split."""

    split_bytes: int = MIB
    """Replicated regions of at least this size may be split between their holders for balance."""

    direct_io: DirectIo = "auto"
    """`auto` writes large files past the page cache (O_DIRECT) where the file system can; `never` does not."""

    writer_threads: int = 2
    """Threads per rank that checksum and write."""

    buffer_bytes: int = 8 * MIB
    """Size of one staging buffer, a multiple of `block_bytes`; a rank uses `writer_threads` + 2 of them."""

    on_common_difference: OnCommonDifference = "warn"
    """Common state (plain Python values) that differs between ranks: `warn`, naming ranks and
    paths, and store rank 0's; or `raise` a `DisagreementError`."""

    def __post_init__(self) -> None:
        _require_secs("timeout_secs", self.timeout_secs)
        _require_int("block_bytes", self.block_bytes, 4 * KIB, 64 * MIB)
        _require(self.block_bytes % 4096 == 0, "block_bytes", self.block_bytes, "a multiple of 4096")
        _require_int("max_file_bytes", self.max_file_bytes, MIB, 1 << 62)
        _require_int("split_bytes", self.split_bytes, 1, 1 << 62)
        _require(self.direct_io in get_args(DirectIo), "direct_io", self.direct_io, f"one of {get_args(DirectIo)}")
        _require_int("writer_threads", self.writer_threads, 1, 64)
        _require_int("buffer_bytes", self.buffer_bytes, 4 * KIB, GIB)
        _require(
            self.buffer_bytes % self.block_bytes == 0,
            "buffer_bytes",
            self.buffer_bytes,
            f"a multiple of block_bytes ({self.block_bytes})",
        )
        _require(
            self.on_common_difference in get_args(OnCommonDifference),
            "on_common_difference",
            self.on_common_difference,
            f"one of {get_args(OnCommonDifference)}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """Settings of `load`."""

    timeout_secs: float = field(default_factory=default_timeout_secs)
    """As in `SaveOptions`."""

    cast: Cast = "never"
    """Whether a tensor may be loaded into another dtype: `never`; `floating` between real floating
    types; `any` between all types but complex to real."""

    verify: Verify = "reading"
    """`reading` checks every block as it is read: a corrupt block raises when some tensors may already
    be filled. `before` reads and checks everything on all ranks first and fills afterwards (reads twice). `never`
    does not check tensors; objects always are."""

    reader_threads: int = 2
    """Threads per rank that read, check and copy."""

    buffer_bytes: int = 8 * MIB
    """Most bytes that one thread reads at a time."""

    def __post_init__(self) -> None:
        _require_secs("timeout_secs", self.timeout_secs)
        _require(self.cast in get_args(Cast), "cast", self.cast, f"one of {get_args(Cast)}")
        _require(self.verify in get_args(Verify), "verify", self.verify, f"one of {get_args(Verify)}")
        _require_int("reader_threads", self.reader_threads, 1, 64)
        _require_int("buffer_bytes", self.buffer_bytes, 64 * KIB, GIB)
