"""A process that uses one library: `python worker.py LIBRARY ACTION ...`. Lines that it prints are for `workers`.

The state is a few tensors; every element of the k-th is 100 * value + k, so that one value comes out of all of them, or a mix.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from libraries import LIBRARIES, Library, State

TENSORS, ITEMS = 6, 1 << 17


def state_of(value: int) -> State:
    """Three MiB."""
    return {f"t{number}": torch.full((ITEMS,), 100.0 * value + number) for number in range(TENSORS)}


def value_of(state: State) -> int | str:
    """The value that all elements have, or "a mix"."""
    found = {float(part) - number for number in range(TENSORS) for part in state[f"t{number}"].unique().tolist()}
    (first, *others) = found
    return int(first) // 100 if not others and first % 100 == 0 else "a mix"


def say(word: str, **values: object) -> None:
    """A line for the parent."""
    print(json.dumps({"word": word, **values}), flush=True)


def save(library: Library, path: str, value: str) -> None:
    """One checkpoint."""
    library.save(state_of(int(value)), Path(path))
    say("committed", value=int(value))


def load(library: Library, *paths: str) -> None:
    """What each of these has: a value, a mix, or an error."""
    for path in paths:
        state = state_of(-7)
        try:
            library.load(state, Path(path))
            say("loaded", path=path, value=value_of(state))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the result; DCP's errors are no Exception
            say("failed", path=path, error=f"{type(error).__name__}: {error}"[:300])


def steps(library: Library, root: str, first: str) -> None:
    """Saves new steps without end, and removes all but the last three."""
    for step in range(int(first), 1_000_000):
        library.save(state_of(step), Path(root, f"step_{step:08d}"))
        say("committed", value=step)
        shutil.rmtree(Path(root, f"step_{step - 3:08d}"), ignore_errors=True)


def overwrite(library: Library, root: str, first: str) -> None:
    """Saves to one path without end."""
    for step in range(int(first), 1_000_000):
        library.save(state_of(step), Path(root, "step_00000000"))
        say("committed", value=step)


def background(library: Library, root: str, first: str) -> None:
    """Saves new steps in the background without end, one at a time, and removes all but the last three."""
    for step in range(int(first), 1_000_000):
        wait = library.start(state_of(step), Path(root, f"step_{step:08d}"))
        wait()
        say("committed", value=step)
        shutil.rmtree(Path(root, f"step_{step - 3:08d}"), ignore_errors=True)


def changed(library: Library, path: str) -> None:
    """Begins a save of 1, and at once changes everything to 2."""
    state = state_of(1)
    wait = library.start(state, Path(path))
    for number in range(TENSORS):
        state[f"t{number}"].fill_(200.0 + number)
    wait()
    say("committed", value=1)


def main() -> None:
    """Do what the arguments say."""
    name, action, *arguments = sys.argv[1:]
    library = LIBRARIES[name][1]()
    say("ready")
    actions = {"save": save, "load": load, "steps": steps, "overwrite": overwrite, "background": background, "changed": changed}
    actions[action](library, *arguments)
    library.close()


if __name__ == "__main__":
    main()
