"""The recommendation: the cheapest member that is shown to be as good as the best, never one that only may be."""

from __future__ import annotations

from math import isnan, nan

import numpy as np
import pytest

from autopeft.search_space.problem import METRICS, Objective
from autopeft.studies.analysis.recommendation import (
    Contender,
    costs,
    difference_text,
    first_look,
    recommend,
)
from autopeft.studies.analysis.statistics import Estimate, SeedSpread

NUM_EXAMPLES = 400


def known_spread(sd: float) -> SeedSpread:
    """A spread between seeds that is known to be `sd` for every candidate."""
    return SeedSpread(variances=np.array([sd**2]), dofs=np.array([1e6]), weights=np.ones(1))


NAMES = {10: "full", 11: "trial 11", 12: "trial 12", 13: "trial 13"}


def contender(trial: int, mean: float, cost: float, *, seeds: int = 3, noise_sd: float = 0.05) -> Contender:
    """Scores with exactly this mean in every run, on examples that all contenders share."""
    shared = np.random.default_rng(5).normal(0, 0.4, NUM_EXAMPLES)
    noise = np.random.default_rng(trial).normal(0, noise_sd, (seeds, NUM_EXAMPLES))
    return Contender(
        trial=trial, scores=mean + shared - shared.mean() + noise - noise.mean(axis=1, keepdims=True), costs=(cost,)
    )


def test_the_cheapest_member_within_the_margin_is_recommended() -> None:
    members = [contender(10, 0.700, 300.0), contender(11, 0.699, 100.0), contender(12, 0.5, 10.0)]
    diverged = Contender(trial=13, scores=np.full((3, NUM_EXAMPLES), nan), costs=(1.0,))
    found = recommend([*members, diverged], margin=0.02, spread=known_spread(0.003))
    assert (found.best, found.recommended) == (10, 11)
    assert found.standings == {10: "best", 11: "as good", 12: "worse", 13: "worse"}
    assert found.differences[11].low >= -0.02
    assert found.differences[12].high < 0
    assert isnan(found.differences[13].value)
    assert found.open == ()
    reason = found.reason(NAMES.__getitem__, METRICS["accuracy"])
    assert reason.startswith("trial 11 is the cheapest member shown to be within 2.0 points of the best, full: -0.")


def test_not_distinguishable_is_not_as_good() -> None:
    """Two seeds with a wide spread: a member that is worse by 22 points is tied with the best, and not recommended."""
    rng = np.random.default_rng(0)
    best, head = rng.random((2, 200)) < 0.331, rng.random((2, 200)) < 0.105
    members = [
        Contender(trial=10, scores=best.astype(float), costs=(10_000.0,)),
        Contender(trial=11, scores=head.astype(float), costs=(0.0,)),
    ]
    spread = SeedSpread(variances=np.array([0.08**2]), dofs=np.array([0.5]), weights=np.ones(1))
    found = recommend(members, margin=0.01, spread=spread)
    assert found.differences[11].value < -0.15
    assert found.standings[11] == "tied"
    assert (found.recommended, found.open) == (10, ()), "its estimate is below the margin, whatever its interval"
    reason = found.reason(NAMES.__getitem__, METRICS["accuracy"])
    assert reason == "full is the best; by estimate, every cheaper member is worse by more than 1.0 points."


def test_a_member_that_may_be_as_good_is_named_with_what_would_decide() -> None:
    members = [contender(10, 0.7000, 300.0, seeds=2), contender(11, 0.6990, 10.0, seeds=2)]
    found = recommend(members, margin=0.02, spread=known_spread(0.02))
    assert (found.best, found.recommended) == (10, 10)
    (case,) = found.open
    assert (case.trial, case.num_seeds, case.num_examples) == (11, 2, NUM_EXAMPLES)
    assert case.seeds is not None
    assert 2 < case.seeds < 15
    reason = found.reason(NAMES.__getitem__, METRICS["accuracy"])
    assert reason.startswith("full is the best, and no cheaper member is shown to be within 2.0 points of it. trial 11")
    assert reason.endswith(f"about {case.seeds} seeds of both would show whether it is (2 now).")


