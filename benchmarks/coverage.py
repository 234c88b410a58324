"""Simulations of what a study says: coverage of its intervals, and how good its recommendations are.

Scores come from the model that `studies/analysis/statistics.py` states, on a probit scale for accuracy: candidate k is
right on example i in run s with the probability

    Phi(a[k] + example[i] + interaction[k, i] + seed[k, s])

so that its true accuracy is Phi(a / sqrt(1 + sum of the variances)). A loss is the sum of such effects; its examples
are exponential, which is skew. Spreads between seeds differ between candidates by up to a factor of ten ("unequal").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp, log
from typing import Any, Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from autopeft.search_space.metrics.base import POINT
from autopeft.studies.analysis.recommendation import Contender, first_look, recommend
from autopeft.studies.analysis.statistics import SeedSpread, estimate, paired_difference, predictive_interval
from autopeft.studies.reports.markdown import table

Floats = NDArray[np.float64]
#: Standard deviations of examples, interactions and, in the mean, seeds: on the probit scale, or of a loss in nats. The
#: accuracy of a run then varies between seeds by 1.2 points; in the demo's space it is 1.0 to 1.7.
EXAMPLE_SD, INTERACTION_SD, SEED_SD = 1.5, 0.5, 0.06
#: Factors of the spread between seeds by candidate.
EQUAL, UNEQUAL = (1.0,) * 6, (0.2, 1.0, 0.7, 1.4, 2.0, 0.4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A simulated candidate. `quality`: its true accuracy, or the negative of its true loss in nats."""

    quality: float
    seed_sd: float
    cost: float = 1.0


class Examples:
    """Drawn validation examples on which candidates are scored."""

    def __init__(self, rng: Generator, num: int, metric: Literal["accuracy", "loss"]) -> None:
        self.rng = rng
        self.metric = metric
        self.effects = rng.normal(0, EXAMPLE_SD, num) if metric == "accuracy" else 1 - rng.exponential(1, num)

    def interactions(self) -> Floats:
        """Draw the effects [examples] of one candidate."""
        return self.rng.normal(0, INTERACTION_SD, len(self.effects))

    def runs(self, candidate: Candidate, interactions: Floats, num_seeds: int) -> Floats:
        """Draw scores [seeds, examples] of new runs, larger is better."""
        seeds = self.rng.normal(0, candidate.seed_sd, (num_seeds, 1))
        shift = self.effects + interactions + seeds
        if self.metric == "loss":
            return candidate.quality + shift + self.rng.normal(0, 0.3, shift.shape)
        total = 1 + EXAMPLE_SD**2 + INTERACTION_SD**2 + candidate.seed_sd**2
        right = ndtr(float(ndtri(candidate.quality)) * total**0.5 + shift)
        hits: Floats = (self.rng.random(shift.shape) < right).astype(float)
        return hits


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is simulated: six finalists of about this quality. `spreads`: between seeds, equal or unequal."""

    metric: Literal["accuracy", "loss"]
    quality: float
    num_examples: int
    num_seeds: int
    spreads: Literal["equal", "unequal"]


_QUALITIES: tuple[tuple[Literal["accuracy", "loss"], float], ...] = (
    ("accuracy", 0.6),
    ("accuracy", 0.97),
    ("loss", -1.0),
)
_SPREADS: tuple[Literal["equal", "unequal"], ...] = ("equal", "unequal")
INTERVAL_SCENARIOS = tuple(
    Setting(metric=metric, quality=quality, num_examples=examples, num_seeds=seeds, spreads=spreads)
    for metric, quality in _QUALITIES
    for examples in (100, 1000)
    for seeds in (2, 3, 5)
    for spreads in _SPREADS
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Shares of the intervals that contain the true value: of means, of differences to the first, of new runs."""

    setting: Setting
    mean: float
    difference: float
    new_run: float


def coverage(setting: Setting, *, simulations: int, seed: int = 0) -> Coverage:
    """Simulate studies of six finalists, and count the 95 % intervals that contain the truth."""
    rng = np.random.default_rng([seed, setting.num_examples, setting.num_seeds, round(1000 * abs(setting.quality))])
    factors = EQUAL if setting.spreads == "equal" else UNEQUAL
    gap = 0.02 if setting.metric == "accuracy" else 0.05
    candidates = [
        Candidate(quality=setting.quality - gap * (k % 3), seed_sd=SEED_SD * factor) for k, factor in enumerate(factors)
    ]
    hits: dict[str, list[bool]] = {"mean": [], "difference": [], "new_run": []}
    for _ in range(simulations):
        examples = Examples(rng, setting.num_examples, setting.metric)
        own = [examples.interactions() for _ in candidates]
        scores = [examples.runs(c, effects, setting.num_seeds) for c, effects in zip(candidates, own, strict=True)]
        spread = SeedSpread.of(scores)
        assert spread is not None
        for candidate, effects, runs in zip(candidates, own, scores, strict=True):
            found = estimate(runs, spread=spread)
            hits["mean"].append(found.low <= candidate.quality <= found.high)
            low, high = predictive_interval(runs, spread)
            hits["new_run"].append(low <= float(examples.runs(candidate, effects, 1).mean()) <= high)
            if candidate is not candidates[0]:
                found = paired_difference(runs, scores[0], spread=spread)
                truth = candidate.quality - candidates[0].quality
                hits["difference"].append(found.low <= truth <= found.high)
    return Coverage(setting=setting, **{name: float(np.mean(found)) for name, found in hits.items()})


