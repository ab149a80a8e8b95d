"""`LocalTier`: steps in the hosts' own places, with copies on other hosts."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from giantstep.async_saving import async_save
from giantstep.errors import BadArgumentError, CorruptionError, GiantstepError, IncompleteError
from giantstep.format.record import Json
from giantstep.group.base import Parts, consult_parts
from giantstep.group.torch_group import group_of
from giantstep.loading import load
from giantstep.options import LoadOptions, SaveOptions, StrictHandling
from giantstep.pending import PendingSave
from giantstep.phases import same_call, settings, with_call
from giantstep.reports import LoadedState, SaveReport
from giantstep.saving import save
from giantstep.steps import step_name
from giantstep.storage.locate import StoreLike, store_at
from giantstep.tiered.pruning import Pruning
from giantstep.tiered.room import check_room
from giantstep.tiered.step_lists import HeldStep, StepList, common_steps, own_steps
from giantstep.tiered.tier_arguments import check_options, check_places, check_settings, standing_of
from giantstep.tiers.hosts import HostMap, Standing
from giantstep.tiers.node_store import NodeStore, Protection
from giantstep.tiers.parity_layout import ParityLayout

_LOG = logging.getLogger("giantstep")


@dataclass(frozen=True, slots=True)
class RestoredStep:
    """What was loaded.

    Attributes:
        step: that was loaded.
        state: see `giantstep.load`; its report says what was fetched from which hosts.
        tier: in words where from.
        skipped: newer steps that could not be loaded, newest first, each with the reason.
    """

    step: int
    state: LoadedState
    tier: str
    skipped: tuple[str, ...]


class LocalTier(AbstractContextManager["LocalTier"]):
    """Steps in a directory of each host's own, with copies on other hosts. Methods are collective unless they say otherwise.

        with gs.LocalTier("/dev/shm/run7", every=50, keep=2, replicas=1) as tier:
            restored = tier.restore(state)
            ...
                if tier.should_save(step):
                    tier.save(step, state)

    Each rank writes to its host's directory; what no rank of another failure domain holds anyway is sent to other hosts. After
    a loss any hosts, in any number and order, restore the newest step of which all files are left somewhere, under any layout.

    Args:
        path: a directory, URL or store; on every host its own.
        every: steps between those for which `should_save` is true; None: never.
        keep: how many steps stay, at least 1. While a step is saved there is one more.
        replicas: copies of all bytes in so many further failure domains; 0 for none.
        parity: (k, m) instead of copies: any m hosts of a group of k + m may be lost, for m / k of the bytes.
        run: name of the run; steps of others are neither loaded nor removed, nor replaced.
        host: name of this host; default: GIANTSTEP_HOST, SLURMD_NODENAME or the network name. In a `memory://` place, which
            ends with its process, each process is a host.
        domain: name of what fails together with this host, such as a rack; default: the host.
        circle: name of the hosts among which copies are placed; default: all are one circle.
        process_group: as for `giantstep.save`.
        asynchronous: whether `save` goes on in the background.
        save_options, load_options: of all saves and loads.

    Raises (the same on all ranks):
        BadArgumentError: a value that can never work, or there are fewer failure domains than copies need.
        DisagreementError: ranks give different arguments, or one host two places.
    """

    def __init__(
        self,
        path: StoreLike,
        *,
        every: int | None = None,
        keep: int = 2,
        replicas: int = 1,
        parity: tuple[int, int] | None = None,
        run: str = "",
        host: str | None = None,
        domain: str | None = None,
        circle: str = "",
        process_group: Any = None,
        asynchronous: bool = True,
        save_options: SaveOptions | None = None,
        load_options: LoadOptions | None = None,
    ) -> None:
        self.group = group_of(process_group)
        self._process_group, self._every, self._keep, self._asynchronous = process_group, every, keep, asynchronous
        self._save_options = save_options if isinstance(save_options, SaveOptions) else SaveOptions()
        self._load_options = load_options if isinstance(load_options, LoadOptions) else LoadOptions()
        self._pending: list[PendingSave] = []
        self._closed = False

        def begin() -> Parts:
            here = store_at(path)
            check_settings(every, keep, asynchronous)
            check_options(save_options, load_options)
            protection = Protection(0 if parity is not None else replicas, parity, run)
            standing = standing_of(here, host, domain, circle)
            self._root = NodeStore(here, "steps", standing, protection)
            call = {
                "call": "LocalTier",
                "every": every,
                "keep": keep,
                "replicas": replicas,
                "parity": parity,
                "run": run,
                "asynchronous": asynchronous,
                "save_options": settings(self._save_options),
                "load_options": settings(self._load_options),
            }
            location = here.location.encode("utf-8", "surrogatepass")
            return with_call(call, standing.encode(), own_steps(self._root).encode(), location)

        def decide(reports: Sequence[Parts]) -> list[Parts]:
            told = same_call(reports)
            hosts = HostMap.of([Standing.decode(report[0]) for report in told])
            hosts.check_copies(self._root.protection.replicas)
            check_places(hosts, [report[2].decode("utf-8", "surrogatepass") for report in told])
            if parity is not None:
                ParityLayout.of("", hosts, parity, [])
            found = common_steps([StepList.decode(report[1]) for report in told], run)
            leads = set(hosts.leads)
            return [(_next_generation(found), b"1" if rank in leads else b"") for rank in range(len(told))]

        self._next, lead = consult_parts(self.group, "manage", self._save_options.timeout_secs, begin, decide)
        self._begin_generation()
        self._pruning = Pruning(self._root, keep) if lead else None

    def _begin_generation(self) -> None:
        """As rank 0 has said last: what is saved from now on comes before all that hosts have."""
        self._root = replace(self._root, protection=replace(self._root.protection, generation=int(self._next)))

    # Saving.

    def should_save(self, step: int) -> bool:
        """Whether this step is to be saved. Not collective."""
        return self._every is not None and step % self._every == 0

    def place_of(self, step: int) -> NodeStore:
        """Where a step is saved and loaded: a `path` for `giantstep.save` and `giantstep.load`. Not collective."""
        return self._root.folder(step_name(step))

    def save(
        self,
        step: int,
        state_dict: dict[Any, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        content_metadata: Json = None,
        asynchronous: bool | None = None,
    ) -> SaveReport | PendingSave:
        """Save a step; one that is there already is replaced. Older steps beyond `keep` are removed in the background.

        Args and raises as `CheckpointManager.save`.

        Returns:
            The report; of an asynchronous save the handle.
        """
        self._check_open()
        arguments: dict[str, Any] = {
            "process_group": self._process_group,
            "options": self._save_options,
            "content_metadata": content_metadata,
            "metrics": metrics,
        }
        place = self.place_of(step)
        # Its files look like what a crashed save left until it is committed.
        self.hold(step)
        begun = False
        try:
            if self._asynchronous if asynchronous is None else asynchronous:
                pending = async_save(state_dict, place, **arguments)
                self._pending = [one for one in self._pending if not one.done()] + [pending]
                if self._pruning is not None:
                    self._pruning.after(pending, step)
                begun = True
                return pending
            report = save(state_dict, place, **arguments)
            begun = True
            return report
        finally:
            # After a failure there is nothing new that could take the place of older steps.
            if self._pruning is not None:
                self._pruning.release(step, look=begun)

    def check_space(self, state_dict: dict[Any, Any]) -> None:
        """Before training starts: raise unless every host has room for `keep` + 1 steps of states like this one.

        What lies in the place already counts as room, since it is replaced.

        Raises (the same on all ranks):
            StoreError: some host has not; says which, and how much is missing.
        """
        check_room(self.group, self._root, self._keep + 1, state_dict, self.timeout_secs)

    # Going on.

    def steps(self) -> list[int]:
        """Steps of this run of which some host has a commit record, the best first; they may not be complete."""
        return [one.step for one in self._all_steps()]

    def _all_steps(self) -> list[HeldStep]:
        def decide(reports: Sequence[Parts]) -> list[Parts]:
            found = common_steps([StepList.decode(report[0]) for report in reports], self._root.protection.run)
            return [(StepList(found).encode(), _next_generation(found))] * len(reports)

        secs = self._save_options.timeout_secs
        steps, self._next = consult_parts(self.group, "gather", secs, lambda: (own_steps(self._root).encode(),), decide)
        return StepList.decode(steps).entries

    def restore(
        self, state_dict: dict[Any, Any], step: int | None = None, *, strict: StrictHandling = StrictHandling.RAISE_ALL
    ) -> RestoredStep | None:
        """Load a step, on any hosts and number of ranks.

        Of each file the own copy is used, else another host's, else parity. If that does not suffice, an older step is
        loaded.

        Args:
            state_dict, strict: as for `giantstep.load`.
            step: which; None: the newest that is complete somewhere.

        Returns:
            What was loaded; None if no host has any step of this run.

        Raises (the same on all ranks):
            IncompleteError, CorruptionError: the step, or every step, is not all there; says what is missing where.
            Others: as `giantstep.load`.
        """
        self._check_open()
        self.settle()
        found = self._all_steps()
        chosen = [one for one in found if step is None or one.step == step]
        if step is not None and not chosen:
            raise self._none_of(f"step {step}", found)
        return self._restore(state_dict, chosen, strict, found)

    def rewind(
        self, state_dict: dict[Any, Any], *, before: int | None = None, strict: StrictHandling = StrictHandling.RAISE_ALL
    ) -> RestoredStep:
        """Go back to the newest step that loads, in the same job: when the loss has spiked, or a check has failed.

        Steps from `before` on stay until they are pruned, but come after all that is saved from now on: a job that starts
        again does not go on from them.

        Args:
            state_dict, strict: as for `giantstep.load`.
            before: only to steps before this one.

        Raises (the same on all ranks):
            IncompleteError: there is no such step, or none that is all there.
            Others: as `restore`.
        """
        self._check_open()
        self.settle()
        found = self._all_steps()
        chosen = [one for one in found if before is None or one.step < before]
        restored = self._restore(state_dict, chosen, strict, found)
        if restored is None:
            raise self._none_of("a step" if before is None else f"a step before {before}", found)
        return restored

    def _none_of(self, what: str, found: Sequence[HeldStep]) -> IncompleteError:
        known = ", ".join(str(one.step) for one in found[:20]) or "none"
        return IncompleteError(f"no host has {what} of the run {self._root.protection.run!r}; steps: {known}")

    def _restore(
        self, state_dict: dict[Any, Any], chosen: Sequence[HeldStep], strict: StrictHandling, found: Sequence[HeldStep]
    ) -> RestoredStep | None:
        options = self._load_options
        if not strict.raises_unexpected:
            options = replace(options, verify="before")
        skipped: list[str] = []
        failure: GiantstepError | None = None
        for one in chosen:
            try:
                state = load(
                    state_dict, self.place_of(one.step), strict=strict, process_group=self._process_group, options=options
                )
            except (IncompleteError, CorruptionError) as error:
                failure = failure or error
                skipped.append(f"step {one.step}: {error.message}")
                continue
            if skipped and self.group.rank == 0:
                _LOG.warning(
                    "step %d is restored from the hosts, since newer ones do not load: %s", one.step, "; ".join(skipped)
                )
            self._begin_generation()
            return RestoredStep(one.step, state, "hosts", tuple(skipped))
        if failure is not None:
            failure.__notes__ = [*getattr(failure, "__notes__", []), *skipped[1:]]
            raise failure
        return None

    def latest(self) -> int | None:
        """The step that `restore` tries first, or None."""
        return next(iter(self.steps()), None)

    # For `Tiers`, and the end.

    def go_on(self) -> None:
        """The run goes on from a step of another place: what is saved from now on comes before all that hosts have."""
        self._all_steps()
        self._begin_generation()

    @property
    def timeout_secs(self) -> float:
        """How long a rank may keep the others waiting."""
        return self._save_options.timeout_secs

    @property
    def root(self) -> NodeStore:
        """The places."""
        return self._root

    def hold(self, step: int) -> None:
        """Keep a step, on this rank's host, until `release`. Not collective."""
        if self._pruning is not None:
            self._pruning.hold(step)

    def release(self, step: int) -> None:
        """Undo one `hold`."""
        if self._pruning is not None:
            self._pruning.release(step)

    def settle(self) -> None:
        """Wait until saves and removals of this rank are through, without asking what became of them. Not collective."""
        for pending in self._pending:
            pending.wait()
        if self._pruning is not None:
            self._pruning.settle()

    def close(self) -> None:
        """Wait for saves and removals; nothing can be done afterwards. Not collective."""
        if not self._closed:
            self._closed = True
            for pending in self._pending:
                pending.wait()
            if self._pruning is not None:
                self._pruning.close()

    def _check_open(self) -> None:
        if self._closed:
            raise BadArgumentError("the tier is closed: make another one")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _next_generation(found: Sequence[HeldStep]) -> bytes:
    """After all those that hosts have; and, as far as clocks allow, after those of hosts that are away."""
    return str(max([time.time_ns() // 1_000_000, *(one.generation + 1 for one in found)])).encode("ascii")
