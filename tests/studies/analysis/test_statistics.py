"""Intervals cover what they promise, by simulation."""

from __future__ import annotations

from math import isnan, nan

import numpy as np
import pytest

from autopeft.studies.analysis.statistics import (
    MOST_SEEDS,
    SeedSpread,
    _half_width,
    estimate,
    examples_to_show,
    paired_difference,
    predictive_interval,
    seeds_to_show,
)

from ...support.slow import slow

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
@pytest.mark.parametrize("num_seeds", [slow((2, 2)), (3, 5), slow((8, 8))])
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
            spread = SeedSpread.of([a, b, *(draw(rng, 3, shared, seed_sd) for _ in range(4))])
        difference = paired_difference(a, b, spread=spread)
        intervals.append((0.1, difference.low, difference.high))
    # Terms that cannot be negative are cut off at 0, so few seeds without any effect are covered more often. Two
    # seeds alone, without those of others, may be covered always.
    assert 0.95 - TOLERANCE <= share_covered(intervals) <= (0.995 if pooled or num_seeds != (2, 2) else 1.0)


@pytest.mark.parametrize("dof", [1, slow(2), slow(6)])
@pytest.mark.parametrize("examples", [slow(0.3), 1.0, slow(3.0)])
def test_a_variance_from_few_seeds_beside_a_known_one(dof, examples):
    """The case of two seeds and many rows. With one degree of freedom, Satterthwaite's interval covers 89 %."""
    rng = np.random.default_rng(dof)
    runs = 1500
    errors = rng.normal(0, (examples + 1) ** 0.5, runs)
    widths = [_half_width(examples, rng.chisquare(dof) / dof, 10**6, dof, 0.95) for _ in range(runs)]
    assert 0.94 <= np.mean(np.abs(errors) <= widths) <= 0.99


def test_one_run_needs_the_spread_between_seeds_from_elsewhere():
    rng = np.random.default_rng(3)
    alone, helped = [], []
    for _ in range(RUNS):
        shared = rng.normal(0, 0.4, NUM_EXAMPLES)
        a, b = draw(rng, 1, shared, 0.05), draw(rng, 1, shared, 0.05)
        spread = SeedSpread.of([draw(rng, 3, shared, 0.05) for _ in range(5)])
        for intervals, given in ((alone, None), (helped, spread)):
            difference = paired_difference(a, b, spread=given)
            intervals.append((0.0, difference.low, difference.high))
    assert share_covered(alone) < 0.8
    assert share_covered(helped) >= 0.95 - TOLERANCE


@pytest.mark.parametrize("binary", [False, True])
def test_standard_errors_agree_with_the_bootstrap(binary):
    """Resampling seeds and examples (Owen 2007, The Pigeonhole Bootstrap) gives the same errors, of differences too."""
    rng = np.random.default_rng(21)
    shared = rng.normal(0, 0.4, 300)
    a, b = (draw(rng, 30, shared + rng.normal(0, 0.2, 300), 0.05, mean) for mean in (0.1, 0.0))
    if binary:
        a, b = (a > 0).astype(float), (b > 0).astype(float)
    means, differences = [], []
    for _ in range(1500):
        examples = rng.integers(0, 300, 300)
        first, second = (runs[rng.integers(0, 30, 30)][:, examples].mean() for runs in (a, b))
        means.append(first)
        differences.append(first - second)
    assert np.std(means) == pytest.approx(estimate(a).std_err, rel=0.1)
    assert np.std(differences) == pytest.approx(paired_difference(a, b).std_err, rel=0.1)


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
    for _ in range(RUNS):
        examples = rng.normal(0, 0.4, NUM_EXAMPLES)
        groups = [draw(rng, 3, examples, 0.05) for _ in range(4)]
        spread = SeedSpread.of(groups)
        low, high = predictive_interval(groups[0], spread, level=0.9)
        hits.append(low <= draw(rng, 1, examples, 0.05).mean() <= high)
    assert np.mean(hits) == pytest.approx(0.9, abs=4 * (0.09 / RUNS) ** 0.5)


def constant_runs(*means):
    """Scores [seeds, examples] without noise, whose means are these."""
    return np.array(means)[:, None] * np.ones(4)


def known_spread(sd):
    """A spread that is known to be `sd` for every candidate."""
    return SeedSpread(variances=np.array([sd**2]), dofs=np.array([1e6]), weights=np.ones(1))


