"""What ranks do in tests of node-local checkpoints: save steps of a state that any number of ranks can load, and restore."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fleet import Seat
from torch.distributed import distributed_c10d as c10d

import giantstep as gs
from giantstep.group import notices, rendezvous, torch_group
from giantstep.group.torch_group import TorchGroup
from giantstep.protected_save import ProtectedWrite
from giantstep.tiers import messages, parity_rounds

ROWS, COLUMNS = 48, 4096


def whole(step: int) -> torch.Tensor:
    """The sharded tensor, as it is at a step."""
    made = torch.Generator().manual_seed(step)
    return torch.randint(-(1 << 62), 1 << 62, (ROWS, COLUMNS), generator=made)


def state_at(step: int, rank: int, size: int) -> dict[str, Any]:
    """One rank's state."""
    share = ROWS // size
    part = whole(step)[rank * share : (rank + 1) * share].clone() if step else torch.zeros(share, COLUMNS, dtype=torch.int64)
    return {
        "w": gs.ShardedTensor.from_rank_offsets("w", part, (0, rank, size)),
        "b": torch.full((100,), float(step)),
        "step": step,
    }


def tier_of(seat: Seat, timeout_secs: float = 60, **settings: Any) -> gs.LocalTier:
    """The tier of a rank's host."""
    return gs.LocalTier(
        seat.host.place,
        host=seat.host.name,
        save_options=gs.SaveOptions(timeout_secs=timeout_secs, block_bytes=16 << 10),
        load_options=gs.LoadOptions(timeout_secs=timeout_secs),
        **settings,
    )


def restored(seat: Seat, tier: gs.LocalTier) -> int:
    """Restore; return the step, or 0 if there is none. AssertionError if it is not exactly what was saved."""
    state = state_at(0, seat.rank, seat.size)
    found = tier.restore(state)
    if found is None:
        return 0
    wanted = state_at(found.step, seat.rank, seat.size)
    assert found.state["step"] == found.step
    assert torch.equal(found.state["w"], wanted["w"].data)
    assert torch.equal(found.state["b"], wanted["b"])
    return found.step


def restore_and_save(seat: Seat, steps: list[int], settings: dict[str, Any]) -> int:
    """A whole job: restore, and save some steps; return what was restored."""
    with tier_of(seat, **settings) as tier:
        at = restored(seat, tier)
        for step in steps:
            tier.save(step, state_at(step, seat.rank, seat.size), asynchronous=False)
    return at


# Where ranks stop, and how often they come by there before: "copy" and "gather" is before files are sent to other hosts in a
# save or load, "agree copy" and the like before all ranks agree in that phase, and DECIDED is on rank 0, when it has decided
# that a save is to be committed and nobody has heard of that.
Stop = tuple[str, int]
DECIDED = "decided"


@dataclass(frozen=True, slots=True)
class Stops:
    """Where ranks stop.

    Attributes:
        all_ranks: where all do, after which they have little patience with each other; None if they do not.
        one_rank: a rank, and where it stops, perhaps once more.
        patience_secs: after the stop of all.
    """

    all_ranks: Stop | None = None
    one_rank: tuple[int, Stop] | None = None
    patience_secs: float = 2.0

    def begin(self, seat: Seat) -> None:
        """From now on, stop."""
        seen: Counter[str] = Counter()
        impatient = False

        def come_by(here: str) -> None:
            nonlocal impatient
            if self.all_ranks == (here, seen[here]):
                seat.stop(here)
                impatient = True
            if self.one_rank == (seat.rank, (here, seen[here])):
                seat.stop(here)
            seen[here] += 1

        transfer, exchange, decide = TorchGroup.transfer, TorchGroup.exchange, ProtectedWrite._decide_commit

        def stopping_transfer(group: TorchGroup, sends: Any, receives: Any, phase: str, timeout_secs: float) -> None:
            come_by(phase)
            transfer(group, sends, receives, phase, self.patience_secs if impatient else timeout_secs)

        def stopping_exchange(group: TorchGroup, report: Any, answer: Any, phase: str, timeout_secs: float) -> Any:
            come_by(f"agree {phase}")
            return exchange(group, report, answer, phase, self.patience_secs if impatient else timeout_secs)

        def stopping_decide(write: ProtectedWrite, reports: Any) -> Any:
            answers = decide(write, reports)
            come_by(DECIDED)
            return answers

        TorchGroup.transfer, TorchGroup.exchange = stopping_transfer, stopping_exchange  # type: ignore[method-assign]
        ProtectedWrite._decide_commit = stopping_decide  # type: ignore[method-assign]


def meet_trouble(seat: Seat, settings: dict[str, Any], stops: Stops) -> str:
    """Save step 5, and then step 10 in the background, in which ranks stop.

    Returns the class of the error that came of that.
    """
    _hurry()
    with tier_of(seat, **settings) as tier:
        tier.save(5, state_at(5, seat.rank, seat.size), asynchronous=False)
        stops.begin(seat)
        pending = tier.save(10, state_at(10, seat.rank, seat.size))
        try:
            pending.result()
        except gs.GiantstepError as error:
            return type(error).__name__
        return "saved"


def save_until_saved(seat: Seat) -> list[str]:
    """Save steps in the same processes: the first while a link is cut, the others after that, until one is saved.

    Returns what came of each.
    """
    _hurry()
    ends: list[str] = []
    with tier_of(seat, timeout_secs=6) as tier:
        seat.stop("ready")
        while "saved" not in ends and len(ends) < 6:
            step = 10 + len(ends)
            try:
                tier.save(step, state_at(step, seat.rank, seat.size), asynchronous=False)
                ends.append("saved")
            except gs.GiantstepError as error:
                ends.append(type(error).__name__)
            if len(ends) == 1:
                seat.stop("failed")
    return ends


def meet_trouble_restoring(seat: Seat, settings: dict[str, Any], stops: Stops) -> str:
    """Restore; ranks stop on the way. Returns the class of the error that came of that."""
    _hurry()
    with tier_of(seat, **settings) as tier:
        stops.begin(seat)
        try:
            return str(restored(seat, tier))
        except gs.GiantstepError as error:
            return type(error).__name__


def _hurry() -> None:
    """Copy in several rounds, small as the state is; and give up soon whoever is cut off."""
    messages._IN_FLIGHT_BYTES = 64 << 10
    parity_rounds.piece_bytes_for = lambda _: 64 << 10
    notices._ANSWER_SECS = rendezvous._WITHDRAW_SECS = 1.0
    torch_group._EXTRA_SECS = 4.0


def meet_without_interface(seat: Seat) -> bytes:
    """Connect where gloo is not told by which interface; return what all ranks sent."""
    del os.environ["GLOO_SOCKET_IFNAME"]
    # In a namespace the host's name leads to no address of the host's but loopback, if to any.
    group = TorchGroup(dist.PrefixStore("meet", c10d._get_default_store()), seat.rank, seat.size)

    def join(told: Sequence[Any]) -> list[Any]:
        return [(b"".join(one[0] for one in told),)] * len(told)

    return bytes(group.exchange((str(seat.rank).encode(),), join, "meet", 10)[0])
