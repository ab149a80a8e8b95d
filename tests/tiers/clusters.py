"""Hosts as directories, ranks as threads; and states in several layouts, all of the same values."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import giantstep as gs
from exactness import same
from giantstep.format.record import CommitRecord, decode_record
from giantstep.reports import LoadedState, SaveReport
from giantstep.storage.base import Store
from giantstep.storage.local import LocalStore
from giantstep.testing.ranks import run_ranks, run_ranks_collecting
from giantstep.tiers.hosts import HostMap, Standing
from giantstep.tiers.node_store import NodeStore, Protection
from giantstep.tiers.parity_layout import ParityLayout

# How long a rank may keep the others waiting: nobody does in tests that do not say so.
SECS = 20.0
SAVING = gs.SaveOptions(timeout_secs=SECS, block_bytes=4096)
LOADING = gs.LoadOptions(timeout_secs=SECS)
POSITIONS = 5


@dataclass(frozen=True)
class Layout:
    """How tensors are divided: `tp` ranks beside each other, as often as the ranks allow, and rows by `weights`."""

    tp: int = 1
    weights: tuple[int, ...] = (1,)

    def cuts(self, rows: int, ranks: int) -> list[int]:
        """Where the rows of each rank begin, and their end."""
        weights = [self.weights[rank % len(self.weights)] for rank in range(ranks)]
        total = max(1, sum(weights))
        ends = [rows * sum(weights[: rank + 1]) // total for rank in range(ranks)]
        return [0, *ends[:-1], rows]


def whole(seed: int) -> dict[str, torch.Tensor]:
    """All of each tensor."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(24, 60, generator=draw),
        "uneven": torch.randn(37, 11, generator=draw),
        "half": torch.randn(60, 4, generator=draw).to(torch.bfloat16),
        "eighth": torch.randn(60, 16, generator=draw).to(torch.float8_e4m3fn),
        "bias": torch.randn(50, generator=draw).to(torch.bfloat16),
        "tied": torch.randn(30, generator=draw),
    }


def _rows(key: str, tensor: torch.Tensor, cuts: list[int], rank: int) -> gs.ShardedTensor:
    start, stop = cuts[rank], cuts[rank + 1]
    data = tensor[start:stop].clone()
    return gs.ShardedTensor(key, data, tensor.dtype, tuple(data.shape), tuple(tensor.shape), (start, 0), None)


