"""The demo: train a small GPT, kill it while it saves, and go on from the last committed step in other layouts.

Run by `make demo`. Prints its story, checks every claim it makes, and exits with 1 if one is false.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from job import Job, Result, step_name
from launch import Run, RunError, command_line, run, run_side_by_side
from model import build
from numpy.typing import NDArray
from story import Story
from text import project_text
from tolerance import longest_chain, tolerance
from train import SEQUENCES, SHAPE, last_committed

import giantstep as gs

LAST_STEP = 12
SAVE_EVERY = 3
KILL_STEP = 9
COMMITTED_STEP = 6
VICTIM = 2
# About half of what a rank writes.
KILL_AFTER_BYTES = 5 << 20
TOKENS = SEQUENCES * SHAPE.context
FLIP_KEY = "model.blocks.2.mlp.up.weight"
NEW_STEPS = range(COMMITTED_STEP + 1, LAST_STEP + 1)


class Demo:
    """The story's chapters, told in order."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.checkpoints = work / "checkpoints"
        self.story = Story(work)

    def tell(self) -> None:
        """Run everything."""
        text = project_text(Path(__file__).parents[1])
        (self.work / "text").write_bytes(text)
        self.train_without_interruption(len(text))
        self.kill_a_rank_in_a_save()
        self.look_at_what_is_left()
        self.resume_on_fewer_processes()
        self.resume_on_as_many_processes()
        self.use_the_command_line()
        self.flip_a_byte()

    def job(self, name: str, dp: int, tp: int, **more: Any) -> Job:
        """A job that trains to the last step."""
        return Job(name=name, work=str(self.work), dp=dp, tp=tp, last_step=LAST_STEP, **more)

    # The chapters.

    def train_without_interruption(self, text_bytes: int) -> None:
        """The run that all others are compared with. It saves nothing."""
        self.story.section(f"Train {LAST_STEP} steps without interruption, for comparison")
        self.reference: Result = run(self.job("reference", 2, 2)).results[0]
        self.story.say(
            f"A byte-level GPT of {self.reference.parameters:,} parameters, AdamW, float32; the text is this project's own "
            f"files ({text_bytes / 2**10:.0f} KiB). 4 processes: 2-way tensor parallel x 2-way FSDP2."
        )
        self.story.say("loss  " + " ".join(f"{loss:.4f}" for loss in self.reference.losses.values()))

    def kill_a_rank_in_a_save(self) -> None:
        """The same run, saving, until one of its ranks is killed."""
        self.story.section(f"Train again, save every {SAVE_EVERY} steps, and SIGKILL rank {VICTIM} in the middle of a save")
        killing = self.job(
            "killed",
            2,
            2,
            save_every=SAVE_EVERY,
            kill_rank=VICTIM,
            kill_step=KILL_STEP,
            kill_after_bytes=KILL_AFTER_BYTES,
        )
        killed = run(killing, [1, 1, -9, 1])
        self.saved = killed.results[0]
        self.story.say("gs.save: " + "; ".join(f"step {step}: {report}" for step, report in self.saved.saves.items()))
        self.story.say(
            f"step {KILL_STEP}: rank {VICTIM} dies of SIGKILL after writing {KILL_AFTER_BYTES >> 20} MiB of its file"
        )
        survivors = [result for rank, result in enumerate(killed.results) if rank != VICTIM]
        slowest = max(result.error_secs for result in survivors)
        told = survivors[0].error_message
        self.story.check(
            all((result.error, result.error_message) == ("PeerFailureError", told) for result in survivors) and slowest < 30,
            f"the 3 others raise the same PeerFailureError, {slowest:.1f} s after they called gs.save, and end:",
        )
        self.story.say(told, indent=" " * 12)
        steps = range(1, KILL_STEP + 1)
        self.story.check(
            _losses(self.saved, steps) == _losses(self.reference, steps),
            f"saving does not disturb training: losses of steps 1 to {KILL_STEP} are equal to section 1, to the bit",
        )

    def look_at_what_is_left(self) -> None:
        """The killed save is no checkpoint; the last committed one is whole."""
        self.story.section("Look at what is left")
        path = self.checkpoints / step_name(KILL_STEP)
        files = [file for file in path.rglob("*") if file.is_file()]
        error = _error_of(lambda: gs.open_checkpoint(path))
        self.story.check(
            isinstance(error, gs.errors.IncompleteError),
            f"{path} ({len(files)} files) is not taken for a checkpoint. {type(error).__name__}: {error}",
        )
        step = last_committed(self.checkpoints)
        self.story.check(step == COMMITTED_STEP, f"the last committed step is {step}")
        checkpoint = gs.open_checkpoint(self.checkpoints / step_name(step))
        stored = {key: _digest(np.asarray(checkpoint[key])) for key in checkpoint}
        self.check_digests(stored, "its tensors, read from the files,")

    def resume_on_fewer_processes(self) -> None:
        """Other layouts: the same tensors, and losses that differ by rounding alone. They save nothing."""
        self.story.section(f"Go on from step {COMMITTED_STEP} in other layouts")
        chain = longest_chain(SHAPE, TOKENS)
        bounds = [tolerance(SHAPE, TOKENS, step - COMMITTED_STEP, self.reference.losses[step]) for step in NEW_STEPS]
        self.story.say(
            "They add up in another order. Tolerance k steps after loading, derived in demo/tolerance.py: "
            f"k * 2 * sqrt(N) * 2**-24 * loss, where N = {chain:,} terms are in the longest chain of sums of a step."
        )
        fsdp = run(self.job("fsdp", 2, 1, resume=True))
        # One process on each of two cores.
        plain, control = run_side_by_side(
            [self.job("plain", 1, 1, resume=True), self.job("control", 1, 1, resume=True, forget_moments=True)]
        )
        self.check_resumed(fsdp, "2 processes, FSDP2 only", bounds)
        self.check_resumed(plain, "1 plain process", bounds)
        apart = self.apart(control.results[0])
        worst = max(distance / bound for distance, bound in zip(apart, bounds, strict=True))
        self.story.check(worst > 1, f"a run that forgets Adam's moments after loading is {worst:.0f} times too far off to pass")
        self.story.row("step", NEW_STEPS)
        self.story.row("loss of section 1", [f"{self.reference.losses[step]:.4f}" for step in NEW_STEPS])
        self.story.row("difference: 2 processes", [f"{distance:.1e}" for distance in self.apart(fsdp.results[0])])
        self.story.row("difference: 1 process", [f"{distance:.1e}" for distance in self.apart(plain.results[0])])
        self.story.row("tolerance", [f"{bound:.1e}" for bound in bounds])
        self.story.row("moments forgotten", [f"{distance:.1e}" for distance in apart])

    def resume_on_as_many_processes(self) -> None:
        """The layout that saved: equal to the bit, to the end. Saves over what the killed run left."""
        self.story.section(f"Go on from step {COMMITTED_STEP} in the layout that saved, saving again")
        resumed = run(self.job("resumed", 2, 2, resume=True, save_every=SAVE_EVERY))
        result = resumed.results[0]
        self.check_loaded(resumed, "4 processes")
        self.story.check(
            _losses(result, NEW_STEPS) == _losses(self.reference, NEW_STEPS),
            f"losses of steps {NEW_STEPS[0]} to {LAST_STEP} are equal to section 1, to the bit",
        )
        expected, found = self.reference.digests[LAST_STEP], result.digests[LAST_STEP]
        self.story.check(
            found == expected,
            f"after step {LAST_STEP} all {len(found)} tensors are identical to those of the uninterrupted run",
        )
        step = last_committed(self.checkpoints)
        again = _error_of(lambda: gs.open_checkpoint(self.checkpoints / step_name(KILL_STEP)))
        self.story.check(
            step == LAST_STEP and again is None,
            f"the last committed step is {step}; step {KILL_STEP} was saved again over what the killed save had left",
        )

    def use_the_command_line(self) -> None:
        """`giantstep ls`, `show`, `verify` on the last step."""
        self.story.section("Look into it from the command line")
        path = f"checkpoints/{step_name(LAST_STEP)}"
        self.command("ls", path, most=7)
        self.command("show", path, FLIP_KEY, most=12)
        self.command("verify", path, most=6)

    def flip_a_byte(self) -> None:
        """One damaged byte in a copy is found, and named."""
        self.story.section("Damage one byte in a copy")
        damaged = self.work / "damaged"
        shutil.copytree(self.checkpoints / step_name(LAST_STEP), damaged)
        chunk = gs.open_checkpoint(damaged).info(FLIP_KEY).chunks[-1]
        position = chunk.start + chunk.bytes // 2
        with (damaged / chunk.file).open("r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 0x10]))
        self.story.say(f"A bit of byte {position} of damaged/{chunk.file} is flipped, in {FLIP_KEY}.")
        self.command("verify", "damaged", most=8, succeeds=False)
        wanted = {"model": build(SHAPE, seed=0).state_dict()}
        error = _error_of(lambda: gs.load(wanted, damaged, strict=gs.StrictHandling.RAISE_UNEXPECTED))
        self.story.check(
            isinstance(error, gs.errors.CorruptionError) and FLIP_KEY in str(error),
            f"gs.load refuses and names the tensor. {type(error).__name__}: {error}",
        )

    # What they check.

    def command(self, *arguments: str, most: int, succeeds: bool = True) -> None:
        """Run a `giantstep` command, show what it prints, and check its exit code."""
        code, lines = command_line(self.work, *arguments)
        self.story.check((code == 0) == succeeds, f"exit code {code}: giantstep {' '.join(arguments)}")
        self.story.quote(lines, most)

    def check_digests(self, found: dict[str, str], what: str) -> None:
        """Compare digests of step 6 with those noted by the run that saved it."""
        expected = self.saved.digests[COMMITTED_STEP]
        differing = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
        self.story.check(
            bool(expected) and not differing,
            f"{what} equal those saved to the bit: {len(expected) - len(differing)} of {len(expected)} digests agree",
        )

    def check_loaded(self, resumed: Run, layout: str) -> None:
        """All ranks went on from the last committed step, with the bits that were saved."""
        first = resumed.results[0].digests.get(COMMITTED_STEP, {})
        agreed = all(result.digests.get(COMMITTED_STEP) == first for result in resumed.results)
        self.check_digests(first if agreed else {}, f"{layout}: loaded parameters and moments")

    def check_resumed(self, resumed: Run, layout: str, bounds: Sequence[float]) -> None:
        """Another layout: the right bits, and losses within the tolerance."""
        self.check_loaded(resumed, layout)
        apart = self.apart(resumed.results[0])
        self.story.check(
            all(distance <= bound for distance, bound in zip(apart, bounds, strict=True)),
            f"losses of steps {NEW_STEPS[0]} to {LAST_STEP} differ from section 1 by at most {max(apart):.1e}, as tolerated",
        )

    def apart(self, result: Result) -> list[float]:
        """Distances of the new losses from those of the uninterrupted run."""
        return [abs(result.losses[step] - self.reference.losses[step]) for step in NEW_STEPS]


def _losses(result: Result, steps: Iterable[int]) -> list[float]:
    return [result.losses[step] for step in steps]


def _digest(array: NDArray[Any]) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array))


def _error_of(call: Callable[[], object]) -> gs.GiantstepError | None:
    """What a call raises, or None."""
    try:
        call()
    except gs.GiantstepError as error:
        return error
    return None


def main() -> int:
    """Run the demo in a directory of its own, which is removed at the end."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="giantstep-demo-") as folder:
        demo = Demo(Path(folder).resolve())
        print("giantstep demo: kill a training run while it saves, and go on without losing a bit")
        try:
            demo.tell()
        except RunError as error:
            demo.story.check(False, "every process ends as it should")
            print(error)
    story = demo.story
    verdict = f"all {story.claims} claims hold" if not story.failed else f"{story.failed} of {story.claims} claims FAILED"
    print(f"\n{verdict}; {time.perf_counter() - begin:.0f} s")
    return 1 if story.failed else 0


if __name__ == "__main__":
    sys.exit(main())
