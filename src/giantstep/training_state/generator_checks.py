"""Whether a stored state of a random generator can be set, before it is: some that cannot would be taken, and read past tables.

The rules of states are the object codec's (`format.kinds_random`, `mapping.torch_kinds`). Called by `random_state` and
`loaders`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from giantstep.errors import CorruptionError, MismatchError
from giantstep.format.kinds_random import BIT_GENERATORS, GAUSS, checked_state
from giantstep.format.payload import int_of
from giantstep.mapping.torch_kinds import CPU_STATE, CPU_WORDS, check_cpu_state
from giantstep.training_state.generators import NUMPY, PYTHON, TORCH, set_state, set_stream

_PYTHON_VERSION, _PYTHON_WORDS = 3, 624


def check_state(generator: Any, state: Any, name: str) -> None:
    """Raise if the state is none of this generator; objects with `set_state` of their own look at theirs themselves.

    Raises:
        MismatchError: it is of another kind of generator.
        CorruptionError: it is of this kind, but none that such a generator can have.
    """
    try:
        if type(generator) is random.Random:
            _check_python(state)
        elif isinstance(generator, np.random.Generator):
            _check_numpy(generator.bit_generator, state, {})
        elif isinstance(generator, np.random.RandomState):
            _check_legacy(generator.get_state(legacy=False)["bit_generator"], state)
        elif isinstance(generator, torch.Generator):
            _check_torch(state, cpu=generator.device.type == "cpu")
    except (ValueError, TypeError, IndexError) as error:
        raise _unfit(name, error) from error


def check_stream(stream: str, state: Any) -> None:
    """As `check_state`, for one of the process's own streams."""
    try:
        if stream == PYTHON:
            _check_python(state)
        elif stream == NUMPY:
            _check_legacy("MT19937", state)
        else:
            _check_torch(state, cpu=stream == TORCH)
    except (ValueError, TypeError, IndexError) as error:
        raise _unfit(stream, error) from error


def set_checked(generator: Any, state: Any, name: str) -> None:
    """Set a state that `check_state` has passed.

    Raises:
        CorruptionError: torch refuses it all the same, as it may those of devices.
    """
    if not isinstance(generator, torch.Generator):
        set_state(generator, state)
        return
    try:
        set_state(generator, state)
    except RuntimeError as error:
        raise _unfit(name, error) from error


def set_checked_stream(stream: str, state: Any) -> bool:
    """As `set_checked`; False if the machine has no such stream."""
    try:
        return set_stream(stream, state)
    except RuntimeError as error:
        raise _unfit(stream, error) from error


def _unfit(name: str, error: Exception) -> CorruptionError:
    return CorruptionError(
        f"the stored state of the random generator {name!r} cannot be one: {error!s:.300}. Load another checkpoint, or leave "
        "this generator out of the state"
    )


def _of_kind(state: Any, fits: bool, expected: str) -> None:
    if not fits:
        raise MismatchError(
            f"expected the stored state of {expected}, found a {type(state).__name__}: {state!r:.60}. Load into generators of "
            "the kinds that were saved"
        )


def _check_table(words: Sequence[int]) -> None:
    """Refuse a table of the Mersenne Twister whose bits that count are all 0."""
    if not words[0] >> 31 and not any(words[1:]):
        raise ValueError("a table of zeros, which gives nothing but zeros")


def _check_python(state: Any) -> None:
    _of_kind(state, type(state) is tuple and len(state) == 3, "a generator of random")
    version, table, gauss = state
    if version != _PYTHON_VERSION or type(table) is not tuple or len(table) != _PYTHON_WORDS + 1:
        raise ValueError(f"expected version {_PYTHON_VERSION} and {_PYTHON_WORDS + 1} numbers")
    words = [int_of(word, 0, 2**32 - 1) for word in table[:-1]]
    int_of(table[-1], 0, _PYTHON_WORDS)
    if gauss is not None and type(gauss) is not float:
        raise ValueError("expected a float, or None, as the next normal number")
    _check_table(words)


def _check_numpy(bits: Any, state: Any, more: dict[str, Any]) -> None:
    found = state.get("bit_generator") if type(state) is dict else None
    _of_kind(state, found == type(bits).__name__, f"NumPy's {type(bits).__name__}")
    # A class derived from one of NumPy's has the same tables.
    known = next((kind.__name__ for kind in type(bits).__mro__ if BIT_GENERATORS.get(kind.__name__) is kind), None)
    if known is not None:
        _check_known(known, {**state, "bit_generator": known}, more)


def _check_known(name: str, state: dict[str, Any], more: dict[str, Any]) -> None:
    checked_state(name, state, more)
    if name == "MT19937":
        _check_table(state["state"]["key"].tolist())


def _check_legacy(name: str, state: Any) -> None:
    """A state as `get_state` of a `RandomState` gives it: a tuple of the Mersenne Twister's, dicts of others."""
    if type(state) is tuple:
        _of_kind(state, len(state) == 5 and state[0] == name, f"NumPy's {name}")
        _, key, position, has_gauss, gauss = state
        state = {"bit_generator": name, "state": {"key": key, "pos": position}, "has_gauss": has_gauss, "gauss": gauss}
    _of_kind(state, type(state) is dict and state.get("bit_generator") == name, f"NumPy's {name}")
    if name in BIT_GENERATORS:
        _check_known(name, state, GAUSS)


def _check_torch(state: Any, *, cpu: bool) -> None:
    _of_kind(state, type(state) is torch.Tensor, "a generator of torch")
    if state.dtype != torch.uint8 or state.dim() != 1 or state.device.type != "cpu":
        raise ValueError(f"expected a row of bytes, found shape {tuple(state.shape)} and {state.dtype}")
    if cpu:
        check_cpu_state(state)
        data = state.numpy()[CPU_STATE.size :][: 8 * CPU_WORDS].copy().view("<u8")
        if data.max() >= 2**32:
            raise ValueError("a word of more than 32 bits")
        _check_table(data.tolist())
