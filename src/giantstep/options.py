"""Every setting of giantstep: frozen, keyword-only, documented at the field, validated when made.

The only module that reads the environment. Not here: what the settings cause.
"""

from __future__ import annotations

import enum
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from giantstep.errors import BadArgumentError
from giantstep.plan_cache import PlanCache
from giantstep.requirements import require, require_int, require_secs

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

DirectIo = Literal["auto", "never"]
OnObjectDifference = Literal["warn", "raise"]
OnError = Literal["raise", "warn"]
StagingMode = Literal["auto", "background"]
Cast = Literal["never", "floating", "any"]
Verify = Literal["reading", "before", "never"]
UnknownTypes = Literal["raise", "keep"]
OnCorrupt = Literal["raise", "fallback"]


class StrictHandling(enum.Enum):
    """What to do about keys that the request and the checkpoint do not share.

    "Unexpected" means requested but not in the checkpoint; "missing" means in the checkpoint but
    requested by no rank. Values are those of Megatron-Core.
    """

    ASSUME_OK_UNEXPECTED = "assume_ok_unexpected"
    """The caller is sure that nothing is unexpected; if something is, raise. Missing keys are fine."""
    LOG_UNEXPECTED = "log_unexpected"
    """Log a warning about unexpected keys, once, and load the others; missing keys are fine."""
    LOG_ALL = "log_all"
    """Log a warning about unexpected and missing keys, once, and load the others."""
    RAISE_UNEXPECTED = "raise_unexpected"
    """Raise on unexpected keys; missing keys are fine (a partial load)."""
    RAISE_ALL = "raise_all"
    """Raise on unexpected and on missing keys."""
    RETURN_UNEXPECTED = "return_unexpected"
    """Load what both sides have; unexpected keys are in the report."""
    RETURN_ALL = "return_all"
    """Load what both sides have; unexpected and missing keys are in the report."""
    IGNORE_ALL = "ignore_all"
    """Load what both sides have; leave unexpected tensors as they are."""

    @property
    def raises_unexpected(self) -> bool:
        """Whether an unexpected key is an error."""
        return self in (self.ASSUME_OK_UNEXPECTED, self.RAISE_UNEXPECTED, self.RAISE_ALL)

    @property
    def raises_missing(self) -> bool:
        """Whether a missing key is an error."""
        return self is self.RAISE_ALL

    @property
    def logs_unexpected(self) -> bool:
        """Whether an unexpected key is logged."""
        return self in (self.LOG_UNEXPECTED, self.LOG_ALL)

    @property
    def logs_missing(self) -> bool:
        """Whether a missing key is logged."""
        return self is self.LOG_ALL


ObjectsReshard = Callable[[str, dict[tuple[int, ...], Any], tuple[int, ...], tuple[int, ...]], Any]
"""(key, stored values by position, shape of the requested grid, requested position) to a value."""
OnObjectReshard = Literal["raise", "drop"] | ObjectsReshard
Rename = Mapping[str, str | None] | Callable[[str], str | None]
"""From a requested key to the stored key; None leaves the request out. A mapping leaves keys that it has not as they are."""


def longest_match(patterns: Mapping[str, Any], key: str) -> str | None:
    """The longest of the patterns that fit the key: prefixes, or endings if they begin with `*`."""
    fitting = (one for one in patterns if (key.endswith(one[1:]) if one.startswith("*") else key.startswith(one)))
    return max(fitting, key=len, default=None)


def default_timeout_secs() -> float:
    """GIANTSTEP_TIMEOUT_SECS, else 1800."""
    text = os.environ.get("GIANTSTEP_TIMEOUT_SECS", "1800")
    try:
        return float(text)
    except ValueError as error:
        raise BadArgumentError(f"GIANTSTEP_TIMEOUT_SECS={text!r} cannot be: expected a number of seconds") from error


def host_name(*, of_process: bool = False) -> str:
    """Name of this host: GIANTSTEP_HOST, else what Slurm calls it (SLURMD_NODENAME), else its network name.

    Args:
        of_process: with the number of the process: where each process has a place of its own, as in its memory.
    """
    name = os.environ.get("GIANTSTEP_HOST") or os.environ.get("SLURMD_NODENAME") or platform.node() or "localhost"
    return f"{name} process {os.getpid()}" if of_process else name


