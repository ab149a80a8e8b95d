"""Stored states that no generator can have are told before any is set; and derived streams differ for certain."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import giantstep as gs
from giantstep.errors import CorruptionError, MismatchError
from giantstep.training_state import RandomState
from giantstep.training_state.generators import Beginning, seed


def made(number: int) -> dict[str, Any]:
    return {
        "torch": torch.Generator().manual_seed(number),
        "numpy": np.random.default_rng(number),
        "philox": np.random.Generator(np.random.Philox(number)),
        "legacy": np.random.RandomState(number),
        "python": random.Random(number),
    }


def draw(generators: dict[str, Any]) -> list[float]:
    return [
        float(torch.rand(1, generator=generators["torch"])),
        float(generators["numpy"].random()),
        float(generators["philox"].random()),
        float(generators["legacy"].random_sample()),
        generators["python"].random(),
    ]


def mt_state(words: list[int], position: int) -> tuple[Any, ...]:
    return (3, (*words, position), None)


ZEROS = [0] * 624
CPU = torch.Generator().manual_seed(1).get_state()
PCG = np.random.default_rng(1).bit_generator.state
LEGACY: Any = np.random.RandomState(1).get_state()


def with_bytes(state: torch.Tensor, start: int, new: bytes) -> torch.Tensor:
    data = bytearray(state.numpy().tobytes())
    data[start : start + len(new)] = new
    return torch.frombuffer(data, dtype=torch.uint8)


BROKEN: dict[str, tuple[str, Any]] = {
    "python: another version": ("python", (2, (1,) * 625, None)),
    "python: a position beyond the table": ("python", mt_state([1] * 624, 625)),
    "python: a short table": ("python", mt_state([1] * 600, 3)),
    "python: a word of more than 32 bits": ("python", mt_state([1 << 32] * 624, 3)),
    "python: a word that is no int": ("python", (3, ("1",) * 625, None)),
    "python: nothing but zeros": ("python", mt_state(ZEROS, 624)),
    "python: a text as the next normal number": ("python", (3, (1,) * 625, "x")),
    "legacy: a position beyond the table": ("legacy", (*LEGACY[:2], 2**31 - 1, *LEGACY[3:])),
    "legacy: a negative position": ("legacy", (*LEGACY[:2], -5, *LEGACY[3:])),
    "legacy: a short table": ("legacy", (LEGACY[0], LEGACY[1][:5], *LEGACY[2:])),
    "legacy: nothing but zeros": ("legacy", (LEGACY[0], np.zeros(624, np.uint32), *LEGACY[2:])),
    "legacy: a dict with a field missing": ("legacy", {"bit_generator": "MT19937", "state": {}}),
    "numpy: a state beyond 128 bits": ("numpy", {**PCG, "state": {"state": 2**128, "inc": 1}}),
    "numpy: a field of another type": ("numpy", {**PCG, "has_uint32": "yes"}),
    "philox: a position beyond the buffer": (
        "philox",
        {**np.random.Philox(1).state, "buffer_pos": 77},
    ),
    "torch: short": ("torch", CPU[:100]),
    "torch: empty": ("torch", CPU[:0]),
    "torch: of another dtype": ("torch", CPU.float()),
    "torch: of two dimensions": ("torch", CPU.view(2, -1)),
    "torch: a position beyond the table": ("torch", with_bytes(CPU, 16, (10**6).to_bytes(8, "little"))),
    "torch: nothing left of it": ("torch", with_bytes(CPU, 8, bytes(4))),
    "torch: nothing but zeros": ("torch", with_bytes(CPU, 24, bytes(624 * 8))),
    "torch: a word of more than 32 bits": ("torch", with_bytes(CPU, 24, bytes([255] * 8))),
}


def store(path: Path, generators: Any, **streams: Any) -> None:
    """A checkpoint with the value of a RandomState as it is given."""
    value = {**streams, "generators": generators}
    gs.save({"rng": {"value": gs.ShardedObject("rng", value, (1,), (0,))}}, path)


@pytest.mark.parametrize("name", BROKEN)
def test_a_state_that_no_generator_can_have_is_an_error_that_changes_no_generator(tmp_path: Path, name: str) -> None:
    kind, state = BROKEN[name]
    # One that is sound stands before each.
    store(tmp_path, {"first": torch.Generator().manual_seed(99).get_state(), kind: state})
    generators = {"first": torch.Generator().manual_seed(5), **made(5)}
    with pytest.raises(CorruptionError, match=f"random generator '{kind}' cannot be one"):
        gs.load({"rng": RandomState(generators, streams=())}, tmp_path)
    assert draw(generators) == draw(made(5))
    assert generators["first"].initial_seed() == 5
    stream = {"legacy": "numpy", "python": "python", "torch": "torch"}.get(kind)
    if stream is not None:
        before = torch.get_rng_state()
        store(tmp_path / "stream", {}, **{stream: state})
        with pytest.raises(CorruptionError, match=f"random generator '{stream}' cannot be one"):
            gs.load({"rng": RandomState()}, tmp_path / "stream")
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        ("torch", PCG),
        ("torch", LEGACY),
        ("numpy", CPU),
        ("numpy", np.random.Philox(1).state),
        ("legacy", PCG),
        ("legacy", ("PCG64", *LEGACY[1:])),
        ("python", CPU),
        ("python", 7),
        ("philox", [1]),
    ],
)
def test_a_state_of_another_kind_of_generator_is_a_mismatch(tmp_path: Path, kind: str, state: Any) -> None:
    store(tmp_path, {kind: state})
    generators = made(5)
    with pytest.raises(MismatchError, match="Load into generators of the kinds that were saved"):
        gs.load({"rng": RandomState(generators, streams=())}, tmp_path)
    assert draw(generators) == draw(made(5))


@pytest.mark.parametrize("value", [[1], "x", {"generators": 3}, {1: CPU}, {"generators": {2: CPU}}])
def test_what_is_no_value_of_a_random_state_is_a_mismatch(tmp_path: Path, value: Any) -> None:
    gs.save({"rng": {"value": gs.ShardedObject("rng", value, (1,), (0,))}}, tmp_path)
    with pytest.raises(MismatchError, match="expected the value of a RandomState"):
        gs.load({"rng": RandomState()}, tmp_path)


def test_nothing_that_is_stored_makes_streams_begin_anew(tmp_path: Path) -> None:
    gs.save({"rng": {"value": gs.ShardedObject("rng", {"derived": b"x" * 32}, (1,), (0,))}}, tmp_path)
    generators = made(5)
    state = RandomState(generators, streams=())
    gs.load({"rng": state}, tmp_path)
    assert state.skipped == ("derived",)
    assert draw(generators) == draw(made(5))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_broken_state_of_a_cuda_device_is_an_error(tmp_path: Path) -> None:
    store(tmp_path, {}, cuda=torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(CorruptionError, match="'cuda' cannot be one"):
        gs.load({"rng": RandomState()}, tmp_path)


class OfANumPyClass(np.random.MT19937):
    """As its base, under a name of its own."""


def test_classes_derived_from_numpys_have_its_tables_and_its_checks(tmp_path: Path) -> None:
    generator = np.random.Generator(OfANumPyClass(3))
    gs.save({"rng": RandomState({"x": generator}, streams=())}, tmp_path)
    expected = generator.random()
    gs.load({"rng": RandomState({"x": generator}, streams=())}, tmp_path)
    assert generator.random() == expected
    state: Any = generator.bit_generator.state
    store(tmp_path / "broken", {"x": {**state, "state": {**state["state"], "pos": 10**6}}})
    with pytest.raises(CorruptionError):
        gs.load({"rng": RandomState({"x": generator}, streams=())}, tmp_path / "broken")


def test_derived_streams_of_the_cpu_differ_at_all_positions_even_if_all_hashes_were_equal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """20,000 seeds of 32 bits would have one pair in common with odds of about 1 in 20; here even of all."""
    monkeypatch.setattr(Beginning, "words", lambda _self, _name, count: [7] * count)
    generator, seen = torch.Generator(), set()
    for number in range(2000):
        seed(generator, Beginning(b"root", number), "x")
        seen.add(torch.empty(700, dtype=torch.int32).random_(generator=generator).numpy().tobytes())
    assert len(seen) == 2000
    assert len({Beginning(b"root", number).seed("x") for number in range(2000)}) == 2000


def test_derived_streams_of_the_cpu_are_those_of_a_mersenne_twister_of_the_hashed_table() -> None:
    beginning = Beginning(b"root", 3)
    generator = torch.Generator()
    torch.rand(5, generator=generator)
    torch.randn(1, generator=generator)
    seed(generator, beginning, "x")
    words = beginning.words("x", 624)
    words[0], words[1] = words[0] | 1 << 31, 3
    reference = np.random.MT19937()
    reference.state = {"bit_generator": "MT19937", "state": {"key": np.array(words, np.uint32), "pos": 624}}
    drawn = torch.empty(1300, dtype=torch.int32).random_(generator=generator)
    assert drawn.tolist() == [int(word) % 2**31 for word in reference.random_raw(1300)]
    seed(generator, beginning, "x")
    normal = torch.randn(3, generator=generator)
    torch.randn(1, generator=generator)
    seed(generator, beginning, "x")
    assert torch.equal(torch.randn(3, generator=generator), normal), "nothing is left of the stream before"
