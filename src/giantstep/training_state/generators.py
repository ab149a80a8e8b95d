"""Reading, setting and seeding random generators of all kinds. Called by `random_state`."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from giantstep.errors import BadArgumentError

PYTHON, NUMPY, TORCH, CUDA = "python", "numpy", "torch", "cuda"
STREAMS = (PYTHON, NUMPY, TORCH, CUDA)
_LARGEST_SEED = (1 << 63) - 1


def state_of(generator: Any) -> Any:
    """The state of a generator, or of an object that keeps several (`get_states`)."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    for name in ("get_states", "get_state"):
        if hasattr(generator, name):
            return getattr(generator, name)()
    raise BadArgumentError(
        f"{type(generator).__name__} is no random generator: expected one of random, NumPy or torch, or an object with "
        "get_state and set_state, or get_states and set_states"
    )


def set_state(generator: Any, state: Any) -> None:
    """The inverse of `state_of`."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif hasattr(generator, "set_states"):
        generator.set_states(state)
    else:
        generator.set_state(state)


def can_be_seeded(generator: Any) -> bool:
    """Whether `seed` knows how."""
    return isinstance(generator, random.Random | np.random.Generator | np.random.RandomState | torch.Generator)


def seed(generator: Any, number: int) -> None:
    """Begin a new stream; `number` has 256 bits."""
    if isinstance(generator, random.Random):
        generator.seed(number)
    elif isinstance(generator, np.random.Generator):
        fresh: Any = type(generator.bit_generator)
        generator.bit_generator.state = fresh(number).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed(_words(number))
    else:
        generator.manual_seed(number & _LARGEST_SEED)


def _words(number: int) -> list[int]:
    return [number >> shift & 0xFFFFFFFF for shift in range(0, 256, 32)]


def state_of_stream(name: str) -> Any:
    """The state of one of the process's own streams; None if the machine has none."""
    if name == PYTHON:
        return random.getstate()
    if name == NUMPY:
        return np.random.get_state()
    if name == TORCH:
        return torch.get_rng_state()
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_stream(name: str, state: Any) -> bool:
    """The inverse; False if the machine has no such stream."""
    if name == PYTHON:
        random.setstate(state)
    elif name == NUMPY:
        np.random.set_state(state)
    elif name == TORCH:
        torch.set_rng_state(state)
    elif not torch.cuda.is_available():
        return False
    else:
        torch.cuda.set_rng_state(state)
    return True


def seed_stream(name: str, number: int) -> bool:
    """Begin a new stream; False if the machine has no such stream."""
    if name == PYTHON:
        random.seed(number)
    elif name == NUMPY:
        np.random.seed(_words(number))
    elif name == TORCH:
        # Not torch.manual_seed, which seeds all devices.
        torch.default_generator.manual_seed(number & _LARGEST_SEED)
    elif not torch.cuda.is_available():
        return False
    else:
        torch.cuda.manual_seed(number & _LARGEST_SEED)
    return True