def gloo_interface() -> str | None:
    """The network interface that gloo is to use (GLOO_SOCKET_IFNAME), if that was said."""
    return os.environ.get("GLOO_SOCKET_IFNAME") or None


@dataclass(frozen=True, slots=True)
class Threads:
    """How many threads of a rank move bytes.

    Attributes:
        device: where a device is waited for.
        memory: where bytes only go from memory to memory, the page cache included, so that more threads than cores only
            take the cores from each other.
    """

    device: int
    memory: int


def threads_for(asked: int | None, ranks: int, *, spared: int = 0) -> Threads:
    """As many as `asked`; if that is None, 2, but no more in memory than a rank has cores.

    Args:
        asked: `writer_threads` or `reader_threads`.
        ranks: of the group; all of them are taken to be on this host unless LOCAL_WORLD_SIZE, which launchers set, says how
            many are.
        spared: cores of each rank that have something else to do.
    """
    if asked is not None:
        return Threads(asked, asked)
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    here = min(ranks, int(text)) if text.isdecimal() and int(text) else ranks
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Threads(_THREADS, min(_THREADS, max(1, cores // here - spared)))


_THREADS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveOptions:
    """Settings of `save` and `async_save`."""

    timeout_secs: float = field(default_factory=default_timeout_secs)
    """How long a rank may keep the others waiting in one phase before all of them raise
    `PhaseTimeoutError` naming it. Default: GIANTSTEP_TIMEOUT_SECS, else 1800."""

    block_bytes: int = 256 * KIB
    """Size of the blocks that are checksummed and so the unit of a verified partial read. A multiple of 4096."""

    max_file_bytes: int = 64 * GIB
    """A rank starts another data file where one would grow beyond this; larger chunks are split."""

    split_bytes: int = MIB
    """Replicated regions of at least this size may be divided between their holders for balance; smaller ones only
    where a rank's whole share is not much larger than they are."""

    direct_io: DirectIo = "auto"
    """`auto` writes large files past the page cache (O_DIRECT) where the file system can; `never` does not."""

    writer_threads: int | None = None
    """Threads per rank that checksum and write. None: 2; in memory file systems and the page cache 1, if the host has not 2
    cores per rank, or for `async_save` 3."""

    buffer_bytes: int = 8 * MIB
    """Size of one staging buffer, a multiple of `block_bytes`; a rank uses `writer_threads` + 2 of them."""

    on_object_difference: OnObjectDifference = "warn"
    """Objects that are meant to be equal on several ranks (common state, i.e. plain Python values, and replicas of a
    `ShardedObject`) but differ: `warn`, naming ranks and paths, and store rank 0's or the main replica's; or `raise`
    a `DisagreementError`."""

    writers: Any = None
    """Who writes what several ranks hold: a policy of `giantstep.writers`. None means `Balanced()`: all holders, in
    equal shares."""

    plan_cache: PlanCache | None = None
    """Where plans are kept for later saves of the same structure. None: every save is planned anew. With one, replicas
    of plain tensors are compared when a plan is made and not again while it is used."""

    staging: StagingMode = "auto"
    """`async_save`: who copies tensors in host memory. `auto`: the caller's thread, so that they may be changed as soon as
    the call returns. `background`: another thread, so that the call returns at once; wait until the save is staged before
    they are changed. Tensors on CUDA devices are copied beside the caller's kernels in either case."""

    staging_bytes: int | None = None
    """`async_save`: most bytes of copies that a rank holds at a time. A save waits for earlier ones where it would need
    more; if it needs more by itself it is refused. None: whatever `max_pending` saves need."""

    max_pending: int = 1
    """`async_save`: how many saves may be unfinished. With so many, the next call waits until one is finished."""

    check_free_space: bool = True
    """Before a byte is written, compare what all ranks are to write with the space that the store says is free, and raise
    `StoreError` if it is too little. Not done for incremental saves, nor where a store does not know."""

    digests: bool = False
    """Keep a digest of every chunk and object in the index, so that a later save can tell what has not changed since, and
    `giantstep diff` need not read what is equal. Costs a pass over the bytes. `previous` implies it."""

    previous: Any = None
    """A committed step saved with digests: a path, URL or store of the same kind. What has not changed since is not written
    again; data files that hold it become files of the new step too (hard links), which does not depend on `previous` from
    then on. What cannot be used again is written, with a warning. Give the same on all ranks."""

    least_live: float = 0.5
    """A data file of `previous` is used again if at least this part of its bytes is unchanged and still wanted; the rest of
    it is dead weight. What is unchanged in other files is written into files of its own."""

    on_error: OnError = "raise"
    """`async_save`: what becomes of a save that failed in the background. `raise`: the next `async_save` raises its error
    on all ranks, unless `result` or `exception` told of it before. `warn`: a warning is logged, and training goes on."""

    def __post_init__(self) -> None:
        require_secs("timeout_secs", self.timeout_secs)
        require_int("block_bytes", self.block_bytes, 4 * KIB, 64 * MIB)
        require(self.block_bytes % 4096 == 0, "block_bytes", self.block_bytes, "a multiple of 4096")
        require_int("max_file_bytes", self.max_file_bytes, MIB, 1 << 62)
        require_int("split_bytes", self.split_bytes, 1, 1 << 62)
        require(self.direct_io in get_args(DirectIo), "direct_io", self.direct_io, f"one of {get_args(DirectIo)}")
        if self.writer_threads is not None:
            require_int("writer_threads", self.writer_threads, 1, 64)
        require_int("buffer_bytes", self.buffer_bytes, 4 * KIB, GIB)
        require(
            self.buffer_bytes % self.block_bytes == 0,
            "buffer_bytes",
            self.buffer_bytes,
            f"a multiple of block_bytes ({self.block_bytes})",
        )
        require(
            self.on_object_difference in get_args(OnObjectDifference),
            "on_object_difference",
            self.on_object_difference,
            f"one of {get_args(OnObjectDifference)}",
        )
        policy = self.writers is None or callable(getattr(self.writers, "cell", None))
        require(policy and not isinstance(self.writers, type), "writers", self.writers, "a policy of giantstep.writers")
        require(isinstance(self.plan_cache, PlanCache | None), "plan_cache", self.plan_cache, "a PlanCache or None")
        self._check_background()
        for name in ("digests", "check_free_space"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "a bool")
        earlier = self.previous
        place = isinstance(earlier, str | os.PathLike) or callable(getattr(earlier, "open_read", None))
        require(earlier is None or (place and earlier != ""), "previous", earlier, "a path, URL or store, or None")
        part = isinstance(self.least_live, int | float) and not isinstance(self.least_live, bool)
        require(part and 0 < self.least_live <= 1, "least_live", self.least_live, "a number above 0, up to 1")

    @property
    def keeps_digests(self) -> bool:
        """Whether the index is to have digests."""
        return self.digests or self.previous is not None

    def _check_background(self) -> None:
        require(self.staging in get_args(StagingMode), "staging", self.staging, f"one of {get_args(StagingMode)}")
        if self.staging_bytes is not None:
            require_int("staging_bytes", self.staging_bytes, 1, 1 << 62)
        require_int("max_pending", self.max_pending, 1, 1024)
        require(self.on_error in get_args(OnError), "on_error", self.on_error, f"one of {get_args(OnError)}")


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

    strict_overrides: Mapping[str, StrictHandling] = field(default_factory=dict)
    """Other policies than `strict` for keys that begin with a prefix, or, where it begins with `*`, that end in what follows;
    the longest decides. Requested keys that are not stored are looked up as requested, keys that nobody requested as
    stored."""

    rename: Rename | None = None
    """Where requested tensors and sharded objects are found, for checkpoints with other names: a function or mapping
    from the requested key to the stored one. None as a result leaves the tensor or object as it is (a filter); it is then
    neither unexpected nor missing."""

    on_object_reshard: OnObjectReshard | Mapping[str, OnObjectReshard] = "raise"
    """A `ShardedObject` that is stored in a grid of another shape (another number of ranks): `raise`; `drop` the stored
    ones and keep the local value; or a function `(key, stored values by position, shape, position) -> value`. Or a
    mapping from key prefixes, or endings after `*`, to these; the longest decides, and keys without one raise."""

    dequantise: bool = False
    """Whether a plain floating-point tensor may be loaded from a wrapper tensor (quantised data and scales) that is
    stored under its key; see `register_wrapper`."""

    unknown_types: UnknownTypes = "raise"
    """Values of types that are not registered here, in common state and sharded objects: `raise`, or `keep` what is stored
    of them as `Unregistered`."""

    exchange: Any = "auto"
    """Whether ranks that want the same bytes read them once and send them to each other. `auto` does so among all ranks
    if together they would read more than 1.1 times the bytes that they want, and at least 4 MiB more. `none`: every rank
    reads for itself. Or a group, in which it is done in any case: a `torch.distributed.ProcessGroup` or a sequence of
    ranks of the loading group; each rank gives the one that it is in, and groups must not overlap."""

    exchange_bytes: int = 64 * MIB
    """Most bytes that a rank holds of what other ranks sent it, unless one block from each of them is more."""

    reader_threads: int | None = None
    """Threads per rank that read, check and copy. None: 2; of what is in memory or in the page cache 1, if the host has not
    2 cores per rank."""

    buffer_bytes: int = 8 * MIB
    """Most bytes that one thread reads at a time."""

    plan_cache: PlanCache | None = None
    """Where plans of loads, and the index of the checkpoint loaded last, are kept for later loads. None: nothing is kept."""

    def __post_init__(self) -> None:
        require_secs("timeout_secs", self.timeout_secs)
        require(self.cast in get_args(Cast), "cast", self.cast, f"one of {get_args(Cast)}")
        require(self.verify in get_args(Verify), "verify", self.verify, f"one of {get_args(Verify)}")
        expected = f"one of {get_args(UnknownTypes)}"
        require(self.unknown_types in get_args(UnknownTypes), "unknown_types", self.unknown_types, expected)
        self._check_matching()
        asked = self.exchange
        ranks = isinstance(asked, Sequence) and not isinstance(asked, str) and all(type(rank) is int for rank in asked)
        group = callable(getattr(asked, "rank", None)) and callable(getattr(asked, "size", None))
        named = isinstance(asked, str) and asked in ("auto", "none")
        require(named or (ranks and len(asked) > 0) or group, "exchange", asked, "'auto', 'none', a group, or ranks")
        require_int("exchange_bytes", self.exchange_bytes, MIB, 1 << 40)
        require(isinstance(self.plan_cache, PlanCache | None), "plan_cache", self.plan_cache, "a PlanCache or None")
        if self.reader_threads is not None:
            require_int("reader_threads", self.reader_threads, 1, 64)
        require_int("buffer_bytes", self.buffer_bytes, 64 * KIB, GIB)

    def _check_matching(self) -> None:
        overrides = self.strict_overrides
        require(
            isinstance(overrides, Mapping)
            and all(isinstance(key, str) and isinstance(value, StrictHandling) for key, value in overrides.items()),
            "strict_overrides",
            overrides,
            "a mapping from key prefixes to StrictHandling",
        )
        rename = self.rename
        require(
            rename is None
            or callable(rename)
            or (
                isinstance(rename, Mapping)
                and all(isinstance(key, str) and isinstance(value, str | None) for key, value in rename.items())
            ),
            "rename",
            rename,
            "a function or a mapping from requested key to stored key or None",
        )
        policies = self.on_object_reshard
        by_prefix = policies if isinstance(policies, Mapping) else {"": policies}
        require(
            all(isinstance(key, str) and (callable(value) or value in ("raise", "drop")) for key, value in by_prefix.items()),
            "on_object_reshard",
            policies,
            "'raise', 'drop', a function, or a mapping from key prefixes to these",
        )
        require(isinstance(self.dequantise, bool), "dequantise", self.dequantise, "a bool")

    def stored_key(self, key: str) -> str | None:
        """The stored key of a requested one; None if it is to be left out."""
        if self.rename is None:
            return key
        found = self.rename.get(key, key) if isinstance(self.rename, Mapping) else self.rename(key)
        require(isinstance(found, str | None), f"rename({key!r})", found, "a str or None")
        return found

    def object_reshard(self, key: str) -> OnObjectReshard:
        """What to do about a sharded object that is stored in another grid."""
        policies = self.on_object_reshard
        if not isinstance(policies, Mapping):
            return policies
        prefix = longest_match(policies, key)
        return "raise" if prefix is None else policies[prefix]
