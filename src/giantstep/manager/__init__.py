"""`CheckpointManager`: steps under a root; policies that say when to save and what to keep; what it measures."""

from __future__ import annotations

from giantstep.manager.choosing import Skipped
from giantstep.manager.manager import CheckpointManager
from giantstep.manager.metrics import (
    DeleteRecord,
    LoadRecord,
    ManagerCallback,
    SaveRecord,
    opentelemetry,
    tensorboard,
)
from giantstep.manager.policies import EverySecs, EverySteps, ForFailures, Keep, SaveWhen, best_interval_secs, goodput
from giantstep.manager.restores import Restored
from giantstep.manager.timing import Expectation

__all__ = [
    "CheckpointManager",
    "DeleteRecord",
    "EverySecs",
    "EverySteps",
    "Expectation",
    "ForFailures",
    "Keep",
    "LoadRecord",
    "ManagerCallback",
    "Restored",
    "SaveRecord",
    "SaveWhen",
    "Skipped",
    "best_interval_secs",
    "goodput",
    "opentelemetry",
    "tensorboard",
]
