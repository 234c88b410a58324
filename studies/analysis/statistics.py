"""Which differences are real: standard errors, paired differences, intervals for a new seed.

Model. Run s of a candidate scores x[s, i] on example i; S runs (seeds), N examples, the same for every
candidate:

    x[s, i] = mu + example[i] + seed[s] + noise[s, i]

with independent, zero-mean, random effects of examples and of seeds. The mean over both then has the variance

    var(example) / N  +  var(seed) / S  +  var(noise) / (S N)

and is estimated without bias by (MS_examples + MS_seeds - MS_noise) / (S N), the mean squares of the two-way
layout without replication (Searle, Casella and McCulloch, Variance Components, 1992, ch. 4). MS_noise comes
off because the spread of the examples' means and that of the seeds' means both contain the noise. `_half_width`
gives the intervals.

Two or three seeds say little about a candidate's own spread, and candidates vary differently (a head alone hardly at
all). So the variance of each is moderated towards that of all others, by as much as they are alike: `SeedSpread`.
Scores of 0 and 1 get the pseudo-examples of Agresti and Coull (1998), and pairs of them those of Bonett and Price
(2012), because the normal interval is too narrow near 0 and 1 and a point at them.
`python -m autopeft.benchmarks coverage` simulates all of these intervals.

What this assumes: examples are a random sample of those that matter; the seeds of two candidates are
independent (where they share minibatches, a difference is surer than stated); N is large enough for a mean of
N scores to be normal.

For a metric over the set, such as macro-averaged F1, x[s, i] is not a score of example i but its contribution to the
score of run s: the jackknife's pseudo-value, shifted so that the mean is the metric itself
(`search_space/metrics/base.py`). The model then describes the metric's first-order expansion in the examples: a
difference is the jackknife's with the same examples left out of both, and the spread between seeds, computed from the
means, is that of the metric. It ignores second-order terms, which matter where a class has a handful of examples.

With one run, noise and example cannot be told apart and the noise counts twice, which errs on the wide side.
Without a `SeedSpread`, an interval from one run is about that trained network alone, not about its configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, inf, isinf, log, nan, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import digamma, gammaincinv, gammaln, polygamma, stdtr, stdtrit

Floats = NDArray[np.float64]
LEVEL = 0.95
#: Quantiles by which the unknown variance between seeds is integrated.
POINTS = 128
#: Grid of `SeedSpread`: variances as multiples of the pooled one, and degrees of freedom. With 16, candidates vary
#: nearly alike; with 1, their spreads tell next to nothing about each other.
GRID_FACTORS, GRID_DOFS = np.exp(np.linspace(-5, 4, 46)), np.array([1.0, 2.0, 4.0, 8.0, 16.0])
#: Pseudo-examples for scores of 0 and 1, and for their differences.
COULL, PRICE = (0.0, 0.0, 1.0, 1.0), (-1.0, 1.0)
#: More seeds than this are no advice.
MOST_SEEDS = 20
#: A bound for advice on examples.
MOST_EXAMPLES = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean (or a difference of means) with its interval; NaN throughout if a score was not finite."""

    value: float
    std_err: float
    low: float
    high: float
    #: For a difference, the smaller number of the two.
    num_seeds: int

    def signed(self, sign: float) -> Estimate:
        """Return the estimate of the negative for `sign` -1.0, and itself for 1.0."""
        low, high = sorted((sign * self.low, sign * self.high))
        return replace(self, value=sign * self.value, low=low, high=high)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SeedSpread:
    """What several candidates show about the spread, between runs, of the mean score on fixed examples.

    The variance of a candidate is drawn from a scaled inverse chi-squared distribution with `dofs` degrees of freedom
    around `variances`: the model of Smyth (2004, Linear Models and Empirical Bayes Methods). Both are unknown, so this
    is their posterior distribution on a grid, with `weights`; each is [points].
    """

    variances: Floats
    dofs: Floats
    weights: Floats

    @classmethod
    def of(cls, scores: Sequence[ArrayLike]) -> SeedSpread | None:
        """Return the spread that scores [seeds, examples] of several candidates show; None if none has two runs.

        Runs with a score that is not finite are left out.
        """
        finite = [runs[np.isfinite(runs).all(axis=1)] for runs in map(as_runs, scores)]
        repeated = [runs.mean(axis=1) for runs in finite if len(runs) > 1]
        if not repeated:
            return None
        own = np.array([means.var(ddof=1) for means in repeated])
        own_dofs = np.array([len(means) - 1.0 for means in repeated])
        centre = float((own_dofs * own).sum() / own_dofs.sum())
        if centre == 0.0:  # the seed makes no difference, as with pretrained LoRAs
            return cls(variances=np.zeros(1), dofs=np.ones(1), weights=np.ones(1))
        variances, dofs = (grid.ravel() for grid in np.meshgrid(centre * GRID_FACTORS, GRID_DOFS))
        # The densities of scaled F distributions, without the factors that are equal at all points.
        d0, v0 = dofs[:, None], variances[:, None]
        density = gammaln((own_dofs + d0) / 2) - gammaln(d0 / 2) + d0 / 2 * np.log(d0 * v0)
        density -= (own_dofs + d0) / 2 * np.log(d0 * v0 + own_dofs * own)
        weights = np.exp(density.sum(axis=1) - density.sum(axis=1).max())
        return cls(variances=variances, dofs=dofs, weights=weights / weights.sum())

    def moderated(self, runs: Floats) -> tuple[float, float]:
        """Return the variance between runs [seeds, examples] of one candidate, and its degrees of freedom.

        They have the mean and the variance that the logarithm of the variance has in the posterior distribution.
        """
        own_dof = len(runs) - 1
        own = float(runs.mean(axis=1).var(ddof=1)) if own_dof else 0.0
        dofs = self.dofs + own_dof
        variances = (self.dofs * self.variances + own_dof * own) / dofs
        if not variances.any():
            return 0.0, inf
        logs = np.log(dofs * variances / 2) - digamma(dofs / 2)
        mean = float(self.weights @ logs)
        half = _inverse_trigamma(float(self.weights @ (polygamma(1, dofs / 2) + (logs - mean) ** 2)))
        return exp(mean + float(digamma(half)) - log(half)), 2 * half


