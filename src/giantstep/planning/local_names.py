"""A hint for errors: is a key perhaps a name that counts from 0 on every pipeline stage, or on every expert-parallel rank?

Nothing is decided by it. Called where ranks give one key several meanings.
"""

from __future__ import annotations


def local_name_hint(key: str) -> str:
    """A sentence to add to an error; empty where no step of the key is a number."""
    numbers = [step for step in key.split(".") if step.isascii() and step.isdigit()]
    if not numbers:
        return ""
    return (
        f" Its key has the number {numbers[0]}: if pipeline stages count their layers from 0, or ranks their experts, such "
        "stage-local names mean another tensor on each. Name layers by their global index (giantstep.pipeline.globalise), and "
        "experts with giantstep.experts."
    )
