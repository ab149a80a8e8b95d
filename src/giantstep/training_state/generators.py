"""Reading, setting and seeding random generators of all kinds. Called by `random_state` and `loaders`.

Not here: whether a stored state can be set (`generator_checks`).
"""

from __future__ import annotations

import hashlib
import random
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from giantstep.errors import BadArgumentError
from giantstep.mapping.torch_kinds import CPU_STATE, CPU_WORDS

PYTHON, NUMPY, TORCH, CUDA = "python", "numpy", "torch", "cuda"
STREAMS = (PYTHON, NUMPY, TORCH, CUDA)
_SEEDS = 1 << 63


@dataclass(frozen=True, slots=True)
class Beginning:
    """From what new streams begin: one per position and name, all different.

    Attributes:
        root: the same for all positions.
        number: of the position.
    """

    root: bytes
    number: int

    def words(self, name: str, count: int) -> list[int]:
        """Words of 32 bits."""
        data = hashlib.shake_256(b"%d %s %s" % (self.number, self.root, name.encode())).digest(4 * count)
        return list(struct.unpack(f"<{count}I", data))

    def seed(self, name: str) -> int:
        """63 bits; of one name, numbers of positions that differ give seeds that differ."""
        base = int.from_bytes(hashlib.sha256(self.root + name.encode()).digest(), "little")
        return (base + self.number) % _SEEDS


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


def seed(generator: Any, beginning: Beginning, name: str) -> None:
    """Begin a new stream."""
    if isinstance(generator, random.Random):
        generator.seed(_number(beginning, name))
    elif isinstance(generator, np.random.Generator):
        fresh: Any = type(generator.bit_generator)
        generator.bit_generator.state = fresh(_number(beginning, name)).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed(beginning.words(name, 8))
    elif generator.device.type == "cpu":
        _seed_cpu(generator, beginning, name)
    else:
        generator.manual_seed(beginning.seed(name))


def _number(beginning: Beginning, name: str) -> int:
    """256 bits."""
    return sum(word << 32 * place for place, word in enumerate(beginning.words(name, 8)))


def _seed_cpu(generator: torch.Generator, beginning: Beginning, name: str) -> None:
    """Fill the whole table: of what `manual_seed` is given, this generator uses 32 bits."""
    generator.manual_seed(beginning.seed(name))
    state = generator.get_state()
    data = bytearray(state.numpy().tobytes())
    words = beginning.words(name, CPU_WORDS)
    # Invariant: two positions differ in this word, and so in their streams.
    words[1] = beginning.number % (1 << 32)
    # The highest bit of the first word is one of those that count; a table without any gives nothing but zeros.
    words[0] |= 1 << 31
    struct.pack_into(f"<{CPU_WORDS}Q", data, CPU_STATE.size, *words)
    generator.set_state(torch.frombuffer(data, dtype=torch.uint8))


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


def seed_stream(name: str, beginning: Beginning) -> bool:
    """Begin a new stream; False if the machine has no such stream."""
    if name == PYTHON:
        random.seed(_number(beginning, name))
    elif name == NUMPY:
        np.random.seed(beginning.words(name, 8))
    elif name == TORCH:
        # Not torch.manual_seed, which seeds all devices.
        _seed_cpu(torch.default_generator, beginning, name)
    elif not torch.cuda.is_available():
        return False
    else:
        torch.cuda.manual_seed(beginning.seed(name))
    return True
