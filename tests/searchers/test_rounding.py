"""Observations that differ in their last digits are one to every searcher; what is exact stays exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.search_space import Candidate, Measurement, Problem, Trial
from autopeft.search_space.problem import SEARCH
from autopeft.searchers import SEARCHERS
from autopeft.searchers.rounding import SHARE, quantum, rounded
from autopeft.testing.searchers import ended, exact, measured, problem_of, run
from autopeft.testing.spaces import mixed_space

ERROR = 0.02


def trial(number: int = 0, std_err: dict[str, float] | None = None, state: str = "complete", **values: float) -> Trial:
    found = Measurement(values=values, std_err=std_err or {}, rungs=((0.5, values),))
    return Trial(number=number, role=SEARCH, candidate=Candidate(architecture={}), state=state, measurement=found)


def nudged(trials: Sequence[Trial], by: float, seed: int = 0) -> list[Trial]:
    """The same trials as another machine would measure them."""
    rng = Random(seed)

    def off(values: dict[str, float]) -> dict[str, float]:
        exact_too = ("num_params", "latency_s")
        return {name: v if name in exact_too else v * (1 + rng.uniform(-by, by)) for name, v in values.items()}

    return [
        replace(t, measurement=replace(m, values=off(m.values), std_err=off(m.std_err),
                                       rungs=tuple((share, off(values)) for share, values in m.rungs)))
        for t in trials if (m := t.measurement) is not None
    ]  # fmt: skip


@given(st.floats(min_value=1e-12, max_value=1e12))
def test_the_quantum_is_a_power_of_two_well_below_the_standard_error(std_err: float) -> None:
    step = quantum(std_err)
    assert SHARE / 2 < step / std_err <= SHARE
    assert step.hex().startswith("0x1.0000000000000p")


def test_the_quantum_of_a_loss() -> None:
    assert quantum(0.04) == 2**-8
    assert quantum(2**-5) == 2**-8, "at its bound it is the bound"


def test_values_are_rounded_and_costs_are_not() -> None:
    (found,) = rounded([trial(std_err={"loss": 0.04}, loss=1.23456789, num_params=1234567.0, step_s=0.123456789)])
    assert found.measurement is not None
    at = {"loss": 1.234375, "num_params": 1234567.0, "step_s": 0.123456789}  # 316 / 256
    assert found.measurement.values == at
    assert found.measurement.rungs == ((0.5, at),)
    assert found.measurement.std_err == {"loss": 0.0390625}  # 20 / 512


def test_a_pruned_trial_is_rounded_as_the_others_are() -> None:
    """It has no standard error; the median of those that have one decides."""
    others = [trial(number, std_err={"loss": error}, loss=1.0) for number, error in enumerate((0.001, 0.04, 0.05))]
    pruned = rounded([*others, trial(3, state="pruned", loss=1.23456789)])[-1].measurement
    assert pruned is not None
    assert pruned.values == {"loss": 1.234375}
    assert pruned.rungs == ((0.5, {"loss": 1.234375}),)


@pytest.mark.parametrize("std_err", [{}, {"loss": 0.0}, {"loss": float("nan")}, {"loss": float("inf")}])
def test_without_a_standard_error_nothing_is_rounded(std_err: dict[str, float]) -> None:
    given = [
        trial(std_err=std_err, loss=1.23456789),
        Trial(number=1, role=SEARCH, candidate=Candidate(architecture={})),
    ]
    assert all(a is b for a, b in zip(rounded(given), given, strict=True))


def test_values_that_are_no_number_or_too_large_to_round() -> None:
    values = {"loss": float("inf"), "accuracy": float("nan"), "macro-f1": -1e300}
    (found,) = rounded([trial(std_err=dict.fromkeys(values, 1e-9), **values)])
    assert found.measurement is not None
    assert str(found.measurement.values) == str(values)


@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(0, 1e3)), min_size=1, max_size=9).map(
        lambda pairs: [trial(i, std_err={"loss": error}, loss=value) for i, (value, error) in enumerate(pairs)]
    )
)
def test_rounding_is_close_keeps_the_order_and_is_done_once(trials: list[Trial]) -> None:
    found = rounded(trials)
    assert rounded(found) == found
    step = max((quantum(e) for t in trials if t.measurement and (e := t.measurement.std_err["loss"]) > 0), default=0.0)
    pairs = sorted((t.values["loss"], r.values["loss"]) for t, r in zip(trials, found, strict=True))
    # A standard error just below a power of two is rounded up to it.
    assert all(abs(before - after) <= step for before, after in pairs)
    assert [after for _, after in pairs] == sorted(after for _, after in pairs)


@pytest.mark.slow
def test_last_digits_pass_as_rarely_as_is_said() -> None:
    rng = Random(0)
    trials = [trial(i, std_err={"loss": 0.04}, loss=rng.uniform(1.4, 1.6)) for i in range(20_000)]
    passed = {
        by: sum(a.values != b.values for a, b in zip(rounded(trials), rounded(nudged(trials, by)), strict=True))
        for by in (1e-6, 1e-4)
    }
    # Changes are uniform up to `by`, half of it on average: 0.02 % and 2 % of the values.
    assert passed[1e-6] <= 12
    assert passed[1e-4] == pytest.approx(400, rel=0.2)


def noisy(problem: Problem, number: int, genes: dict, suggested: object = None) -> Trial:
    """A trial with standard errors; every fifth one is pruned at a rung and has none."""
    values = measured(problem.space, genes)
    values["loss"] += Random(number).gauss(0, ERROR)
    values["accuracy"] += Random(-number).gauss(0, ERROR)
    rungs = ((0.5, {"loss": values["loss"] + 0.1, "accuracy": values["accuracy"] - 0.1}),)
    pruned = number % 5 == 4
    found = Measurement(values=values, std_err={} if pruned else {"loss": ERROR, "accuracy": ERROR}, rungs=rungs,
                        share=0.5 if pruned else 1.0)  # fmt: skip
    return ended(problem, number, genes, suggested, measurement=found, state="pruned" if pruned else "complete")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tpe", "nsga2", "evolution", "linas", "bo"])
def test_last_digits_change_no_suggestion(name: str) -> None:
    """Of the search's own trials, of trials observed beside it, and of a prior study."""
    space, number = mixed_space(), 16
    problem = problem_of(space, num_objectives=3, num_trials=24)
    history = run(SEARCHERS["random"](problem, 3), 12, noisy)
    problem = replace(problem, observed=tuple(history[:4]), prior=tuple(history[4:]))
    trials = run(SEARCHERS[name](problem, 0), number, noisy)
    for seed in range(3):
        elsewhere = replace(
            problem,
            observed=tuple(nudged(problem.observed, 1e-9, seed)),
            prior=tuple(nudged(problem.prior, 1e-9, seed)),
        )
        here, there = SEARCHERS[name](problem, 0), SEARCHERS[name](elsewhere, 0)
        here.update(trials)
        there.update(nudged(trials, 1e-9, seed))
        assert here.completed == there.completed != tuple(trials)
        assert (here.problem.observed, here.problem.prior) == (there.problem.observed, there.problem.prior)
        assert exact(here.suggest(2)) == exact(there.suggest(2))
