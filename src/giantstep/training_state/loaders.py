"""`LoaderState`: where each rank's data loader stands. Not here: samplers (`sampler`)."""

from __future__ import annotations

from typing import Any, Literal

from giantstep.errors import BadArgumentError
from giantstep.mapping.replica import ReplicaId
from giantstep.training_state.ranked import Position, RankedState, Reshard


class LoaderState(RankedState):
    """A data loader with `state_dict` and `load_state_dict`, such as torchdata's `StatefulDataLoader`, of this rank.

    Args:
        loader: its state is read by each save and given back by a load, before it is iterated again.
        grid, position, replica_id, process_group: see `RankedState`. Ranks that read the same samples share a position: of
            data-parallel ranks each has its own.
        on_reshard: when the checkpoint has another number of positions: `raise`, or a function, see `Reshard`, that makes the
            state of a loader of those of all. What a loader has read ahead belongs to its rank, so there is no rule that is
            right for all; `ResumableSampler` needs none.
    """

    def __init__(
        self,
        loader: Any,
        *,
        grid: int | Position | None = None,
        position: int | Position | None = None,
        replica_id: ReplicaId = 0,
        process_group: Any = None,
        on_reshard: Literal["raise"] | Reshard = "raise",
        on_missing: Literal["strict", "keep"] = "strict",
    ) -> None:
        for name in ("state_dict", "load_state_dict"):
            if not callable(getattr(loader, name, None)):
                raise BadArgumentError(
                    f"{type(loader).__name__} has no {name}: expected a loader such as torchdata's StatefulDataLoader; of "
                    "torch's own DataLoader save the sampler, for example a ResumableSampler"
                )
        super().__init__(
            loader.state_dict,
            loader.load_state_dict,
            grid=grid,
            position=position,
            replica_id=replica_id,
            process_group=process_group,
            on_reshard=on_reshard,
            on_missing=on_missing,
        )
