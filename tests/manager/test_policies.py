"""When to save and what to keep: rules that hold for all numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from giantstep.errors import BadArgumentError
from giantstep.manager import EverySecs, EverySteps, ForFailures, Keep, best_interval_secs, goodput
from giantstep.manager.policies import SavedStep

STEPS = st.lists(
    st.builds(
        SavedStep,
        st.integers(0, 60),
        st.floats(0, 1000),
        st.dictionaries(st.sampled_from(["loss", "acc"]), st.one_of(st.floats(-3, 3), st.just(math.nan)), max_size=2),
    ),
    unique_by=lambda one: one.step,
    max_size=20,
)
RULES = st.fixed_dictionaries(
    {
        "last": st.one_of(st.none(), st.integers(0, 5)),
        "every": st.one_of(st.none(), st.integers(1, 9)),
        "secs": st.one_of(st.none(), st.floats(1, 500)),
        "best": st.one_of(st.none(), st.integers(1, 4)),
        "mode": st.sampled_from(["min", "max"]),
    }
)


def rules_of(given: dict[str, Any]) -> Keep | None:
    if all(given[name] is None for name in ("last", "every", "secs", "best")):
        return None
    return Keep(**given, metric="loss" if given["best"] is not None else None)


@given(steps=STEPS, given_rules=RULES, pinned=st.sets(st.integers(0, 60)), now=st.floats(0, 1000))
def test_what_is_kept_is_the_union_of_the_rules_and_always_has_the_newest_and_the_pinned(
    steps: list[SavedStep], given_rules: dict[str, Any], pinned: set[int], now: float
) -> None:
    keep = rules_of(given_rules)
    if keep is None:
        return
    there = {one.step for one in steps}
    kept = keep.kept(steps, now, pinned)
    assert kept <= there
    if steps:
        assert max(there) in kept
    assert pinned & there <= kept
    single = set()
    for name in ("last", "every", "secs", "best"):
        value = given_rules[name]
        if value is not None:
            more: dict[str, Any] = {"metric": "loss", "mode": given_rules["mode"]} if name == "best" else {}
            single |= Keep(**{name: value, **more}).kept(steps, now, pinned)
    assert kept == single


@given(steps=STEPS, best=st.integers(1, 4), mode=st.sampled_from(["min", "max"]))
def test_nothing_that_goes_is_better_than_what_stays_as_best(steps: list[SavedStep], best: int, mode: Any) -> None:
    kept = Keep(best=best, metric="loss", mode=mode).kept(steps, 0.0)
    values = {one.step: one.metrics["loss"] for one in steps if not math.isnan(one.metrics.get("loss", math.nan))}
    stay = [value for step, value in values.items() if step in kept]
    go = [value for step, value in values.items() if step not in kept]
    sign = 1 if mode == "min" else -1
    assert len(stay) >= min(best, len(values))
    if go:
        assert sum(1 for value in stay if sign * value <= min(sign * other for other in go)) >= best


def test_of_equal_metrics_the_newer_step_stays_and_steps_without_the_metric_never_count() -> None:
    steps = [
        SavedStep(1, 0, {"loss": 1.0}),
        SavedStep(2, 0, {"loss": 1.0}),
        SavedStep(3, 0, {"loss": math.nan}),
        SavedStep(4, 0),
    ]
    assert Keep(best=1, metric="loss").kept(steps, 0.0) == {2, 4}
    assert Keep(last=0).kept(steps, 0.0) == {4}


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Keep, {}),
        (Keep, {"last": -1}),
        (Keep, {"last": True}),
        (Keep, {"every": 0}),
        (Keep, {"best": 2}),
        (Keep, {"metric": "loss", "last": 1}),
        (Keep, {"best": 1, "metric": "loss", "mode": "least"}),
        (Keep, {"secs": -1.0}),
        (EverySteps, {"steps": 0}),
        (EverySecs, {"secs": math.inf}),
        (ForFailures, {"mtbf_secs": 0}),
        (ForFailures, {"mtbf_secs": 5.0, "first_secs": -1}),
    ],
)
def test_rules_that_can_never_work_are_refused(kind: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(BadArgumentError, match="cannot be: expected"):
        kind(**arguments)


@pytest.mark.parametrize(("cost", "mtbf"), [(1.0, 3600.0), (30.0, 3600.0), (300.0, 6 * 3600.0), (0.01, 86400.0), (60.0, 600.0)])
def test_the_interval_is_within_one_percent_of_the_best_goodput_that_any_interval_has(cost: float, mtbf: float) -> None:
    """By search over the model itself, of which the formula is an estimate."""
    found = goodput(best_interval_secs(cost, mtbf), cost, mtbf, 0.0)
    best = max(goodput(cost * 1.01**power, cost, mtbf, 0.0) for power in range(-400, 2000))
    assert found >= best - 0.001
    young = math.sqrt(2 * cost * mtbf)
    assert best_interval_secs(cost, mtbf) == pytest.approx(young, rel=0.6)


def test_published_values_of_the_formula_are_met() -> None:
    """Small costs: Young's square root, less the cost itself. From twice the mean time on, the mean time."""
    assert best_interval_secs(1e-6, 1e6) == pytest.approx(math.sqrt(2), rel=1e-5)
    assert best_interval_secs(10.0, 5.0) == 5.0
    assert best_interval_secs(25.0, 5.0) == 5.0
    # sqrt(2 c m) (1 + sqrt(c / 2m) / 3 + c / 18m) - c with c = 300, m = 21600.
    assert best_interval_secs(300.0, 21600.0) == pytest.approx(
        3600 * (1 + math.sqrt(300 / 43200) / 3 + 300 / (18 * 21600)) - 300
    )


def test_goodput_falls_with_cost_restarts_and_failures() -> None:
    base = goodput(1000.0, 10.0, 10_000.0, 100.0)
    assert 0.9 < base < 1000 / 1010
    assert goodput(1000.0, 50.0, 10_000.0, 100.0) < base
    assert goodput(1000.0, 10.0, 5_000.0, 100.0) < base
    assert goodput(1000.0, 10.0, 10_000.0, 1000.0) < base
    assert goodput(1e12, 10.0, 10.0, 1e9) >= 0.0


def test_goodput_is_what_a_simulation_of_failures_gives() -> None:
    """Work, a save, and again; failures at exponential times send back to the last save."""
    import random

    draw = random.Random(5)
    interval, cost, mtbf, restart = 100.0, 10.0, 700.0, 30.0
    clock = useful = 0.0
    failure = draw.expovariate(1 / mtbf)
    while useful < 2_000_000:
        if clock + interval + cost <= failure:
            clock += interval + cost
            useful += interval
            continue
        clock = failure
        while True:
            failure = clock + draw.expovariate(1 / mtbf)
            if clock + restart <= failure:
                clock += restart
                break
            clock = failure
    assert useful / clock == pytest.approx(goodput(interval, cost, mtbf, restart), rel=0.01)
