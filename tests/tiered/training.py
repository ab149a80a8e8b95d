"""What ranks do in tests of node-local checkpoints: save steps of a state that any number of ranks can load, and restore."""

from __future__ import annotations

from typing import Any

import torch
from fleet import Seat

import giantstep as gs
from giantstep.group.torch_group import TorchGroup
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


def tier_of(seat: Seat, timeout_secs: float = 30, **settings: Any) -> gs.LocalTier:
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


def copy_in_small_pieces() -> None:
    """So that copying takes several rounds. Called on all ranks."""
    messages._IN_FLIGHT_BYTES = 64 << 10
    parity_rounds.piece_bytes_for = lambda _: 64 << 10


def stop_while_copying(seat: Seat, number: int) -> None:
    """Stop in the next save before its nth round, counted from 0, of sending to other hosts and taking from them."""
    original = TorchGroup.transfer
    seen = 0

    def transfer(group: TorchGroup, sends: Any, receives: Any, phase: str, timeout_secs: float) -> None:
        nonlocal seen
        if phase == "copy":
            if seen == number:
                seat.stop("copying")
            seen += 1
        original(group, sends, receives, phase, timeout_secs)

    TorchGroup.transfer = transfer  # type: ignore[method-assign]
