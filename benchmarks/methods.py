"""Ways to save and load, behind one interface: raw calls, giantstep, torch.distributed.checkpoint. Others: `peers.py`.

Used by `rank.py`, which says what each of them is given and when.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch.distributed as dist
from measure import Started
from raw_io import read_file, write_file
from states import Memory, Share, whole_pages
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as load_with_dcp
from torch.distributed.checkpoint.state_dict_saver import async_save as async_save_with_dcp
from torch.distributed.checkpoint.state_dict_saver import save as save_with_dcp
from torch.distributed.device_mesh import DeviceMesh

import giantstep as gs

GIANTSTEP, KEPT, STAGED_LATER, DCP, RAW = "giantstep", "giantstep, plans kept", "giantstep, staged later", "dcp", "raw"


class Part:
    """What a rank holds in one layout over a mesh of ranks: memory, and two views of it for those who save and load.

    Attributes:
        memory: one part after another, in whole pages.
        state: a state dict of DTensors over it.
        plain: the same parts as tensors that know nothing of other ranks.
        rank: number of this rank in the mesh.
        group: the ranks of the mesh.
    """

    def __init__(self, memory: Memory, share: Share, mesh: DeviceMesh) -> None:
        self.memory = memory[: whole_pages(share.bytes)]
        self.state = share.sharded(self.memory, mesh)
        self.plain = share.plain(self.memory)
        self.rank: int = mesh.get_local_rank()
        self.group: dist.ProcessGroup = mesh.get_group()
        self._share = share

    def check(self, what: str, expected: Memory | None) -> None:
        """Raise unless the memory holds the right values, which are `expected` if given; then forget them."""
        wrong = [] if expected is not None and np.array_equal(self.memory, expected) else self._share.wrong_tensors(self.memory)
        if wrong:
            raise ValueError(f"{what}: {len(wrong)} tensors have wrong values, tensor {wrong[0]} among them")
        self.memory[:] = 0


class Method(Protocol):
    """One way to save and load. Everything is durable when `save` and `Started.wait_committed` return.

    Attributes:
        name: for tables.
        asynchronous: whether `start` can be called.
        blocking: whether its blocking saves, and its loads, are of interest.
        reshards: whether it can load into another layout than was saved.
        cached: whether its loads go through the page cache, so that a warm load differs from a cold one.
        primed: whether it is to save and load once before anything is measured.
    """

    name: str
    asynchronous: bool
    blocking: bool
    reshards: bool
    cached: bool
    primed: bool

    def save(self, part: Part, place: Path) -> Any:
        """Save to a path that is free. Returns a report, if there is one."""

    def load(self, part: Part, place: Path) -> Any:
        """Fill the memory of the part."""

    def start(self, part: Part, place: Path) -> Started:
        """Save asynchronously to a path that is free."""

    def close(self) -> None:
        """Nothing is asked for any more."""


class Plain:
    """What most methods have in common."""

    asynchronous = False
    blocking = True
    reshards = False
    cached = True
    primed = False

    def start(self, part: Part, place: Path) -> Started:
        raise NotImplementedError(f"{type(self).__name__} has no asynchronous save of {part.rank} to {place}")

    def close(self) -> None:
        pass


class Raw(Plain):
    """System calls: one file per rank."""

    def __init__(self, *, direct: bool) -> None:
        self._direct = direct
        self.name = f"{RAW} direct" if direct else f"{RAW} buffered"
        self.cached = not direct

    def save(self, part: Part, place: Path) -> Any:
        write_file(_file_of(part, place), part.memory, direct=self._direct)

    def load(self, part: Part, place: Path) -> Any:
        read_file(_file_of(part, place), part.memory, direct=self._direct)


def _file_of(part: Part, place: Path) -> Path:
    return place.with_name(f"{place.name}-{part.rank}.raw")


@dataclass(frozen=True, slots=True)
class Waits:
    """A started save, as two functions."""

    staged: Callable[[], Any]
    committed: Callable[[], Any]

    def wait_staged(self) -> None:
        self.staged()

    def wait_committed(self) -> Any:
        return self.committed()


class Giantstep(Plain):
    """This library: as it is without options, or with plans kept from save to save and from load to load.

    Args:
        keeps_plans: see there.
        stages_later: asynchronous saves, too, copy in the background, which the training loop must wait for.
    """

    def __init__(self, *, keeps_plans: bool = False, stages_later: bool = False) -> None:
        cache = gs.PlanCache() if keeps_plans else None
        self.name = STAGED_LATER if stages_later else KEPT if keeps_plans else GIANTSTEP
        self.primed = keeps_plans
        # The first load into a layout finds no plan for it, so that there would be nothing new to see.
        self.reshards = not keeps_plans
        self.asynchronous = True
        # They are those of the method that keeps plans.
        self.blocking = not stages_later
        staging: Literal["auto", "background"] = "background" if stages_later else "auto"
        self._save_options = gs.SaveOptions(plan_cache=cache, staging=staging)
        self._load_options = gs.LoadOptions(plan_cache=cache)

    def save(self, part: Part, place: Path) -> Any:
        return gs.save(part.state, place, process_group=part.group, options=self._save_options)

    def load(self, part: Part, place: Path) -> Any:
        return gs.load(part.state, place, process_group=part.group, options=self._load_options).report

    def start(self, part: Part, place: Path) -> Started:
        pending = gs.async_save(part.state, place, process_group=part.group, options=self._save_options)
        return Waits(pending.wait_staged, pending.result)


class Dcp(Plain):
    """torch.distributed.checkpoint. Its stager, which reuses memory, is kept from save to save."""

    name = DCP
    asynchronous = True
    reshards = True

    def __init__(self) -> None:
        self._stager = DefaultStager(StagingOptions(False, False, False, False))

    def save(self, part: Part, place: Path) -> Any:
        save_with_dcp(part.state, checkpoint_id=place, process_group=part.group)

    def load(self, part: Part, place: Path) -> Any:
        load_with_dcp(part.state, checkpoint_id=place, process_group=part.group)

    def start(self, part: Part, place: Path) -> Started:
        group, stager = part.group, self._stager
        future: Any = async_save_with_dcp(part.state, checkpoint_id=place, process_group=group, async_stager=stager)
        # Without a staging thread of its own, the call is back when everything is staged.
        return Waits(lambda: None, future.result)

    def close(self) -> None:
        self._stager.close()


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None