def _inverse_trigamma(value: float) -> float:
    """Return x > 0 with trigamma(x) = value > 0, by Newton's method on 1 / trigamma, which is nearly linear."""
    x = 0.5 + 1 / value
    for _ in range(50):
        found = float(polygamma(1, x))
        step = found * (1 - found / value) / float(polygamma(2, x))
        x += step
        if abs(step) < 1e-9 * x:
            break
    return x


def estimate(scores: ArrayLike, *, spread: SeedSpread | None = None, level: float = LEVEL) -> Estimate:
    """Mean over seeds and examples of scores [seeds, examples], or [examples] of one run."""
    return _terms([(+1, as_runs(scores))], spread).estimate(level)


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, spread: SeedSpread | None = None, level: float = LEVEL
) -> Estimate:
    """Mean of `a` minus mean of `b`: [seeds, examples] each, the same examples in the same order.

    Pairing takes the difficulty of an example out of the comparison. Give `spread` whenever runs are few: two or three
    say little about their own.
    """
    return _difference(a, b, spread).estimate(level)


def seeds_to_show(
    a: ArrayLike, b: ArrayLike, at_least: float, *, spread: SeedSpread | None = None, level: float = LEVEL
) -> int | None:
    """Return the number of seeds of each with which the interval of `paired_difference` would be above `at_least`.

    It is more than the smaller number at present, and assumes that the difference and the spreads stay as they are;
    who has more seeds keeps them. None if it takes more than `MOST_SEEDS`, and without any spread between seeds: two
    single runs say nothing of it.
    """
    terms = _difference(a, b, spread)
    counts = range(terms.num_seeds + 1, MOST_SEEDS + 1) if terms.seeds else ()
    return next((n for n in counts if terms.with_seeds(n).estimate(level).low >= at_least), None)


