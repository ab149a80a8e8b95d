"""State of a training job beside model and optimizer: random generators, data loaders, extra states of modules.

All of them are leaves of a state dict, one value per rank or position, with a policy for another number of ranks. What is the
same on all ranks (step counters, schedules, gradient scalers) needs none of this. See `docs/training.md`.
"""

from __future__ import annotations

from giantstep.training_state.extra import extra_states, largest, plain_extra_states
from giantstep.training_state.loaders import LoaderState
from giantstep.training_state.random_state import RandomState
from giantstep.training_state.ranked import RankedState
from giantstep.training_state.replayed import ReplayedSampler
from giantstep.training_state.sampler import ResumableSampler

__all__ = [
    "LoaderState",
    "RandomState",
    "RankedState",
    "ReplayedSampler",
    "ResumableSampler",
    "extra_states",
    "largest",
    "plain_extra_states",
]
