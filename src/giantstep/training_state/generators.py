"""Reading, setting and seeding random generators of all kinds. Called by `random_state`."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from giantstep.errors import BadArgumentError, CorruptionError
from giantstep.format.kinds_random import GAUSS, KNOWN_BITS, checked_state
from giantstep.mapping.torch_kinds import CPU_STATE, CPU_STATE_BYTES, CPU_WORDS, check_cpu_state

PYTHON, NUMPY, TORCH, CUDA = "python", "numpy", "torch", "cuda"
STREAMS = (PYTHON, NUMPY, TORCH, CUDA)
_LARGEST_SEED = (1 << 63) - 1


def state_of(generator: Any) -> Any:
    """The state of a generator, or of an object that keeps several (`get_states`)."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    for name in ("get_states", "get_state"):
        if hasattr(generator, name):
            return getattr(generator, name)()
    raise BadArgumentError(
        f"{type(generator).__name__} is no random generator: expected one of random, NumPy or torch, or an object with "
        "get_state and set_state, or get_states and set_states"
    )


def check_state(generator: Any, state: Any, name: str) -> None:
    """Raise `CorruptionError` if a stored state is none of this generator's: some of those break generators that take them.

    Of an object that keeps several the states are its own to check.
    """
    if isinstance(generator, random.Random):
        with _naming(name):
            random.Random().setstate(state)  # noqa: S311 - no secret
            # The next number of a normal distribution, which Python takes as it is.
            if not isinstance(state[2], float | None):
                raise TypeError(f"{state[2]!r:.40} is no number")
    elif isinstance(generator, np.random.Generator):
        kind = type(generator.bit_generator).__name__
        # Bits of the user's own check their states themselves.
        if kind in KNOWN_BITS:
            with _naming(name):
                checked_state(kind, state, {})
    elif isinstance(generator, np.random.RandomState):
        _check_legacy(state, name)
    elif isinstance(generator, torch.Generator):
        _check_torch(state, generator.device.type, name)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, OverflowError, LookupError, RuntimeError) as error:
        raise CorruptionError(
            f"the stored state of random generator {name!r} is none of such a generator: {error}. Load another step, or leave "
            "it out with streams= or generators="
        ) from error


def _check_legacy(state: Any, name: str) -> None:
    with _naming(name):
        if not isinstance(state, dict):
            raise TypeError("expected a dict")
        if state.get("bit_generator") in KNOWN_BITS:
            checked_state(state["bit_generator"], state, GAUSS)


def _check_torch(state: Any, device: str, name: str) -> None:
    with _naming(name):
        if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
            raise ValueError("expected a tensor of bytes")
        if device == "cpu":
            check_cpu_state(state)
        else:
            torch.Generator(device).set_state(state)


def set_state(generator: Any, state: Any) -> None:
    """The inverse of `state_of`; of a state that `check_state` has seen."""
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
        _seed_torch(generator, number)


def _words(number: int) -> list[int]:
    return [number >> shift & 0xFFFFFFFF for shift in range(0, 256, 32)]


def _seed_torch(generator: torch.Generator, number: int) -> None:
    generator.manual_seed(number & _LARGEST_SEED)
    if generator.device.type == "cpu":
        # Of a seed this one takes 32 bits, of which thousands of ranks would share some. Its state takes all that there are.
        words = np.frombuffer(hashlib.shake_256(number.to_bytes(32, "little")).digest(4 * CPU_WORDS), dtype="<u4")
        state = CPU_STATE.pack(number & _LARGEST_SEED, 1, 1, 0) + words.astype("<u8").tobytes()
        generator.set_state(torch.frombuffer(bytearray(state.ljust(CPU_STATE_BYTES, b"\0")), dtype=torch.uint8))


def state_of_stream(name: str) -> Any:
    """The state of one of the process's own streams; None if the machine has none."""
    if name == PYTHON:
        return random.getstate()
    if name == NUMPY:
        return np.random.get_state(legacy=False)
    if name == TORCH:
        return torch.get_rng_state()
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def has_stream(name: str) -> bool:
    """Whether the machine has this stream."""
    return name != CUDA or torch.cuda.is_available()


def check_stream(name: str, state: Any) -> None:
    """As `check_state`, of a stream that the machine has."""
    if name == PYTHON:
        check_state(random.Random(), state, name)  # noqa: S311 - no secret
    elif name == NUMPY:
        _check_legacy(state, name)
    else:
        _check_torch(state, "cpu" if name == TORCH else "cuda", name)


def set_stream(name: str, state: Any) -> None:
    """The inverse of `state_of_stream`; of a state that `check_stream` has seen."""
    if name == PYTHON:
        random.setstate(state)
    elif name == NUMPY:
        np.random.set_state(state)
    elif name == TORCH:
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state)


def seed_stream(name: str, number: int) -> bool:
    """Begin a new stream; False if the machine has no such stream."""
    if name == PYTHON:
        random.seed(number)
    elif name == NUMPY:
        np.random.seed(_words(number))
    elif name == TORCH:
        # Not torch.manual_seed, which seeds all devices.
        _seed_torch(torch.default_generator, number)
    elif not torch.cuda.is_available():
        return False
    else:
        torch.cuda.manual_seed(number & _LARGEST_SEED)
    return True
