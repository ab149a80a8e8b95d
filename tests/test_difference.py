"""`compare`: in what two checkpoints differ, from the indexes where they tell, and from no more bytes than that takes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import giantstep as gs
from giantstep.difference import Difference, compare
from giantstep.errors import CheckpointNotFoundError, CorruptionError
from giantstep.storage.locate import StoreLike
from giantstep.storage.memory import MemoryStore
from giantstep.testing.ranks import run_ranks
from layouts import DTYPES, random_tensor

BLOCK = 4096
SHAPE = (240, 60)


def place(name: str) -> MemoryStore:
    found = MemoryStore(f"difference-{name}")
    found.clear()
    return found


def options(**more: Any) -> gs.SaveOptions:
    return gs.SaveOptions(block_bytes=BLOCK, buffer_bytes=1 << 20, writer_threads=1, timeout_secs=20, **more)


def save(state: dict[str, Any], path: StoreLike, ranks: int = 1, axis: int = 0, **more: Any) -> None:
    """Tensors divided along an axis over the ranks."""

    def rank(group: Any) -> None:
        mine = {
            key: gs.ShardedTensor.from_rank_offsets(
                key, value.chunk(ranks, axis)[group.rank].clone(), (axis, group.rank, ranks)
            )
            if isinstance(value, torch.Tensor)
            else value
            for key, value in state.items()
        }
        gs.save(mine, path, process_group=group, options=options(**more))

    run_ranks(ranks, rank)


def state(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(SHAPE, generator=generator) for key in ("a", "b", "c")} | {"step": 1}


def changed(found: dict[str, Any], key: str, row: int, by: float = 1.0) -> dict[str, Any]:
    value = found[key].clone()
    value[row, 7] += by
    return found | {key: value}


def keys_of(found: Difference) -> list[str]:
    return [one.key for one in found.values]


LAYOUTS = {"alike": (1, 0), "other ranks": (3, 0), "other axis": (2, 1)}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("digests", [(True, True), (True, False), (False, False)], ids=["both", "one", "none"])
def test_the_difference_is_the_same_for_all_layouts_with_and_without_digests(
    digests: tuple[bool, bool], layout: tuple[int, int]
) -> None:
    first, second = place("first"), place("second")
    save(state(), first, digests=digests[0])
    for other, expected in ((state(), []), (changed(state(), "b", 200), ["b"]), (state(1), ["a", "b", "c"])):
        save(other, second, *layout, digests=digests[1])
        for left, right in ((first, second), (second, first)):
            found = compare(left, right)
            assert keys_of(found) == expected
            assert found.equal == (not expected)
            assert found.tensors == 3
            assert (found.first, found.second) == (left.location, right.location)
            measured = compare(left, right, norms=True)
            assert keys_of(measured) == expected


def test_digests_and_shared_files_spare_all_reading(tmp_path: Path) -> None:
    save(state(), tmp_path / "1", 2, digests=True)
    save(changed(state(), "b", 0) | {"step": 2}, tmp_path / "2", 2, previous=tmp_path / "1")
    # The common state, which differs, is all that is read.
    found = compare(tmp_path / "1", tmp_path / "2")
    assert (keys_of(found), found.common) == (["b"], ("step",))
    assert found.bytes_read <= 4 * BLOCK
    save(changed(state(), "b", 0), tmp_path / "3", 2, digests=True)
    save(state(), tmp_path / "4", 2, digests=True)
    assert compare(tmp_path / "1", tmp_path / "4").bytes_read == 0
    found = compare(tmp_path / "1", tmp_path / "3")
    assert (keys_of(found), found.bytes_read) == (["b"], 0)
    assert found.bytes == sum(file.bytes for file in gs.open_checkpoint(tmp_path / "1").record.files)


def test_equal_blocks_of_plain_checkpoints_spare_reading_too() -> None:
    first, second = place("first"), place("second")
    save(state(), first)
    save(state(), second)
    assert compare(first, second).bytes_read == 0
    # One element in the midst of the second tensor: a block of its own tells.
    save(changed(state(), "b", 120), second)
    found = compare(first, second)
    assert (keys_of(found), found.bytes_read) == (["b"], 0)
    # The last element of the first tensor: in a block with the beginning of the second. Both are read.
    value = state()["a"].clone()
    value[-1, -1] += 1
    save(state() | {"a": value}, second)
    found = compare(first, second)
    assert keys_of(found) == ["a"]
    assert 0 < found.bytes_read <= 4 * (240 * 60 * 4 + 2 * BLOCK)


def test_what_only_one_has_and_other_forms_are_told() -> None:
    first, second = place("first"), place("second")
    save({"a": torch.zeros(4, 3), "gone": torch.zeros(2), "w": torch.zeros(4), "same": torch.ones(3)}, first)
    save({"a": torch.zeros(4, 4), "new": torch.zeros(2), "w": torch.zeros(4).double(), "same": torch.ones(3)}, second)
    found = compare(first, second)
    assert (found.only_first, found.only_second, found.values) == (("gone",), ("new",), ())
    assert [(one.key, one.first, one.second) for one in found.form] == [
        ("a", ("float32", (4, 3)), ("float32", (4, 4))),
        ("w", ("float32", (4,)), ("float64", (4,))),
    ]
    assert (found.tensors, found.equal) == (5, False)
    alike = compare(first, second, match=lambda key: key == "same")
    assert (alike.equal, alike.tensors) == (True, 1)


@pytest.mark.parametrize("digests", [False, True])
def test_objects_and_paths_of_the_common_state_are_told(digests: bool) -> None:
    first, second = place("first"), place("second")

    def write(path: StoreLike, common: dict[str, Any], **objects: Any) -> None:
        held = {key: gs.ShardedObject(key, value, (1,), (0,)) for key, value in objects.items()}
        gs.save({**held, **common}, path, options=options(digests=digests))

    write(first, {"a": {"b": [1, 2.0, {"c": None}], "gone": 1}, "same": "x"}, rng=b"123", loader=[1], old=1)
    write(second, {"a": {"b": [1, 2.5, {"c": 0}]}, "same": "x", "new": 1}, rng=b"123", loader=[2], fresh=1)
    found = compare(first, second)
    assert found.objects == ("loader/shard_0_1",)
    assert (found.objects_only_first, found.objects_only_second) == (("old/shard_0_1",), ("fresh/shard_0_1",))
    assert found.common == ("a.b.1", "a.b.2.c", "a.gone", "new")
    write(second, {"same": "x", "a": {"gone": 1, "b": [1, 2.0, {"c": None}]}}, rng=b"123", loader=[1], old=1)
    assert compare(first, second).equal, "the order of a dict is no difference"
    gs.save({"rng": gs.ShardedObject("rng", b"123", (1,), (0,))}, second, options=options())
    assert compare(first, second).common == ("a", "same")


_SAVE_OF_USER_TYPES = """
import dataclasses, enum, sys
import numpy as np
import giantstep as gs