#: Losses of accuracy of the members of a front against its best one, from the cheapest to the dearest.
FRONTS: dict[str, tuple[float, ...]] = {
    "one step": (0.08, 0.06, 0.05, 0.0),
    "rising": (0.04, 0.02, 0.01, 0.005, 0.0),
    "knee": (0.06, 0.03, 0.002, 0.001, 0.0),
    "equal": (0.0, 0.0, 0.0, 0.0),
    "just beyond the margin": (0.0101, 0.0101, 0.0101, 0.0101, 0.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """A front, one of `FRONTS` by name, and how it is evaluated; `num_seeds`: on average."""

    front: str
    num_examples: int
    num_seeds: int


CHOICE_SCENARIOS = tuple(
    Situation(front=front, num_examples=examples, num_seeds=seeds)
    for front in FRONTS
    for examples, seeds in ((1000, 2), (1000, 3), (1000, 6), (10_000, 3))
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """How studies recommend in one situation.

    Shares of the studies: `cheaper`: a member that is cheaper than the best one by estimate was recommended; `wrong`:
    it was, and is worse than the truly best one by more than the margin; `worse`: the recommended member, the best by
    estimate included, is. `cost`: of the recommended member over the dearest of the truly best ones, the geometric
    mean. `runs`: per finalist.
    """

    situation: Situation
    cheaper: float
    wrong: float
    worse: float
    cost: float
    runs: float


def choices(situation: Situation, *, simulations: int, seed: int = 0) -> Choices:
    """Simulate the end of studies: first seeds, a second look at what decides, the recommendation."""
    losses = FRONTS[situation.front]
    rng = np.random.default_rng([seed, situation.num_examples, situation.num_seeds, *situation.front.encode()])
    candidates = [
        Candidate(quality=0.7 - loss, seed_sd=SEED_SD * factor, cost=4.0**k)
        for k, (loss, factor) in enumerate(zip(losses, np.resize(UNEQUAL, len(losses)), strict=True))
    ]
    dearest = max(range(len(losses)), key=lambda k: (-losses[k], k))
    cheaper = wrong = worse = runs = 0
    ratio = 0.0
    for _ in range(simulations):
        examples = Examples(rng, situation.num_examples, "accuracy")
        chosen, best, used = _study(examples, candidates, situation.num_seeds)
        is_worse = losses[chosen] > POINT
        cheaper += chosen != best
        wrong += chosen != best and is_worse
        worse += is_worse
        runs += used
        ratio += log(candidates[chosen].cost / candidates[dearest].cost)
    return Choices(
        situation=situation,
        cheaper=cheaper / simulations,
        wrong=wrong / simulations,
        worse=worse / simulations,
        cost=exp(ratio / simulations),
        runs=runs / simulations / len(candidates),
    )


def _study(examples: Examples, candidates: Sequence[Candidate], num_seeds: int) -> tuple[int, int, int]:
    """Return the recommended candidate, the best one by estimate, and the number of runs."""
    own = [examples.interactions() for _ in candidates]
    first = first_look(num_seeds)
    scores = [examples.runs(c, effects, first) for c, effects in zip(candidates, own, strict=True)]
    for look in (1, 2):
        members = [
            Contender(trial=k, scores=runs, costs=(candidate.cost,))
            for k, (candidate, runs) in enumerate(zip(candidates, scores, strict=True))
        ]
        found = recommend(members, margin=POINT, spread=SeedSpread.of(scores))
        racing, more = found.second_look((num_seeds - first) * len(candidates), first)
        if look == 1 and more:
            for k in racing:
                scores[k] = np.vstack([scores[k], examples.runs(candidates[k], own[k], more)])
    return found.recommended, found.best, sum(map(len, scores))


def to_dict(intervals: Sequence[Coverage], found: Sequence[Choices]) -> dict[str, Any]:
    """Return both tables as plain data for JSON."""
    return {"intervals": [asdict(one) for one in intervals], "recommendations": [asdict(one) for one in found]}


def to_markdown(intervals: Sequence[Coverage], found: Sequence[Choices]) -> str:
    """Return both tables as Markdown."""
    coverages = [("metric", "examples", "seeds", "spreads", "mean", "difference", "new run")]
    for one in intervals:
        at = one.setting
        coverages.append(
            (
                f"{at.metric} {abs(at.quality):g}",
                f"{at.num_examples:,}",
                f"{at.num_seeds}",
                at.spreads,
                *_per_cent(one.mean, one.difference, one.new_run),
            )
        )
    choices_made = [("front", "examples", "seeds", "cheaper", "wrong", "worse", "cost", "runs")]
    for row in found:
        where = row.situation
        choices_made.append(
            (
                where.front,
                f"{where.num_examples:,}",
                f"{where.num_seeds}",
                *_per_cent(row.cheaper, row.wrong, row.worse),
                f"{row.cost:.2f}",
                f"{row.runs:.1f}",
            )
        )
    return f"{table(coverages, right=(1, 2, 4, 5, 6))}\n\n{table(choices_made, right=range(1, 8))}\n"


def _per_cent(first: float, second: float, third: float) -> tuple[str, str, str]:
    return f"{100 * first:.1f}", f"{100 * second:.1f}", f"{100 * third:.1f}"
