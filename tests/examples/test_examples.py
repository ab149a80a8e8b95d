"""The examples, run as their users run them, and killed.

Resumed in the same layout, losses are those of an uninterrupted run to the bit; in another layout they are close.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from running import EXAMPLES, STEPS, Hold, Run, Way, run, run_and_kill

import giantstep as gs

STOPPED_AFTER = 4
TOLERANCE = 2e-5

ALONE = Way()
# The layout that saves and goes on, and others that go on.
EXAMPLE: dict[str, tuple[Way, ...]] = {
    "ddp": (Way(processes=2), Way(processes=1)),
    "fsdp2_tp": (Way(("--tp", "2"), 4), Way(("--tp", "1"), 2)),
    "megatron_style": (Way(("--tp", "2", "--pp", "2"), 4), Way(("--tp", "1", "--pp", "1"), 2)),
    "moe": (Way(("--experts-per-rank", "3", "0", "1"), 3), Way(("--experts-per-rank", "4"), 1)),
    "huggingface": (ALONE, Way(processes=2)),
    "lightning_callback": (ALONE, Way(("--devices", "2"))),
    "accelerate_loop": (Way(("--fsdp",), 2), Way(processes=2), ALONE),
}
# What a killed save has not done: made its data files durable, published its record, begun at all.
OPERATIONS = ("sync_names", "publish", "prepare")
KILLED = {"ddp": "sync_names", "megatron_style": "publish", "lightning_callback": "publish"}
# Then killed when it prints these, wherever the save in the background is at that moment.
MOMENTS: dict[str, tuple[str, ...]] = {"lightning_callback": ("step 7 ",)}
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


def killed_and_resumed(name: str, operation: str, moments: tuple[str, ...], whole: Run, folder: Path) -> None:
    """Kill an example while its second save is in that operation, and then at each moment; let it go on to the end."""
    way = EXAMPLE[name][0]
    killed = run_and_kill(name, way, folder, "held", Hold(STOPPED_AFTER, operation))
    assert killed.losses.items() <= whole.losses.items()
    assert is_committed(folder / "step_00000002")
    assert not is_committed(folder / f"step_{STOPPED_AFTER:08d}")
    if operation != "prepare":
        assert any((folder / f"step_{STOPPED_AFTER:08d}").rglob("*.safetensors")), "leftovers, which are to be passed over"
    first = 2
    for moment in moments:
        killed = run_and_kill(name, way, folder, moment)
        assert killed.first >= first
        assert killed.losses.items() <= from_step(killed.first, whole).items()
        first = killed.first
    again = run(name, way, folder)
    assert again.first >= (STOPPED_AFTER if moments else 2)
    assert again.losses == from_step(again.first, whole)
    assert again.ended == whole.ended
    for step in range(2, STEPS + 1, 2):
        assert is_committed(folder / f"step_{step:08d}"), "what was left of the killed save is in nobody's way"


def test_every_example_is_tried() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(EXAMPLE)


@pytest.mark.parametrize("name", EXAMPLE)
def test_an_example_goes_on_where_it_was_stopped(tmp_path: Path, uninterrupted: Uninterrupted, name: str) -> None:
    whole, folder = uninterrupted(name)
    assert sorted(whole.losses) == list(range(1, STEPS + 1))
    late = from_step(STOPPED_AFTER, whole)
    # In the layout that it was saved in, the killed ones below go on.
    ways = EXAMPLE[name][1:] if name in KILLED else EXAMPLE[name]
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda number: goes_on(name, ways[number], folder, tmp_path / str(number)), range(len(ways)))
    for way, resumed in zip(ways, runs, strict=True):
        tolerance = 0 if way == EXAMPLE[name][0] else TOLERANCE
        assert sorted(resumed.losses) == sorted(late)
        assert all(abs(resumed.losses[step] - loss) <= tolerance for step, loss in late.items()), (way, resumed, late)
        assert resumed.ended == whole.ended


@pytest.mark.parametrize(("name", "operation"), KILLED.items())
def test_an_example_killed_in_a_save_goes_on_to_the_bit(
    tmp_path: Path, uninterrupted: Uninterrupted, name: str, operation: str
) -> None:
    killed_and_resumed(name, operation, MOMENTS.get(name, ()), uninterrupted(name)[0], tmp_path)


def test_lightning_counts_steps_from_the_beginning(uninterrupted: Uninterrupted) -> None:
    # The tests above compare this line: resumed runs end at the same step, epoch and learning rate.
    (line,) = uninterrupted("lightning_callback")[0].ended
    assert line.startswith(f"ended in epoch 2 at global step {STEPS}, learning rate 0x")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "operation"), SLOW)
def test_an_example_killed_again_and_again_goes_on_to_the_bit(
    tmp_path: Path, uninterrupted: Uninterrupted, name: str, operation: str
) -> None:
    killed_and_resumed(name, operation, ("step 5 ", "step 8 "), uninterrupted(name)[0], tmp_path)
