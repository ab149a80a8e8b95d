"""The kinds of the object codec for NumPy's random number generators. Fetched when one is met: they take long to import.

A state is checked in full before NumPy is given it, which would read past its tables on some of those that cannot be.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy import random

from giantstep.errors import UnsupportedTypeError
from giantstep.format.codec import Kind, Reader, Writer
from giantstep.format.object_text import Json
from giantstep.format.payload import int_of, items_of, text_of
from giantstep.shards.paths import Path, dotted

# What a state is made of: the greatest value of an int, dtype and length of an array, `float`, or a dict of these.
_BUFFERED = {"has_uint32": 1, "uinteger": 2**32 - 1}
_PCG64 = {"state": {"state": 2**128 - 1, "inc": 2**128 - 1}, **_BUFFERED}
_STATES: dict[str, dict[str, Any]] = {
    "MT19937": {"state": {"key": (np.uint32, 624), "pos": 624}},
    "PCG64": _PCG64,
    "PCG64DXSM": _PCG64,
    "Philox": {
        "state": {"counter": (np.uint64, 4), "key": (np.uint64, 2)},
        "buffer": (np.uint64, 4),
        "buffer_pos": 4,
        **_BUFFERED,
    },
    "SFC64": {"state": {"state": (np.uint64, 4)}, **_BUFFERED},
}
GAUSS = {"has_gauss": 1, "gauss": float}
BIT_GENERATORS: dict[str, Any] = {name: getattr(random, name) for name in _STATES}
# Limits on what NumPy mixes into a state when it seeds.
_SEED_WORDS = 4096
_MAX_POOL = 256


def _check(value: Any, expected: Any, name: str) -> None:
    if isinstance(expected, dict):
        if type(value) is not dict or value.keys() != expected.keys():
            raise ValueError(f"{name}: expected the fields {', '.join(expected)}")
        for field, inner in expected.items():
            _check(value[field], inner, field)
    elif expected is float:
        if type(value) is not float:
            raise ValueError(f"{name}: expected a float")
    elif isinstance(expected, int):
        int_of(value, 0, expected)
    elif type(value) is not np.ndarray or value.dtype != expected[0] or value.shape != (expected[1],):
        raise ValueError(f"{name}: expected {expected[1]} values of {expected[0].__name__}")


def checked_state(name: Any, state: Any, more: dict[str, Any]) -> dict[str, Any]:
    """The state of a bit generator of this name, with the fields `more` besides; ValueError if it is none."""
    if name not in _STATES:
        raise ValueError(f"expected one of the bit generators {', '.join(_STATES)}, found {name!r:.40}")
    if type(state) is not dict or state.get("bit_generator") != name:
        raise ValueError(f"expected a state of {name}")
    _check({field: value for field, value in state.items() if field != "bit_generator"}, {**_STATES[name], **more}, "state")
    return state


def _checked_seed(seed: Any) -> list[Any] | None:
    """[entropy, spawn key, pool size, number of children] of a seed sequence."""
    if seed is None:
        return None
    entropy, spawn_key, pool_size, children = items_of(seed, 4)
    words = 0
    for number in [*(entropy if isinstance(entropy, list) else [entropy]), *items_of(spawn_key)]:
        if type(number) is not int or number < 0:
            raise ValueError("a seed that is no integer of at least 0")
        words += number.bit_length() // 32 + 1
    if words > _SEED_WORDS:
        raise ValueError(f"seeds of more than {_SEED_WORDS} words of 32 bits")
    return [entropy, spawn_key, int_of(pool_size, 4, _MAX_POOL), int_of(children, 0, 2**32 - 1)]


def _ints(value: Any) -> list[int]:
    return [operator.index(number) for number in value]


def _plain_seed(sequence: Any) -> list[Any] | None:
    """What `Generator.spawn` goes on from."""
    if sequence is None:
        return None
    if type(sequence) is not random.SeedSequence:
        raise TypeError(f"a seed sequence of type {type(sequence).__qualname__}")
    entropy: Any = sequence.entropy
    entropy = _ints(entropy) if isinstance(entropy, Iterable) else operator.index(entropy)
    return _checked_seed([entropy, _ints(sequence.spawn_key), sequence.pool_size, sequence.n_children_spawned])


def _unsupported(path: Path, error: Exception) -> UnsupportedTypeError:
    return UnsupportedTypeError(
        f"random number generator at {dotted(path)!r} cannot be stored: {error}. Save numbers from which it can be made "
        "again instead."
    )


def _encode_generator(value: random.Generator, writer: Writer, path: Path) -> Json:
    bits = value.bit_generator
    try:
        state, seed = checked_state(type(bits).__name__, bits.state, {}), _plain_seed(bits.seed_seq)
    except (TypeError, ValueError) as error:
        raise _unsupported(path, error) from error
    return [state["bit_generator"], writer.value(state, path), writer.value(seed, path)]


def _decode_generator(payload: Json, reader: Reader) -> random.Generator:
    name, state, seed = items_of(payload, 3)
    checked, parts = checked_state(text_of(name), reader.value(state), {}), _checked_seed(reader.value(seed))
    sequence = None
    if parts is not None:
        entropy, spawn_key, pool_size, children = parts
        sequence = random.SeedSequence(entropy, spawn_key=tuple(spawn_key), pool_size=pool_size, n_children_spawned=children)
    bits = BIT_GENERATORS[name](sequence)
    bits.state = checked
    return random.Generator(bits)


def _encode_random_state(value: random.RandomState, writer: Writer, path: Path) -> Json:
    found: Any = value.get_state(legacy=False)
    try:
        state = checked_state(found["bit_generator"], found, GAUSS)
    except ValueError as error:
        raise _unsupported(path, error) from error
    return [state["bit_generator"], writer.value(state, path)]


def _decode_random_state(payload: Json, reader: Reader) -> random.RandomState:
    name, state = items_of(payload, 2)
    checked = checked_state(text_of(name), reader.value(state), GAUSS)
    # Seeded with anything, so that no entropy of the system is used up: the state takes its place.
    found = random.RandomState(BIT_GENERATORS[name](0))
    found.set_state(checked)
    return found


def random_kinds() -> tuple[Kind, ...]:
    """Kinds of NumPy's generators."""
    return (
        Kind("numpy.random.Generator", random.Generator, _encode_generator, _decode_generator),
        Kind("numpy.random.RandomState", random.RandomState, _encode_random_state, _decode_random_state),
    )
