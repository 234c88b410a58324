"""Intervals cover what they promise (by simulation), and the recommendation follows from them."""

from __future__ import annotations

from math import isnan, nan

import numpy as np
import pytest

from autopeft.search_space.problem import Objective
from autopeft.studies.analysis.recommendation import Contender, costs, recommend
from autopeft.studies.analysis.statistics import (
    SeedSd,
    estimate,
    paired_difference,
    pooled_seed_sd,
    predictive_interval,
)

RUNS = 400
# Four standard errors of a share of 0.95 among 400 simulations.
TOLERANCE = 4 * (0.95 * 0.05 / RUNS) ** 0.5
NUM_EXAMPLES = 120
NOISE_SD = 0.25


def draw(rng, num_seeds, examples, seed_sd, mean=0.0):
    """Scores [seeds, examples] of the model that the module states."""
    seeds = rng.normal(0, seed_sd, (num_seeds, 1))
    return mean + examples + seeds + rng.normal(0, NOISE_SD, (num_seeds, len(examples)))


def share_covered(intervals):
    return np.mean([low <= truth <= high for truth, low, high in intervals])


@pytest.mark.parametrize("seed_sd", [0.0, 0.05])
@pytest.mark.parametrize("num_seeds", [2, 3, 8])
def test_estimate_covers_the_mean(num_seeds, seed_sd):
    rng = np.random.default_rng(num_seeds)
    found = [estimate(draw(rng, num_seeds, rng.normal(0, 0.4, NUM_EXAMPLES), seed_sd, 0.7)) for _ in range(RUNS)]
    assert share_covered((0.7, e.low, e.high) for e in found) == pytest.approx(0.95, abs=TOLERANCE)


@pytest.mark.parametrize("seed_sd", [0.0, 0.05])
@pytest.mark.parametrize("num_seeds", [(2, 2), (3, 5), (8, 8)])
@pytest.mark.parametrize("pooled", [False, True])
def test_paired_difference_covers_the_difference(num_seeds, seed_sd, pooled):
    rng = np.random.default_rng(7)
    intervals = []
    for _ in range(RUNS):
        shared = rng.normal(0, 0.4, NUM_EXAMPLES)
        a, b = (
            draw(rng, count, shared + rng.normal(0, 0.1, NUM_EXAMPLES), seed_sd, mean)
            for count, mean in zip(num_seeds, (0.3, 0.2), strict=True)
        )
        spread = None
        if pooled:
            spread = pooled_seed_sd([draw(rng, 3, shared, seed_sd).mean(axis=1) for _ in range(5)])
        difference = paired_difference(a, b, seed_sd=spread)
        intervals.append((0.1, difference.low, difference.high))
    # Terms that cannot be negative are cut off at 0, so few seeds without any effect are covered more often.
    assert 0.95 - TOLERANCE <= share_covered(intervals) <= 0.995


def test_one_run_needs_the_spread_between_seeds_from_elsewhere():
    rng = np.random.default_rng(3)
    alone, helped = [], []
    for _ in range(RUNS):
        shared = rng.normal(0, 0.4, NUM_EXAMPLES)
        a, b = draw(rng, 1, shared, 0.05), draw(rng, 1, shared, 0.05)
        spread = pooled_seed_sd([draw(rng, 3, shared, 0.05).mean(axis=1) for _ in range(5)])
        for intervals, given in ((alone, None), (helped, spread)):
            difference = paired_difference(a, b, seed_sd=given)
            intervals.append((0.0, difference.low, difference.high))
    assert share_covered(alone) < 0.8
    assert share_covered(helped) >= 0.95 - TOLERANCE


def test_pairing_takes_out_the_examples():
    rng = np.random.default_rng(0)
    examples = rng.normal(0, 2.0, 300)
    a, b = draw(rng, 3, examples, 0.0, 0.1), draw(rng, 3, examples, 0.0)
    difference = paired_difference(a, b)
    assert difference.std_err < 0.3 * estimate(a).std_err
    assert difference.low > 0
    assert paired_difference(b, a).value == pytest.approx(-difference.value)


def test_predictive_interval_covers_a_new_seed():
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(2000):
        groups = [rng.normal(mean, 0.01, 3) for mean in rng.uniform(0.5, 0.8, 4)]
        spread = pooled_seed_sd(groups)
        low, high = predictive_interval(groups[0], spread, level=0.9)
        hits.append(low <= rng.normal(groups[0].mean(), 0.01 * (1 + 1 / 3) ** 0.5) <= high)
    assert np.mean(hits) == pytest.approx(0.9, abs=4 * (0.09 / 2000) ** 0.5)


