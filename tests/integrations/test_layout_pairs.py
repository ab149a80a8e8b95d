"""Every pair of torch's parallel layouts: what one saved, the other continues."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from parallel_layouts import LAYOUTS, PLAIN_LAYOUTS, SINGLE, Trainer

from processes import results, run_processes

FORMS = {"named": (SINGLE, *LAYOUTS), "plain": (SINGLE, *PLAIN_LAYOUTS)}
# Layouts of 2 processes, which load what 4 and 1 have saved.
NARROWER = ("FSDP2", "TP")
STEPS = 2
RELATIVE = 1e-5

Digests = dict[str, str]
Losses = list[float]
Pair = tuple[str, str, str]


@dataclass
class Seen:
    """What was saved, by layout; and what was found after loading, by form, saving and loading layout."""

    saved: dict[str, tuple[Digests, Losses]] = field(default_factory=dict)
    loaded: dict[Pair, tuple[Digests, Losses]] = field(default_factory=dict)
    forgotten: dict[str, Losses] = field(default_factory=dict)


def folder_of(root: str, form: str, layout: str) -> str:
    return str(Path(root, form, layout.replace(" ", "_")))


def go_on(trainer: Trainer) -> Losses:
    """The loss of the next step shows the parameters, that of the one after it the moments."""
    return [trainer.train(STEPS + 1), trainer.train(STEPS + 2)]


def save_under(layout: str, root: str) -> tuple[Digests, Losses]:
    # Another seed for each layout: what is left of an earlier load is not taken for what was loaded.
    trainer = Trainer(layout, seed=(SINGLE, *LAYOUTS).index(layout))
    for step in range(1, STEPS + 1):
        trainer.train(step)
    for form, layouts in FORMS.items():
        if layout in layouts:
            trainer.save(form, folder_of(root, form, layout))
    return trainer.digests(), go_on(trainer)


def load_under(layout: str, root: str) -> Seen:
    seen = Seen()
    for form, layouts in FORMS.items():
        if layout not in layouts:
            continue
        # Its optimizer is fresh for the first source.
        trainer = Trainer(layout, seed=100)
        for source in layouts:
            trainer.load(form, folder_of(root, form, source))
            seen.loaded[form, source, layout] = trainer.digests(), go_on(trainer)
            trainer.scramble()
    return seen


def rank_of_four(rank: int, root: str) -> Seen:
    saved = {layout: save_under(layout, root) for layout in LAYOUTS}
    seen = Seen(saved)
    for layout in LAYOUTS:
        seen.loaded |= load_under(layout, root).loaded
    return seen


def rank_of_two(rank: int, root: str) -> Seen:
    seen = Seen()
    for layout in NARROWER:
        for (form, source, target), found in load_under(layout, root).loaded.items():
            seen.loaded[form, source, f"{target} of 2"] = found
    return seen


def without_moments(root: str) -> Losses:
    trainer = Trainer(SINGLE, seed=100)
    trainer.load("named", folder_of(root, "named", SINGLE))
    trainer.optimizer.state.clear()
    return go_on(trainer)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """One world of 4 processes saves and loads everything, one of 2 loads; this process is the single one."""
    root = str(tmp_path_factory.mktemp("pairs"))
    alone = save_under(SINGLE, root)
    found: Seen = results(run_processes(4, rank_of_four, root, timeout_secs=280))[-1]
    found.saved[SINGLE] = alone
    found.loaded |= results(run_processes(2, rank_of_two, root))[-1].loaded
    found.loaded |= load_under(SINGLE, root).loaded
    found.forgotten[SINGLE] = without_moments(root)
    return found


def pairs() -> list[tuple[str, str]]:
    narrower = [f"{layout} of 2" for layout in NARROWER]
    return [(form, target) for form, layouts in FORMS.items() for target in (*layouts, *narrower)]


@pytest.mark.parametrize(("form", "target"), pairs(), ids=lambda text: text.replace(" ", "_"))
def test_each_layout_continues_what_every_other_has_saved(seen: Seen, form: str, target: str) -> None:
    for source in FORMS[form]:
        digests, losses = seen.loaded[form, source, target]
        expected, expected_losses = seen.saved[source]
        assert digests == expected, f"{source} -> {target}"
        assert losses == pytest.approx(expected_losses, rel=RELATIVE), f"{source} -> {target}"
    assert len(expected) == 4 * (3 + 2 * 16 + 1)


def test_a_run_that_forgets_the_moments_would_be_noticed(seen: Seen) -> None:
    first, second = seen.forgotten[SINGLE]
    _, (expected, expected_second) = seen.saved[SINGLE]
    assert first == pytest.approx(expected, rel=RELATIVE)
    assert abs(second - expected_second) > 100 * RELATIVE * expected_second
