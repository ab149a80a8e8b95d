"""The examples, run as their users run them, and killed.

Resumed in the same layout, losses are those of an uninterrupted run to the bit; in another layout they are close.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import giantstep as gs
from running import EXAMPLES, STEPS, Hold, Run, Way, run, run_and_kill

STOPPED_AFTER = 4
TOLERANCE = 2e-5

ALONE = Way()
# The layout that saves and goes on, and others that go on.
EXAMPLE: dict[str, tuple[Way, ...]] = {
    "ddp": (Way(processes=2), Way(processes=1)),
    "fsdp2_tp": (Way(("--tp", "2"), 4), Way(("--tp", "1"), 2)),
    "megatron_style": (Way(("--tp", "2", "--pp", "2"), 4), Way(("--tp", "1", "--pp", "1"), 3)),
    "moe": (Way(("--experts-per-rank", "3", "0", "1"), 3), Way(("--experts-per-rank", "2", "2"), 2)),
    "huggingface": (ALONE, Way(processes=2)),
    "lightning_callback": (ALONE, Way(("--devices", "2"))),
    "accelerate_loop": (Way(("--fsdp",), 2), Way(processes=2), ALONE),
}
# What a killed save has not done: made its data files durable, published its record, begun at all.
OPERATIONS = ("sync_names", "publish", "prepare")
KILLED = {"ddp": "sync_names", "megatron_style": "publish", "lightning_callback": "publish"}
SLOW = [(name, operation) for name in EXAMPLE for operation in OPERATIONS if KILLED.get(name) != operation]

Uninterrupted = Callable[[str], tuple[Run, Path]]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """By name of the example: its whole run, which is made once, and the folder of its checkpoints."""
    found: dict[str, tuple[Run, Path]] = {}

    def whole(name: str) -> tuple[Run, Path]:
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            found[name] = run(name, EXAMPLE[name][0], folder), folder
        return found[name]

    return whole


def from_step(step: int, whole: Run) -> dict[int, float]:
    return {number: loss for number, loss in whole.losses.items() if number > step}


def goes_on(name: str, way: Way, whole: Path, folder: Path) -> Run:
    """From a copy of what there would be if it had been stopped then."""
    shutil.copytree(whole / f"step_{STOPPED_AFTER:08d}", folder / f"step_{STOPPED_AFTER:08d}")
    return run(name, way, folder)


def is_committed(path: Path) -> bool:
    try:
        gs.open_checkpoint(path)
    except gs.errors.OpenError:
        return False
    return True


def killed_in_a_save(name: str, operation: str, whole: Run, folder: Path) -> None:
    """Killed while the second save is in that operation, an example goes on from the first one."""
    before = run_and_kill(name, EXAMPLE[name][0], folder, "held", Hold(STOPPED_AFTER, operation))
    assert before.losses.items() <= whole.losses.items()
    assert is_committed(folder / "step_00000002")
    assert not is_committed(folder / f"step_{STOPPED_AFTER:08d}")
    if operation != "prepare":
        assert any((folder / f"step_{STOPPED_AFTER:08d}").rglob("*.safetensors")), "leftovers, which are to be passed over"


def test_every_example_is_tried() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(EXAMPLE)


@pytest.mark.parametrize("name", EXAMPLE)
def test_an_example_goes_on_in_another_layout(tmp_path: Path, uninterrupted: Uninterrupted, name: str) -> None:
    whole, folder = uninterrupted(name)
    assert sorted(whole.losses) == list(range(1, STEPS + 1))
    late = from_step(STOPPED_AFTER, whole)
    for number, way in enumerate(EXAMPLE[name][1:]):
        changed = goes_on(name, way, folder, tmp_path / str(number)).losses
        assert sorted(changed) == sorted(late)
        assert all(abs(changed[step] - loss) < TOLERANCE for step, loss in late.items()), (changed, late)


@pytest.mark.parametrize("name", [name for name in EXAMPLE if name not in KILLED])
def test_an_example_goes_on_in_the_same_layout_to_the_bit(tmp_path: Path, uninterrupted: Uninterrupted, name: str) -> None:
    whole, folder = uninterrupted(name)
    assert goes_on(name, EXAMPLE[name][0], folder, tmp_path).losses == from_step(STOPPED_AFTER, whole)


@pytest.mark.parametrize(("name", "operation"), KILLED.items())
def test_an_example_killed_in_a_save_goes_on_to_the_bit(
    tmp_path: Path, uninterrupted: Uninterrupted, name: str, operation: str
) -> None:
    whole, _ = uninterrupted(name)
    killed_in_a_save(name, operation, whole, tmp_path)
    again = run(name, EXAMPLE[name][0], tmp_path)
    assert again.first == 2
    assert again.losses == from_step(2, whole)
    # Lightning's counters are in its last line.
    assert again.lines[-1] == whole.lines[-1]
    assert is_committed(tmp_path / f"step_{STOPPED_AFTER:08d}"), "what was left of the killed save is not in the way"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "operation"), SLOW)
def test_an_example_killed_again_and_again_goes_on_to_the_bit(
    tmp_path: Path, uninterrupted: Uninterrupted, request: pytest.FixtureRequest, name: str, operation: str
) -> None:
    if not request.config.option.markexpr:
        pytest.skip("takes minutes: run it with -m slow")
    whole, _ = uninterrupted(name)
    killed_in_a_save(name, operation, whole, tmp_path)
    first = 2
    # While training goes on, wherever the save in the background is then.
    for moment in ("step 5 ", "step 8 "):
        killed = run_and_kill(name, EXAMPLE[name][0], tmp_path, moment)
        assert killed.first >= first
        assert killed.losses.items() <= from_step(killed.first, whole).items()
        first = killed.first
    again = run(name, EXAMPLE[name][0], tmp_path)
    assert again.first >= 4
    assert again.losses == from_step(again.first, whole)