def state_of(rank: int, ranks: int, layout: Layout, seed: int | None = 0) -> dict[str, Any]:
    """A rank's state; without a seed one that is to be loaded into."""
    full = whole(0 if seed is None else seed)
    if seed is None:
        full = {key: torch.zeros_like(tensor) for key, tensor in full.items()}
    tp = layout.tp if ranks % layout.tp == 0 else 1
    part = full["w"].chunk(tp)[rank % tp].clone()
    tied = full["tied"].clone()
    objects = {
        f"of {at}": gs.ShardedObject("loader", None if seed is None else [at, seed, "x" * at * 50], (POSITIONS,), (at,))
        for at in range(POSITIONS)
        if at % ranks == rank
    }
    return {
        "w": gs.ShardedTensor.from_rank_offsets("w", part, (0, rank % tp, tp), replica_id=rank // tp),
        "uneven": _rows("uneven", full["uneven"], layout.cuts(37, ranks), rank),
        "half": _rows("half", full["half"], layout.cuts(60, ranks), rank),
        "eighth": _rows("eighth", full["eighth"], Layout().cuts(60, ranks), rank),
        "bias": full["bias"],
        "tied": tied,
        "tied again": tied,
        "objects": objects,
        "common": None if seed is None else {"step": seed, "betas": (0.9, 0.95), "text": "é" * 200},
    }


def plain(state: Any) -> Any:
    """Values in the place of what says how they are divided."""
    if isinstance(state, gs.ShardedTensor | gs.ShardedObject):
        return state.data
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return state


@dataclass
class Cluster:
    """Hosts with directories.

    Attributes:
        root: of all directories.
        ranks: [hosts] how many each has.
        names, domains, circles, folders: [hosts]; default: h0, h1 ..., domains like hosts, one circle, folders like names.
        protection, run: of what is saved.
        wrapped: by rank, another store in the place of its host's.
    """

    root: Path
    ranks: Sequence[int]
    names: Sequence[str] = ()
    domains: Sequence[str] = ()
    circles: Sequence[str] = ()
    folders: Sequence[str] = ()
    protection: Protection = field(default_factory=Protection)
    wrapped: dict[int, Store] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = self.names or [f"h{number}" for number in range(len(self.ranks))]
        self.domains = self.domains or self.names
        self.circles = self.circles or [""] * len(self.ranks)
        self.folders = self.folders or self.names

    @property
    def size(self) -> int:
        return sum(self.ranks)

    def host(self, rank: int) -> int:
        return [host for host, count in enumerate(self.ranks) for _ in range(count)][rank]

    def folder(self, host: int) -> Path:
        return self.root / self.folders[host]

    def store(self, rank: int) -> NodeStore:
        host = self.host(rank)
        standing = Standing(self.names[host], self.domains[host], self.circles[host])
        here = self.wrapped.get(rank, LocalStore(self.folder(host)))
        return NodeStore(here, "job/step", standing, self.protection)

    @property
    def hosts(self) -> HostMap:
        return HostMap.of([self.store(rank).standing for rank in range(self.size)])

    def save(self, layout: Layout, seed: int = 0, options: gs.SaveOptions = SAVING) -> list[SaveReport]:
        def work(group: Any) -> SaveReport:
            state = state_of(group.rank, self.size, layout, seed)
            return gs.save(state, self.store(group.rank), process_group=group, options=options)

        return run_ranks(self.size, work)

    def load(self, layout: Layout, options: gs.LoadOptions = LOADING) -> tuple[list[LoadedState], list[BaseException | None]]:
        def work(group: Any) -> LoadedState:
            state = state_of(group.rank, self.size, layout, None)
            return gs.load(state, self.store(group.rank), process_group=group, options=options)

        found, errors = run_ranks_collecting(self.size, work)
        return [one for one in found if one is not None], errors

    def check_load(self, layout: Layout, seed: int = 0, options: gs.LoadOptions = LOADING) -> list[LoadedState]:
        """Load, and see that every bit is what was saved."""
        found, errors = self.load(layout, options)
        assert errors == [None] * self.size, errors
        check_exact(found, layout, seed)
        return found

    def record(self) -> CommitRecord:
        """Of the first host that has one."""
        path = next(path for path in sorted(self.root.glob("*/checkpoint.json")))
        return decode_record(path.read_bytes(), str(path))

    def held(self) -> list[dict[str, bytes]]:
        """[hosts] data files of each."""
        return [
            {path.name: path.read_bytes() for path in sorted((self.folder(host) / "data").glob("*"))}
            for host in range(len(self.ranks))
        ]

    def parity_groups(self) -> list[tuple[int, ...]]:
        layout = ParityLayout.of("x", self.hosts, self.protection.parity or (1, 1), [])
        return sorted({tuple(sorted(stripe.hosts)) for stripe in layout.stripes})

    def lose(self, *hosts: int) -> None:
        for host in hosts:
            shutil.rmtree(self.folder(host), ignore_errors=True)


def check_exact(found: Sequence[LoadedState], layout: Layout, seed: int) -> None:
    """Every rank has what a rank of this layout would have saved, to the bit."""
    for rank, state in enumerate(found):
        expected = plain(state_of(rank, len(found), layout, seed))
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert same(state[key], value), f"{key} on rank {rank}"


def flip(path: Path, at: float = 0.5) -> None:
    """Flip a bit, at this part of the file."""
    data = bytearray(path.read_bytes())
    data[min(int(len(data) * at), len(data) - 1)] ^= 1
    path.write_bytes(data)


def one_error(errors: Sequence[BaseException | None], kind: type[gs.GiantstepError], *texts: str) -> gs.GiantstepError:
    """The error that all ranks raised alike; its message has all `texts`."""
    assert all(type(error) is kind for error in errors), errors
    first = errors[0]
    assert isinstance(first, kind)
    assert len({str(error) for error in errors}) == 1, errors
    for text in texts:
        assert text in str(first), str(first)
    return first