@dataclasses.dataclass
class Sampler:
    seen: object
    rate: object = 0.5

class Phase(enum.Enum):
    WARM = 1
    COLD = 2

gs.register_type(Sampler)
for name, seen, phase in ("1", 0, Phase.WARM), ("2", 0, Phase.WARM), ("3", 1, Phase.COLD):
    state = {"s": Sampler(np.arange(3) + seen, Sampler(float("nan"))), "l": [Sampler(np.zeros(2))], "phase": phase}
    gs.save({"common": state, "n": name}, f"{sys.argv[1]}/{name}")
"""


def test_values_of_types_that_are_not_registered_here_are_compared_by_what_is_stored(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _SAVE_OF_USER_TYPES, str(tmp_path)], check=True, timeout=120)
    assert compare(tmp_path / "1", tmp_path / "2").common == ("n",)
    assert compare(tmp_path / "1", tmp_path / "3").common == ("common.s.seen", "common.phase", "n")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_norms_are_those_of_the_difference(layout: tuple[int, int]) -> None:
    first, second = place("first"), place("second")
    old, new = state(), state(5)
    new["b"] = old["b"].clone()
    new["b"][3, 4] += 2
    new["b"][200, 5] = math.nan
    new["c"] = old["c"]
    save(old, first, digests=True)
    save(new, second, *layout, digests=True)
    a, b = compare(first, second, norms=True).values
    assert a.norms is not None
    assert b.norms is not None
    difference = (old["a"].double() - new["a"].double()).numpy()
    assert a.norms.elements == 240 * 60
    assert a.norms.l2 == pytest.approx(np.linalg.norm(difference), rel=1e-12)
    assert a.norms.max_abs == pytest.approx(np.abs(difference).max(), rel=1e-12)
    assert a.norms.relative == pytest.approx(a.norms.l2 / np.linalg.norm(old["a"].double().numpy()), rel=1e-12)
    assert (b.norms.elements, b.norms.not_finite) == (2, 1)
    assert b.norms.max_abs == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_compared_by_its_bits(dtype: torch.dtype) -> None:
    first, second = place("first"), place("second")
    old, new = random_tensor((40, 8), dtype, 1), random_tensor((40, 8), dtype, 2)
    for value, other in ((old, old), (old, new)):
        gs.save({"w": value}, first, options=options())
        save({"w": other}, second, 2)
        found = compare(first, second, norms=True)
        assert found.equal == (other is old)
        for one in found.values:
            has = dtype not in (getattr(torch, "float4_e2m1fn_x2", None), torch.complex32)
            assert (one.norms is not None) == has
            if one.norms is not None:
                assert 0 < one.norms.elements <= 320


def test_nan_is_equal_to_itself_and_negative_zero_is_not_zero() -> None:
    first, second = place("first"), place("second")
    save({"nan": torch.full((50,), math.nan), "zero": torch.zeros(50)}, first)
    save({"nan": torch.full((50,), math.nan), "zero": -torch.zeros(50)}, second, 2)
    found = compare(first, second, norms=True)
    assert keys_of(found) == ["zero"]
    norms = found.values[0].norms
    assert norms is not None
    assert (norms.elements, norms.l2, norms.relative) == (50, 0, 0)


@pytest.mark.parametrize(
    ("first", "second", "l2", "max_abs", "relative"),
    [
        (torch.full((4,), 1e200, dtype=torch.float64), None, 0, 0, 0),
        (torch.tensor([1e200, 3.0], dtype=torch.float64), torch.tensor([-1e200, 3.0], dtype=torch.float64), 2e200, 2e200, 2),
        (torch.tensor([3e-200], dtype=torch.float64), torch.tensor([1e-200], dtype=torch.float64), 2e-200, 2e-200, 2 / 3),
        (
            torch.tensor([1.7e308], dtype=torch.float64),
            torch.tensor([-1.7e308], dtype=torch.float64),
            math.inf,
            math.inf,
            math.inf,
        ),
        (torch.tensor([2**62]), torch.tensor([2**62 + 1]), 1, 1, 2**-62),
        (torch.tensor([-(2**63)]), torch.tensor([2**63 - 1]), 2.0**64, 2.0**64, 2),
        (torch.tensor([0], dtype=torch.uint64), torch.tensor([2**64 - 1], dtype=torch.uint64), 2.0**64, 2.0**64, math.inf),
        (
            torch.tensor([-128, 5], dtype=torch.int8),
            torch.tensor([127, 5], dtype=torch.int8),
            255,
            255,
            255 / math.hypot(128, 5),
        ),
        (torch.tensor([3e200 + 4e200j], dtype=torch.complex128), torch.zeros(1, dtype=torch.complex128), 5e200, 5e200, 1),
        (torch.tensor([True, False]), torch.tensor([True, True]), 1, 1, 1),
    ],
    ids=["equal", "large", "small", "largest", "close ints", "far ints", "unsigned", "bytes", "complex", "bools"],
)
def test_norms_of_values_at_the_ends_of_their_dtype(
    first: torch.Tensor, second: torch.Tensor | None, l2: float, max_abs: float, relative: float
) -> None:
    left, right = place("first"), place("second")
    gs.save({"w": first}, left)
    gs.save({"w": first if second is None else second}, right)
    found = compare(left, right, norms=True).values
    assert len(found) == (second is not None)
    for one in found:
        assert one.norms is not None
        assert (one.norms.l2, one.norms.max_abs, one.norms.relative) == pytest.approx((l2, max_abs, relative), rel=1e-12)


def test_scalars_and_empty_tensors_are_compared() -> None:
    first, second = place("first"), place("second")
    gs.save({"s": torch.tensor(1.0), "e": torch.zeros(0, 3)}, first)
    gs.save({"s": torch.tensor(2.0), "e": torch.zeros(0, 3)}, second)
    assert keys_of(compare(first, second, norms=True)) == ["s"]


def test_what_cannot_be_opened_or_is_damaged_raises(tmp_path: Path) -> None:
    first = place("first")
    save(state(), first)
    with pytest.raises(CheckpointNotFoundError):
        compare(first, tmp_path / "nowhere")
    save(state(), tmp_path, 2)
    name = gs.open_checkpoint(tmp_path).record.files[0].name
    data = bytearray((tmp_path / name).read_bytes())
    data[5000] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorruptionError, match="checksum differs"):
        compare(first, tmp_path)


# The command.


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "giantstep.cli.main", "diff", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_prints_lines_and_exits_like_diff(tmp_path: Path) -> None:
    save(state(), tmp_path / "1", digests=True)
    save(state(), tmp_path / "2", digests=True)
    found = run(tmp_path / "1", tmp_path / "2")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith("equal: 3 tensors; read 0 B of checkpoints of 17")
    other = changed(state(), "b", 3, 2.0) | {"step": 2, "new": torch.zeros(3), "c": torch.zeros(2)}
    del other["a"]
    save(other, tmp_path / "2", digests=True)
    found = run(tmp_path / "1", tmp_path / "2", "--norms")
    assert found.returncode == 1
    assert found.stdout.splitlines()[:5] == [
        "- a",
        "+ new",
        "~ c: float32 [240, 60] became float32 [2]",
        "~ b: 1 values differ, L2 2, largest 2, relative 0.0167",
        "~ common state: step",
    ]
    assert "4 of 4 tensors and 1 other values differ" in found.stdout
    assert run(tmp_path / "1", tmp_path / "2", "--match", "x*").returncode == 0
    found = run(tmp_path / "1", tmp_path / "nowhere")
    assert found.returncode == 2
    assert "does not exist" in found.stderr
    assert run(tmp_path / "1").returncode == 2


def test_the_command_prints_json_for_programs(tmp_path: Path) -> None:
    save(state(), tmp_path / "1")
    save(changed(state(), "b", 3), tmp_path / "2")
    found = run(tmp_path / "1", tmp_path / "2", "--json", "--norms")
    told = json.loads(found.stdout)
    assert found.returncode == 1
    assert (told["equal"], told["tensors"], [one["key"] for one in told["values"]]) == (False, 3, ["b"])
    assert told["values"][0]["max_abs"] == pytest.approx(1)


def test_what_the_command_prints_is_json_whatever_the_norms_are(tmp_path: Path) -> None:
    largest = torch.tensor([1.7e308, -1.7e308], dtype=torch.float64)
    gs.save({"w": largest, "zero": torch.zeros(2)}, tmp_path / "1")
    gs.save({"w": -largest, "zero": torch.ones(2)}, tmp_path / "2")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    told = json.loads(run(tmp_path / "1", tmp_path / "2", "--json", "--norms").stdout, parse_constant=refuse)
    assert [(one["elements"], one["l2"], one["relative"]) for one in told["values"]] == [(2, None, None), (2, 2**0.5, None)]