def examples_to_show(
    a: ArrayLike, b: ArrayLike, at_least: float, *, spread: SeedSpread | None = None, level: float = LEVEL
) -> int | None:
    """Return the number of examples that would do it together with `MOST_SEEDS` seeds.

    None if the spread between so many seeds alone is too wide, or if the difference is below `at_least`.
    """
    terms = _difference(a, b, spread).with_seeds(MOST_SEEDS)

    def shown(num_examples: int) -> bool:
        return terms.with_examples(num_examples).estimate(level).low >= at_least

    if not terms.seeds or not shown(MOST_EXAMPLES):
        return None
    low, high = 1, MOST_EXAMPLES
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if shown(middle) else (middle + 1, high)
    return low


def as_runs(scores: ArrayLike) -> Floats:
    """Return scores as [seeds, examples]; scores of one run may come as [examples]. Raises ValueError."""
    runs = np.atleast_2d(np.asarray(scores, dtype=float))
    if runs.ndim != 2 or runs.shape[0] < 1 or runs.shape[1] < 2:
        raise ValueError(f"scores are [seeds, examples] with at least two examples, got {runs.shape}")
    return runs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Terms:
    """A sum of signed means and the terms of its variance. `counts` (of seeds), `seeds`, `noise`: one per sample.

    `centre`: the middle of the interval.
    """

    value: float
    centre: float
    num_seeds: int
    num_examples: int
    examples: float
    counts: tuple[int, ...] = ()
    seeds: tuple[float, ...] = ()
    noise: tuple[float, ...] = ()
    dofs: tuple[float, ...] = ()

    def estimate(self, level: float) -> Estimate:
        if not np.isfinite(self.value):
            return Estimate(value=nan, std_err=nan, low=nan, high=nan, num_seeds=self.num_seeds)
        # The noise is part of all terms and counts once. The terms of the seeds estimate the variance without the part
        # of the examples, so they bound it from below. Without this bound it is 0 for two runs that are right on
        # opposite examples: the noise outweighs the seeds.
        seeds = sum(self.seeds)
        examples = max(self.examples - sum(self.noise), self.examples / 2 - seeds, 0.0)
        std_err = sqrt(examples + seeds)
        margin = std_err
        if std_err > 0.0:
            # Spreads of two samples come from the same candidates, so their errors do not average out.
            weighted = sum(term / dof for term, dof in zip(self.seeds, self.dofs, strict=True))
            dof = seeds / weighted if weighted else inf
            margin = _half_width(examples, seeds, self.num_examples - 1, dof, level)
        return Estimate(
            value=self.value,
            std_err=std_err,
            low=self.centre - margin,
            high=self.centre + margin,
            num_seeds=self.num_seeds,
        )

    def with_seeds(self, count: int) -> _Terms:
        """Return the terms that at least `count` seeds of each sample would have, if all variances stay as they are."""
        counts = tuple(max(count, own) for own in self.counts)
        shares = [own / more for own, more in zip(self.counts, counts, strict=True)]
        noise = tuple(part * share for part, share in zip(self.noise, shares, strict=True))
        return replace(
            self,
            num_seeds=count,
            examples=max(0.0, self.examples - sum(self.noise)) + sum(noise),
            counts=counts,
            seeds=tuple(term * share for term, share in zip(self.seeds, shares, strict=True)),
            noise=noise,
            dofs=tuple(dof + more - own for dof, own, more in zip(self.dofs, self.counts, counts, strict=True)),
        )

    def with_examples(self, count: int) -> _Terms:
        """Return the terms for `count` examples; the part of the noise in the terms of the seeds shrinks with them."""
        share = self.num_examples / count
        noise = [min(term, part) for term, part in zip(self.seeds, self.noise, strict=True)]
        return replace(
            self,
            num_examples=count,
            examples=self.examples * share,
            seeds=tuple(term - part * (1 - share) for term, part in zip(self.seeds, noise, strict=True)),
            noise=tuple(part * share for part in self.noise),
        )


