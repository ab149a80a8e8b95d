"""`ResumableSampler`: samples divided over ranks, from where training stood, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from giantstep.errors import BadArgumentError, MismatchError


class ResumableSampler(Sampler[int]):
    """A sampler for map-style data whose state is how many samples all ranks together have used of the epoch.

    The order of an epoch follows from the seed and the number of the epoch alone. Ranks take turns in it, so that a batch of
    all ranks is the next stretch of the order, whatever their number. What a loader has read ahead does not count: the job
    says with `advance` what it has used.

    As a leaf of a state dict it is common state, the same on all ranks. After a load, make a new iterator.

    Args:
        size: number of samples of the data.
        rank, ranks: this rank among those that divide the samples.
        shuffle: in another order in every epoch; else in the order of the data.
        seed: of the order; the same on all ranks.

    Attributes:
        epoch: number of the epoch, from 0.
        used: samples of the epoch that all ranks together have used.
    """

    def __init__(self, size: int, rank: int, ranks: int, *, shuffle: bool = True, seed: int = 0) -> None:
        if type(size) is not int or size < 1 or type(ranks) is not int or not 0 <= rank < ranks:
            raise BadArgumentError(f"ResumableSampler: size {size!r} must be at least 1, and rank {rank!r} one of {ranks!r}")
        self._size, self._rank, self._ranks = size, rank, ranks
        self._shuffle, self._seed = shuffle, seed
        self.epoch = self.used = 0

    def __iter__(self) -> Iterator[int]:
        """This rank's samples of what is left of the epoch.

        All ranks get equally many: fewer than `ranks` samples at the very end of an epoch are left out.
        """
        order = list(range(self._size))
        if self._shuffle:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + self.epoch) % (1 << 63))
            order = torch.randperm(self._size, generator=generator).tolist()
        left = order[self.used :]
        return iter(left[self._rank : len(left) - len(left) % self._ranks : self._ranks])

    def __len__(self) -> int:
        return (self._size - self.used) // self._ranks

    def advance(self, samples: int) -> None:
        """All ranks together have used so many samples more: after every step, the size of the global batch."""
        if type(samples) is not int or samples < 0 or self.used + samples > self._size:
            raise BadArgumentError(
                f"advance({samples!r}): {self.used} of the {self._size} samples of epoch {self.epoch} are used already"
            )
        self.used += samples

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, unless training is in it already, as after a load."""
        if epoch != self.epoch:
            self.epoch, self.used = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Equal on all ranks."""
        return {"epoch": self.epoch, "used": self.used, "size": self._size, "seed": self._seed, "shuffle": self._shuffle}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was saved, by any number of ranks.

        Raises:
            MismatchError: it is of other data, another seed or another kind of order.
        """
        for name, here in (("size", self._size), ("seed", self._seed), ("shuffle", self._shuffle)):
            if state[name] != here:
                raise MismatchError(
                    f"the stored sampler has {name}={state[name]!r}, this one {here!r}: the samples that are left differ"
                )
        self.epoch, self.used = state["epoch"], state["used"]