def test_where_seeds_cannot_decide_examples_may() -> None:
    members = [contender(10, 0.70, 300.0, noise_sd=1.0), contender(11, 0.69, 10.0, noise_sd=1.0)]
    few = [Contender(trial=m.trial, scores=np.asarray(m.scores)[:, :60], costs=m.costs) for m in members]
    difference = np.mean(np.asarray(few[1].scores) - few[0].scores)
    found = recommend(few, margin=abs(difference) + 0.01, spread=known_spread(0.001))
    (case,) = found.open
    assert case.seeds is None
    assert case.examples is not None
    assert case.examples > 60
    reason = found.reason(NAMES.__getitem__, METRICS["accuracy"])
    assert "validation rows (60 now) with 20 seeds would, or a larger margin, recommend.within." in reason


def test_single_runs_show_nothing() -> None:
    """Their interval is about two networks, not about two configurations."""
    members = [contender(10, 0.700, 300.0, seeds=1), contender(11, 0.6999, 100.0, seeds=1)]
    found = recommend(members, margin=0.02)
    assert found.recommended == found.best == 10
    assert found.standings == {10: "best", 11: "tied"}
    assert found.open[0].seeds is None
    assert found.reason(NAMES.__getitem__, METRICS["accuracy"]).endswith("single runs cannot show whether it is.")
    assert recommend(members, margin=0.02, spread=known_spread(0.001)).recommended == 11


def test_the_best_may_be_the_cheapest() -> None:
    found = recommend([contender(10, 0.7, 1.0), contender(11, 0.6, 5.0)], margin=0.01)
    assert found.reason(NAMES.__getitem__, METRICS["accuracy"]) == "full is the best, and the cheapest."


def test_one_and_none() -> None:
    found = recommend([contender(10, 0.7, 1.0)], margin=0.01)
    assert (found.best, found.recommended, found.standings) == (10, 10, {10: "best"})
    assert found.reason(NAMES.__getitem__, METRICS["accuracy"]) == "full is the only member of the front."
    with pytest.raises(ValueError, match="finite"):
        recommend([Contender(trial=1, scores=np.full((2, 9), nan), costs=(1.0,))], margin=0.01)


def test_equal_costs_are_settled_by_quality() -> None:
    members = [contender(10, 0.700, 5.0), contender(11, 0.6999, 5.0)]
    found = recommend(members, margin=0.02)
    assert found.recommended == found.best


def test_the_second_look_goes_to_those_that_decide() -> None:
    members = [
        contender(10, 0.7000, 300.0, seeds=2),
        contender(11, 0.6990, 30.0, seeds=2),
        contender(12, 0.5, 10.0, seeds=2),
    ]
    found = recommend(members, margin=0.02, spread=known_spread(0.02))
    assert [case.trial for case in found.open] == [11]
    assert found.second_look(9, 2) == ({10, 11}, 4)
    assert found.second_look(100, 2) == ({10, 11}, 18), "no more than `MOST_SEEDS` in all"
    assert found.second_look(100, 25) == ({10, 11}, 0)
    assert recommend(members[:1], margin=0.02).second_look(9, 2) == (frozenset(), 0)


@pytest.mark.parametrize(("seeds", "first"), [(1, 1), (2, 2), (3, 2), (4, 2), (5, 3), (10, 5)])
def test_first_look(seeds: int, first: int) -> None:
    assert first_look(seeds) == first


def test_margins() -> None:
    assert METRICS["accuracy"].default_margin(0.6) == 0.01
    assert METRICS["macro-f1"].default_margin(0.6) == 0.01
    assert METRICS["loss"].default_margin(-1.5) == pytest.approx(0.015)


def test_differences_are_told_in_the_direction_of_the_metric() -> None:
    worse = Estimate(value=-0.0123, std_err=0.01, low=-0.03, high=0.0049, num_seeds=2)
    assert difference_text(worse, METRICS["accuracy"]) == "-1.2 points (95 % interval -3.0 to +0.5)"
    assert difference_text(worse, METRICS["loss"]) == "+0.0123 loss (95 % interval -0.0049 to +0.03)"


def test_costs_are_the_objectives_that_are_not_qualities() -> None:
    values = {"accuracy": 0.7, "num_params": 100, "latency_s": 0.01}
    objectives = [Objective.of(name) for name in ("latency_s", "accuracy", "num_params")]
    assert costs(values, objectives) == (0.01, 100)
    assert costs(values, objectives[1:2]) == (100,)