def _half_width(examples: float, seeds: float, examples_dof: float, seeds_dof: float, level: float) -> float:
    """Return half the width of the interval of a mean with two terms of variance and their degrees of freedom.

    The interval of Behrens and Fisher: the true variance between seeds is `seeds` times d / chi2(d). Given that, the
    mean follows Student's t with the degrees of freedom of Satterthwaite (1946). His approximation for both terms is
    too narrow with two seeds: where their estimate comes out small by chance, it has little weight there too.
    """
    shares = (np.arange(POINTS) + 0.5) / POINTS
    factors = np.ones(1) if isinf(seeds_dof) else seeds_dof / (2 * gammaincinv(seeds_dof / 2, shares))
    variances = examples + seeds * factors
    scales = np.sqrt(variances)
    dofs = examples_dof * (variances / examples) ** 2 if examples else inf
    tail = (1 - level) / 2

    def excess(width: float) -> float:
        return float(stdtr(dofs, -width / scales).mean()) - tail

    # The widest scale alone bounds the width; a little more, because both sides are rounded.
    return float(brentq(excess, 0.0, 1.01 * scales.max() * -float(stdtrit(examples_dof, tail))))


def _difference(a: ArrayLike, b: ArrayLike, spread: SeedSpread | None) -> _Terms:
    first, second = as_runs(a), as_runs(b)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"a pair needs the same examples, got {first.shape[1]} and {second.shape[1]}")
    return _terms([(+1, first), (-1, second)], spread)


def _terms(signed: Sequence[tuple[int, Floats]], spread: SeedSpread | None) -> _Terms:
    """Return the sum of the means of samples [S, N], each with its sign."""
    samples = [runs for _, runs in signed]
    num_seeds, num_examples = min(map(len, samples)), samples[0].shape[1]
    if not all(np.isfinite(runs).all() for runs in samples):
        return _Terms(value=nan, centre=nan, num_seeds=num_seeds, num_examples=num_examples, examples=nan)
    per_example = np.sum([sign * runs.mean(axis=0) for sign, runs in signed], axis=0)
    widened = per_example
    # The scores of a metric to minimise are negative.
    if all(((runs == 0) | (abs(runs) == 1)).all() for runs in samples):
        coull = np.array(COULL) * (-1.0 if (samples[0] < 0).any() else 1.0)
        # Those of a difference are made for pairs of single runs; a mean over several runs varies less.
        widened = np.append(per_example, coull if len(samples) == 1 else np.array(PRICE) / sqrt(num_seeds))
    counts, seeds, noise, dofs = [], [], [], []
    for runs in samples:
        if spread is not None:
            variance, dof = spread.moderated(runs)
        elif len(runs) > 1:
            variance, dof = float(runs.mean(axis=1).var(ddof=1)), len(runs) - 1
        else:
            continue
        counts.append(len(runs))
        seeds.append(variance / len(runs))
        noise.append(_noise(runs) if len(runs) > 1 else 0.0)
        dofs.append(dof)
    return _Terms(
        value=float(per_example.mean()),
        centre=float(widened.mean()),
        num_seeds=num_seeds,
        num_examples=num_examples,
        examples=float(widened.var(ddof=1)) / len(widened),
        counts=tuple(counts),
        seeds=tuple(seeds),
        noise=tuple(noise),
        dofs=tuple(dofs),
    )


def _noise(runs: Floats) -> float:
    """var(noise) / (S N) from runs [S, N], S > 1: what the means of seeds and of examples leave over."""
    rest = runs - runs.mean(axis=1, keepdims=True) - runs.mean(axis=0) + runs.mean()
    num_seeds, num_examples = runs.shape
    mean_square: float = float((rest**2).sum()) / ((num_seeds - 1) * (num_examples - 1))
    return mean_square / runs.size


def predictive_interval(scores: ArrayLike, spread: SeedSpread, *, level: float = LEVEL) -> tuple[float, float]:
    """Where the mean score of one more run, with a new seed and on the same examples, will lie.

    mean +- t s sqrt(1 + 1/S), s being the moderated spread of these runs, scores [seeds, examples] (Hahn and Meeker,
    Statistical Intervals, 1991, ch. 4). The examples are the same ones, so their sampling error does not enter.
    """
    runs = as_runs(scores)
    variance, dof = spread.moderated(runs)
    margin = float(stdtrit(dof, 0.5 + level / 2)) * sqrt(variance * (1 + 1 / len(runs)))
    return float(runs.mean()) - margin, float(runs.mean()) + margin