def test_pooled_seed_sd_by_hand():
    assert pooled_seed_sd([[1.0, 3.0], [5.0, 5.0, 8.0], [9.0]]) == SeedSd(sd=(8 / 3) ** 0.5, dof=3)
    assert pooled_seed_sd([[1.0, 3.0, nan]]) == SeedSd(sd=2**0.5, dof=1)
    assert pooled_seed_sd([[1.0], [2.0, nan]]) is None
    assert predictive_interval([0.5], SeedSd(sd=0.0, dof=2)) == (0.5, 0.5)


def test_estimate_of_one_run_is_the_classical_mean():
    scores = np.array([1.0, 0.0, 1.0, 1.0])
    found = estimate(scores)
    assert (found.value, found.num_seeds) == (0.75, 1)
    assert found.std_err == pytest.approx(scores.std(ddof=1) / 2)
    assert found.high - found.value == pytest.approx(3.182446 * found.std_err)


def test_degenerate_scores():
    constant = estimate(np.ones((3, 5)))
    assert (constant.value, constant.std_err, constant.low, constant.high) == (1.0, 0.0, 1.0, 1.0)
    assert paired_difference(np.ones((2, 5)), np.zeros((2, 5))).low == 1.0
    for broken in (nan, np.inf, -np.inf):
        found = paired_difference([1.0, broken], [broken, broken])
        assert all(isnan(number) for number in (found.value, found.std_err, found.low, found.high))
    with pytest.raises(ValueError, match="two examples"):
        estimate([[1.0], [2.0]])
    with pytest.raises(ValueError, match="same examples"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])


def test_a_standard_error_is_never_below_that_of_the_seeds():
    """Two runs, right on opposite examples: 9 and 7 of 16. The noise outweighs the terms of examples and of seeds."""
    runs = np.array([[1.0] * 9 + [0.0] * 7, [0.0] * 9 + [1.0] * 7])
    found = estimate(runs)
    assert found.value == 0.5
    assert found.std_err == pytest.approx(1 / 16)  # the means are 9/16 and 7/16: sd 2^0.5 / 16, over the root of 2
    assert found.high - found.value == pytest.approx(12.706205 / 16), "t with one degree of freedom"
    pooled = estimate(runs, seed_sd=SeedSd(sd=0.08, dof=4))
    assert pooled.std_err == pytest.approx(0.08 / 2**0.5)
    difference = paired_difference(runs, np.full((2, 16), 0.25))
    assert (difference.value, difference.std_err) == (0.25, pytest.approx(1 / 16))


def contenders():
    """The best and dearest, one tied with it, one clearly worse and cheapest, one that diverged."""
    rng = np.random.default_rng(5)
    examples = rng.normal(0, 0.4, 400)
    rows = [
        Contender(trial=number, scores=draw(rng, 3, examples, 0.003, mean), costs=(cost,))
        for number, mean, cost in ((10, 0.700, 300.0), (11, 0.699, 100.0), (12, 0.5, 10.0))
    ]
    return [*rows, Contender(trial=13, scores=np.full((3, 400), nan), costs=(1.0,))]


def test_recommend_takes_the_cheapest_tied_one_and_never_a_worse_one():
    found = recommend(contenders())
    assert found.recommended == 11
    assert set(found.tied) == {10, 11}
    assert found.best in found.tied
    assert found.best not in found.differences
    assert found.differences[12].high < 0
    assert isnan(found.differences[13].value)


def test_recommend_of_one_and_of_none():
    best, *_, diverged = contenders()
    found = recommend([best])
    assert (found.best, found.recommended, found.tied, found.differences) == (10, 10, (10,), {})
    with pytest.raises(ValueError, match="finite"):
        recommend([diverged])


def test_equal_costs_are_settled_by_quality():
    rng = np.random.default_rng(2)
    scores = rng.random((2, 50))
    worse = Contender(trial=1, scores=scores - 1e-6 * rng.random((2, 50)), costs=(5.0,))
    assert recommend([worse, Contender(trial=2, scores=scores, costs=(5.0,))]).recommended == 2


def test_costs_are_the_objectives_that_are_not_qualities():
    values = {"accuracy": 0.7, "num_params": 100, "latency_s": 0.01}
    objectives = [Objective.of(name) for name in ("latency_s", "accuracy", "num_params")]
    assert costs(values, objectives) == (0.01, 100)
    assert costs(values, objectives[1:2]) == (100,)
