"""`giantstep.pipeline`: which pipeline rank holds which layers, names of layers by global index, a stage's state described.

For users, on every rank of a pipeline. Layouts and names need no torch; `describe_stage`, which does, is imported when it is
first used. Not here: how stages compute.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from giantstep.pipeline.layout import PipelineLayout
from giantstep.pipeline.names import check_names, globalise, localise

if TYPE_CHECKING:
    from giantstep.pipeline.stage_state import ModelNames, describe_stage

__all__ = ["ModelNames", "PipelineLayout", "check_names", "describe_stage", "globalise", "localise"]


def __getattr__(name: str) -> Any:
    if name not in ("ModelNames", "describe_stage"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("giantstep.pipeline.stage_state"), name)