def test_spread_of_candidates_that_vary_alike_is_nearly_pooled():
    rng = np.random.default_rng(2)
    groups = [constant_runs(*rng.normal(0.5, 0.1, 3)) for _ in range(40)]
    spread = SeedSpread.of(groups)
    found = [spread.moderated(runs) for runs in groups]
    assert np.mean([variance for variance, _ in found]) == pytest.approx(0.01, rel=0.3)
    own = [runs.mean(axis=1).var(ddof=1) for runs in groups]
    variances = [variance for variance, _ in found]
    assert max(variances) / min(variances) < 0.05 * max(own) / min(own)
    assert min(dof for _, dof in found) > 6
    assert spread.weights.sum() == pytest.approx(1)
    assert SeedSpread.of([constant_runs(1.0), constant_runs(2.0, nan)]) is None


def test_equal_runs_have_no_spread():
    """Pretrained LoRAs with a fixed router: the seed makes no difference."""
    spread = SeedSpread.of([constant_runs(0.5, 0.5), constant_runs(0.25, 0.25, 0.25)])
    assert spread.moderated(constant_runs(0.5, 0.5)) == (0.0, float("inf"))
    assert predictive_interval(constant_runs(0.5), spread) == (0.5, 0.5)
    assert estimate(constant_runs(0.5, 0.5), spread=spread).std_err == 0.0


def test_spread_is_moderated_where_candidates_differ():
    """A head that hardly varies gets a narrower interval than a LoRA that varies much, and neither its own alone."""
    rng = np.random.default_rng(8)
    groups = [constant_runs(*rng.normal(0.5, sd, 4)) for sd in (0.0005, 0.001, 0.03, 0.04, 0.05, 0.06)]
    spread = SeedSpread.of(groups)
    variances = [spread.moderated(runs)[0] for runs in groups]
    own = [runs.mean(axis=1).var(ddof=1) for runs in groups]
    assert own[0] < variances[0] < variances[-1]
    assert all(min(own) < variance < 1.5 * max(own) for variance in variances)
    # Two runs that agree by chance are not sure; two that agree no better than others are.
    lucky = spread.moderated(constant_runs(0.5, 0.5))
    assert lucky[0] > 0
    assert lucky[1] < 8


def test_moderated_variance_against_the_known_model():
    """With one point of the grid, it is Smyth's (2004): (d0 s0**2 + d s**2) / (d0 + d), with d0 + d degrees."""
    spread = SeedSpread(variances=np.array([0.04]), dofs=np.array([6.0]), weights=np.ones(1))
    variance, dof = spread.moderated(constant_runs(0.0, 1.0, 2.0))
    assert variance == pytest.approx((6 * 0.04 + 2 * 1.0) / 8)
    assert dof == pytest.approx(8)
    # The posterior finds the degrees of freedom that variances were drawn with.
    rng = np.random.default_rng(4)
    drawn = 0.3**2 * 4 / rng.chisquare(4, 400)
    found = SeedSpread.of([constant_runs(*rng.normal(0, v**0.5, 4)) for v in drawn])
    best = found.weights.argmax()
    assert found.dofs[best] == 4
    assert found.variances[best] == pytest.approx(0.3**2, rel=0.3)


def test_binary_scores_near_one_are_covered():
    """All of 60 right is not "1 without an error": true shares of 0.98 are covered, and so are differences of such."""
    rng = np.random.default_rng(11)
    right, differences = [], []
    for _ in range(RUNS):
        a, b = (rng.random((1, 60)) < 0.98).astype(float), (rng.random((1, 60)) < 0.95).astype(float)
        right.append((0.98, *(getattr(estimate(a), end) for end in ("low", "high"))))
        found = paired_difference(a, b)
        differences.append((0.03, found.low, found.high))
    assert share_covered(right) >= 0.95 - TOLERANCE
    assert share_covered(differences) >= 0.95 - TOLERANCE


def test_what_would_show_a_difference_does_show_it():
    """The advice assumes that all estimates stay: with as many seeds and examples the interval ends above the bound."""
    rng = np.random.default_rng(6)
    examples = rng.normal(0, 0.4, 4000)

    def pair(num_seeds):
        runs = [draw(rng, num_seeds, examples[:300], 0.0) for _ in range(2)]
        return [r - r.mean(axis=1, keepdims=True) + mean for r, mean in zip(runs, (0.300, 0.295), strict=True)]

    bound, spread, now = -0.04, known_spread(0.02), pair(2)
    needed = seeds_to_show(now[1], now[0], bound, spread=spread)
    assert needed is not None
    assert 2 < needed < 20
    assert paired_difference(now[1], now[0], spread=spread).low < bound
    ends = [paired_difference(*reversed(pair(n)), spread=spread).low for n in (needed - 1, needed + 1)]
    assert ends[0] < bound + 0.001
    assert ends[1] >= bound - 0.001
    assert seeds_to_show(now[1], now[0], 0.5, spread=spread) is None
    assert examples_to_show(now[1], now[0], 0.5, spread=spread) is None


