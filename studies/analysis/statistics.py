"""Which differences are real: standard errors, paired differences, intervals for a new seed.

Model. Run s of a candidate scores x[s, i] on example i; S runs (seeds), N examples, the same for every
candidate:

    x[s, i] = mu + example[i] + seed[s] + noise[s, i]

with independent, zero-mean, random effects of examples and of seeds. The mean over both then has the variance

    var(example) / N  +  var(seed) / S  +  var(noise) / (S N)

and is estimated without bias by (MS_examples + MS_seeds - MS_noise) / (S N), the mean squares of the two-way
layout without replication (Searle, Casella and McCulloch, Variance Components, 1992, ch. 4). MS_noise comes
off because the spread of the examples' means and that of the seeds' means both contain the noise. Student's t
with the degrees of freedom of Satterthwaite (1946) gives the intervals.

What this assumes: examples are a random sample of those that matter; the seeds of two candidates are
independent (where they share minibatches, a difference is surer than stated); N is large enough for a mean of
N scores to be normal. Shares of 0 or 1 have no spread, so their interval is a point.

For a metric over the set, such as macro-averaged F1, x[s, i] is not a score of example i but its contribution to the
score of run s: the jackknife's pseudo-value, shifted so that the mean is the metric itself
(`search_space/metrics/base.py`). The model then describes the metric's first-order expansion in the examples: a
difference is the jackknife's with the same examples left out of both, and the spread between seeds, computed from the
means, is that of the metric. It ignores second-order terms, which matter where a class has a handful of examples.

With one run, noise and example cannot be told apart and the noise counts twice, which errs on the wide side.
Without a `SeedSd` from elsewhere, an interval from one run is about that trained network alone, not about its
configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean (or a difference of means) with its interval; NaN throughout if a score was not finite."""

    value: float
    std_err: float
    low: float
    high: float
    #: For a difference, the smaller number of the two.
    num_seeds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedSd:
    """Standard deviation, between runs, of the mean score on fixed examples; pooled over candidates."""

    sd: float
    dof: int


def estimate(scores: ArrayLike, *, seed_sd: SeedSd | None = None, level: float = 0.95) -> Estimate:
    """Mean over seeds and examples of scores [seeds, examples], or [examples] of one run."""
    return _combine([(+1, as_runs(scores))], seed_sd, level)


def paired_difference(a: ArrayLike, b: ArrayLike, *, seed_sd: SeedSd | None = None, level: float = 0.95) -> Estimate:
    """Mean of `a` minus mean of `b`: [seeds, examples] each, the same examples in the same order.

    Pairing takes the difficulty of an example out of the comparison. `seed_sd` stands in for both candidates'
    own spread between seeds. Give it whenever runs are few: two or three say little about a spread.
    """
    first, second = as_runs(a), as_runs(b)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"a pair needs the same examples, got {first.shape[1]} and {second.shape[1]}")
    return _combine([(+1, first), (-1, second)], seed_sd, level)


def as_runs(scores: ArrayLike) -> Floats:
    """Return scores as [seeds, examples]; scores of one run may come as [examples]. Raises ValueError."""
    runs = np.atleast_2d(np.asarray(scores, dtype=float))
    if runs.ndim != 2 or runs.shape[0] < 1 or runs.shape[1] < 2:
        raise ValueError(f"scores are [seeds, examples] with at least two examples, got {runs.shape}")
    return runs


def _combine(signed: Sequence[tuple[int, Floats]], seed_sd: SeedSd | None, level: float) -> Estimate:
    """Estimate the sum of the means of samples [S, N], each with its sign."""
    samples = [runs for _, runs in signed]
    num_seeds = min(len(runs) for runs in samples)
    if not all(np.isfinite(runs).all() for runs in samples):
        return Estimate(value=nan, std_err=nan, low=nan, high=nan, num_seeds=num_seeds)
    per_example = np.sum([sign * runs.mean(axis=0) for sign, runs in signed], axis=0)
    value = float(per_example.mean())

    # Terms of the variance with their degrees of freedom. The noise is part of all of them and counts once.
    examples = float(per_example.var(ddof=1)) / len(per_example)
    repeated = [runs for runs in samples if len(runs) > 1]
    noise = [_noise(runs) for runs in repeated]
    if seed_sd is not None:
        seeds = [sum(seed_sd.sd**2 / len(runs) for runs in samples)]
        noise, seeds_dof = [sum(noise)], [seed_sd.dof]
    else:
        seeds = [float(runs.mean(axis=1).var(ddof=1)) / len(runs) for runs in repeated]
        seeds_dof = [len(runs) - 1 for runs in repeated]
    variance = examples + sum(max(0.0, term - part) for term, part in zip(seeds, noise, strict=True))
    # The terms of the seeds estimate the variance without the part of the examples, so they bound it from below.
    # Without this bound it is 0 for two runs that are right on opposite examples: the noise outweighs the seeds.
    variance = max(variance, sum(seeds))
    if variance == 0.0:
        return Estimate(value=value, std_err=0.0, low=value, high=value, num_seeds=num_seeds)

    # The terms enter as they were measured: one that came out small without its noise is no surer for that.
    terms = zip((examples, *seeds), (len(per_example) - 1, *seeds_dof), strict=True)
    dof = 1 / sum((term / variance) ** 2 / term_dof for term, term_dof in terms)
    std_err = sqrt(variance)
    margin = std_err * float(student_t.ppf(0.5 + level / 2, dof))
    return Estimate(value=value, std_err=std_err, low=value - margin, high=value + margin, num_seeds=num_seeds)


def _noise(runs: Floats) -> float:
    """var(noise) / (S N) from runs [S, N], S > 1: what the means of seeds and of examples leave over."""
    rest = runs - runs.mean(axis=1, keepdims=True) - runs.mean(axis=0) + runs.mean()
    num_seeds, num_examples = runs.shape
    mean_square: float = float((rest**2).sum()) / ((num_seeds - 1) * (num_examples - 1))
    return mean_square / runs.size


def pooled_seed_sd(seed_means: Sequence[Sequence[float]]) -> SeedSd | None:
    """Pool the spread between seeds over candidates: one list of mean scores (a number per seed) for each.

    Assumes that all candidates vary alike. Means that are not finite are left out; None if nobody has two
    left.
    """
    finite = [means[np.isfinite(means)] for means in (np.asarray(row, dtype=float) for row in seed_means)]
    repeated = [means for means in finite if len(means) > 1]
    dof = sum(len(means) - 1 for means in repeated)
    if dof == 0:
        return None
    squares = sum(float(((means - means.mean()) ** 2).sum()) for means in repeated)
    return SeedSd(sd=sqrt(squares / dof), dof=dof)


def predictive_interval(seed_means: Sequence[float], seed_sd: SeedSd, *, level: float = 0.95) -> tuple[float, float]:
    """Where the mean score of one more run, with a new seed and on the same examples, will lie.

    mean +- t s sqrt(1 + 1/S), s being the pooled spread (Hahn and Meeker, Statistical Intervals, 1991, ch.
    4). The examples are the same ones, so their sampling error does not enter.
    """
    means = np.asarray(seed_means, dtype=float)
    margin = float(student_t.ppf(0.5 + level / 2, seed_sd.dof)) * seed_sd.sd * sqrt(1 + 1 / len(means))
    return float(means.mean()) - margin, float(means.mean()) + margin
