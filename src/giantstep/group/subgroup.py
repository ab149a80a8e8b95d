"""Which ranks a group has that a caller names. Called by `writers`, `loading` and `planned_save`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from giantstep.errors import BadArgumentError


def ranks_within(chosen: Any, process_group: Any, rank: int, size: int, what: str) -> tuple[int, ...]:
    """The ranks of `chosen`, numbered as in the group of the call, ascending.

    Args:
        chosen: a `torch.distributed.ProcessGroup`, or a sequence of ranks of the group of the call.
        process_group: what the caller gave as group of the call; None for the default group.
        rank, size: of the caller in the group of the call.
        what: names `chosen` in errors.

    Raises:
        BadArgumentError: it is neither, has ranks from outside the group of the call, or lacks the caller.
    """
    if isinstance(chosen, dist.ProcessGroup):
        whole = process_group if isinstance(process_group, dist.ProcessGroup) else dist.group.WORLD
        numbers = {name: number for number, name in enumerate(dist.get_process_group_ranks(whole))}
        ranks = [numbers.get(name, -1) for name in dist.get_process_group_ranks(chosen)]
    elif isinstance(chosen, Sequence) and all(type(member) is int for member in chosen):
        ranks = list(chosen)
    else:
        raise BadArgumentError(f"{what} must be a torch.distributed.ProcessGroup or a sequence of ranks, not {chosen!r}")
    if rank not in ranks or len(set(ranks)) < len(ranks) or not all(0 <= member < size for member in ranks):
        raise BadArgumentError(
            f"{what} has the ranks {ranks[:20]} (-1: not in the group of the call): expected different ranks of the {size} "
            f"that make this call, rank {rank} among them. Each rank gives the group that it is in itself."
        )
    return tuple(sorted(ranks))


def name_of(process_group: Any) -> str:
    """A name of a caller's process group that is the same in later runs: its ranks in the default group."""
    if not isinstance(process_group, dist.ProcessGroup):
        return ""
    return ",".join(map(str, dist.get_process_group_ranks(process_group)))
