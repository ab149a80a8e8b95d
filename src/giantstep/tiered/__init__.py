"""Steps in the hosts' own places, and in several tiers."""

from giantstep.tiered.local_tier import LocalTier, RestoredStep
from giantstep.tiered.tiers import Tiers

__all__ = ["LocalTier", "RestoredStep", "Tiers"]
