"""Jobs with tiers, as tests begin them: hosts as directories or in memory, ranks as threads."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import giantstep as gs
from giantstep.steps import scan_steps
from giantstep.storage.base import Store
from giantstep.storage.local import LocalStore
from giantstep.testing.ranks import run_ranks, run_ranks_collecting
from tiers.clusters import LOADING, SAVING, Layout, check_exact, state_of

Result = TypeVar("Result")
LAYOUT = Layout(2)


@dataclass
class Job:
    """Ranks on hosts.

    Attributes:
        root: of all directories: those of hosts by name, and "durable".
        names: [ranks] host of each.
        settings: of the local tier.
        stores: by host, another place than a directory.
    """

    root: Path
    names: Sequence[str] = ("a", "a", "b", "c")
    settings: dict[str, Any] = field(default_factory=dict)
    stores: dict[str, Store] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.names)

    def tier(self, group: Any, **changes: Any) -> gs.LocalTier:
        name = self.names[group.rank]
        settings = {"every": 5, "keep": 2, "save_options": SAVING, "load_options": LOADING, **self.settings, **changes}
        path = self.stores.get(name) or LocalStore(self.root / name)
        return gs.LocalTier(path, host=name, process_group=group, **settings)

    def tiers(self, group: Any, durable_every: int = 20, **changes: Any) -> gs.Tiers:
        durable = gs.CheckpointManager(
            self.root / "durable", save_when=durable_every, keep=3, process_group=group, save_options=SAVING
        )
        return gs.Tiers([self.tier(group, **changes), durable])

    def run(self, work: Callable[[Any], Result]) -> list[Result]:
        return run_ranks(self.size, work)

    def errors(self, work: Callable[[Any], Any]) -> list[BaseException | None]:
        return run_ranks_collecting(self.size, work)[1]

    def save(self, *steps: int, **changes: Any) -> None:
        """Save steps with a tier that is made and closed; what a step holds is drawn with its number."""

        def work(group: Any) -> None:
            with self.tier(group, **changes) as tier:
                for step in steps:
                    tier.save(step, state_of(group.rank, self.size, LAYOUT, step), asynchronous=False)

        self.run(work)

    def go_on(self, *steps: int) -> int:
        """Restore, then save steps, each as far beyond the restored one as it says; return the restored one."""

        def work(group: Any) -> int:
            with self.tier(group) as tier:
                found = tier.restore(state_of(group.rank, self.size, LAYOUT, None))
                assert found is not None
                for step in steps:
                    tier.save(step, state_of(group.rank, self.size, LAYOUT, step), asynchronous=False)
                return found.step

        return self.run(work)[0]

    def restore(self, step: int | None = None, layout: Layout = LAYOUT) -> Any:
        """Restore with a tier, and see that all ranks have all bits of the step; return rank 0's."""

        def work(group: Any) -> Any:
            with self.tier(group) as tier:
                return tier.restore(state_of(group.rank, self.size, layout, None), step)

        found = self.run(work)
        return checked(found, layout)

    def lose(self, *names: str) -> None:
        for name in names:
            shutil.rmtree(self.root / name, ignore_errors=True)

    def steps_of(self, name: str) -> list[str]:
        path = self.root / name
        return sorted(found.name for found in path.iterdir()) if path.exists() else []


def checked(found: Sequence[Any], layout: Layout = LAYOUT) -> Any:
    """See that what all ranks have restored is one step, to the bit."""
    if found[0] is None:
        assert list(found) == [None] * len(found)
        return None
    assert len({(one.step, one.tier, one.skipped) for one in found}) == 1
    check_exact([one.state for one in found], layout, found[0].step)
    return found[0]


def names_of(*steps: int) -> list[str]:
    return [f"step_{step:08d}" for step in steps]


def durable_steps(job: Job) -> list[int]:
    return [entry.step for entry in scan_steps(LocalStore(job.root / "durable"))]