def exact_runs(rng, num_seeds, num_examples, mean, noise_sd=0.3):
    """Runs without a spread between seeds, each with exactly this mean, and noise of exactly this size."""
    noise = rng.normal(0, 1, (num_seeds, num_examples))
    noise = (noise - noise.mean(axis=1, keepdims=True)) / noise.std(axis=1, keepdims=True)
    return mean + noise_sd * noise


def test_more_seeds_of_one_are_kept_when_the_other_gets_more():
    """2 and 9 seeds: the term of the nine shrinks only once the others come to nine as well."""
    rng, spread, bound = np.random.default_rng(1), known_spread(0.03), -0.035
    best, other = exact_runs(rng, 9, 500, 0.5), exact_runs(rng, 2, 500, 0.495)
    needed = seeds_to_show(other, best, bound, spread=spread)
    assert needed is not None
    assert needed > 2
    ends = []
    for count in (needed - 1, needed):
        runs = exact_runs(rng, max(9, count), 500, 0.5), exact_runs(rng, count, 500, 0.495)
        ends.append(paired_difference(runs[1], runs[0], spread=spread).low)
    assert ends[0] < bound + 0.001
    assert ends[1] > bound - 0.001


def test_more_examples_do_not_take_away_the_spread_between_seeds():
    rng, spread, bound = np.random.default_rng(1), known_spread(0.02), -0.02

    def pair(num_seeds, num_examples):
        """Runs that agree on every example, on which the two candidates differ."""
        return [np.tile(exact_runs(rng, 1, num_examples, mean, noise_sd=0.4), (num_seeds, 1)) for mean in (0.5, 0.497)]

    a, b = pair(2, 300)
    assert seeds_to_show(b, a, bound, spread=spread) is None
    needed = examples_to_show(b, a, bound, spread=spread)
    assert needed is not None
    assert needed > 300
    runs = pair(MOST_SEEDS, needed)
    assert paired_difference(runs[1], runs[0], spread=spread).low == pytest.approx(bound, abs=0.002)
    # With a wide spread, no number of examples shows it.
    assert examples_to_show(b, a, bound, spread=known_spread(0.05)) is None


def test_single_runs_give_no_advice():
    rng = np.random.default_rng(1)
    a, b = exact_runs(rng, 1, 300, 0.5), exact_runs(rng, 1, 300, 0.5)
    assert seeds_to_show(b, a, -1.0) is None
    assert examples_to_show(b, a, -1.0) is None


def test_a_metric_to_minimise_has_pseudo_examples_too():
    scores = (np.arange(40) < 39).astype(float)
    up, down = estimate(scores), estimate(-scores)
    assert (down.value, down.std_err) == (-up.value, up.std_err)
    assert (down.low, down.high) == (pytest.approx(-up.high), pytest.approx(-up.low))


def test_estimate_of_one_run_is_the_classical_mean():
    scores = np.array([0.9, 0.1, 0.9, 0.9])
    found = estimate(scores)
    assert (found.value, found.num_seeds) == (0.7, 1)
    assert found.std_err == pytest.approx(scores.std(ddof=1) / 2)
    assert found.high - found.value == pytest.approx(3.182446 * found.std_err)


def test_degenerate_scores():
    constant = estimate(np.full((3, 5), 0.5))
    assert (constant.value, constant.std_err, constant.low, constant.high) == (0.5, 0.0, 0.5, 0.5)
    assert paired_difference(np.full((2, 5), 1.5), np.full((2, 5), 0.5)).low == 1.0
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
    runs[0, 0] = runs[1, -1] = 1 - 1e-12  # not 0 or 1, which would get pseudo-examples
    found = estimate(runs)
    assert found.value == pytest.approx(0.5)
    assert found.std_err == pytest.approx(1 / 16)  # the means are 9/16 and 7/16: sd 2^0.5 / 16, over the root of 2
    assert found.high - found.value == pytest.approx(12.706205 / 16, rel=1e-3), "t with one degree of freedom"
    pooled = estimate(runs, spread=known_spread(0.08))
    assert pooled.std_err == pytest.approx(0.08 / 2**0.5)
    difference = paired_difference(runs, np.full((2, 16), 0.25))
    assert (difference.value, difference.std_err) == (pytest.approx(0.25), pytest.approx(1 / 16))
