"""How the recommended member of a front is chosen: by non-inferiority to the best one, within a margin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from autopeft.search_space.metrics import Metric
from autopeft.search_space.problem import Objective
from autopeft.studies.analysis.statistics import (
    LEVEL,
    MOST_SEEDS,
    Estimate,
    SeedSpread,
    as_runs,
    examples_to_show,
    paired_difference,
    seeds_to_show,
)

#: How a member compares with the best one: "as good" is shown to be within the margin, "tied" is not distinguishable
#: from it but not shown to be within the margin either, "worse" is neither.
Standing = Literal["best", "as good", "tied", "worse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A member of the front.

    `scores`: [seeds, examples], larger is better (the negative of a loss).
    `costs`: smaller is better, in the order in which they count; see `costs`.
    """

    trial: int
    scores: ArrayLike
    costs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenCase:
    """A member that is cheaper than the recommended one and may be within the margin, and what would show it.

    `seeds`: of it and of the best one, if all estimates stay as they are; None: more than `MOST_SEEDS`. `examples`:
    with `MOST_SEEDS` seeds; None: no number. `num_seeds`, `num_examples`: those at present.
    """

    trial: int
    num_seeds: int
    num_examples: int
    seeds: int | None
    examples: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """Numbers of the trials, and the comparisons that they follow from.

    `margin`: the largest loss of quality that counts as none, in the unit of the metric. `standings`, `differences`: by
    trial; a difference is the mean score of a contender minus that of the best one, larger is better.
    """

    best: int
    recommended: int
    margin: float
    standings: Mapping[int, Standing]
    differences: Mapping[int, Estimate]
    #: The cheapest first.
    open: tuple[OpenCase, ...]
    #: Whether no other contender costs less than the recommended one.
    is_cheapest: bool

    def second_look(self, num_runs: int, num_seeds: int) -> tuple[frozenset[int], int]:
        """Return the trials that decide, and how many more seeds each of them gets from `num_runs` runs.

        They are the best one and the cheaper ones that may be as good, where more seeds can show it; the others have
        lost the race (Maron and Moore 1994, Hoeffding Races). None where `num_seeds` seeds of each have decided.
        """
        undecided = [case.trial for case in self.open if case.seeds is not None]
        racing = frozenset((self.best, *undecided) if undecided else ())
        return racing, min(num_runs // len(racing), max(0, MOST_SEEDS - num_seeds)) if racing else 0

    def reason(self, label: Callable[[int], str], metric: Metric) -> str:
        """Return in one or two sentences why this member is recommended; `label` names a trial."""
        best, margin = label(self.best), amount(self.margin, metric)
        if self.recommended != self.best:
            found = difference_text(self.differences[self.recommended], metric)
            name = label(self.recommended)
            text = f"{name} is the cheapest member shown to be within {margin} of the best, {best}: {found}."
        elif len(self.standings) == 1:
            text = f"{best} is the only member of the front."
        elif self.is_cheapest:
            text = f"{best} is the best, and the cheapest."
        elif not self.open:
            text = f"{best} is the best; by estimate, every cheaper member is worse by more than {margin}."
        else:
            text = f"{best} is the best, and no cheaper member is shown to be within {margin} of it."
        if not self.open:
            return text
        case = self.open[0]
        found = difference_text(self.differences[case.trial], metric)
        if case.seeds is not None:
            needed = f"about {case.seeds} seeds of both would show whether it is ({case.num_seeds} now)"
        elif case.examples is not None:
            needed = (
                f"more seeds cannot show whether it is, about {_round(case.examples):,} validation rows"
                f" ({case.num_examples:,} now) with {MOST_SEEDS} seeds would, or a larger margin, recommend.within"
            )
        elif case.num_seeds == 1:
            needed = "single runs cannot show whether it is"
        else:
            needed = (
                "neither seeds nor rows within reason would show whether it is, but a larger margin, recommend.within"
            )
        return f"{text} {label(case.trial)} is cheaper and may be within it, {found}: {needed}."


def first_look(num_seeds: int) -> int:
    """Return the seeds that every finalist gets before the first comparison: half of them, two where there are two."""
    return max(min(2, num_seeds), (num_seeds + 1) // 2)


def amount(value: float, metric: Metric) -> str:
    """Format an amount of a metric: points of a share, such as "1.0 points", or the number with the metric's name."""
    return f"{100 * value:.1f} points" if metric.unit == "share" else f"{value:.3g} {metric.name}"


def difference_text(found: Estimate, metric: Metric, *, named: bool = False) -> str:
    """Format a difference with its interval, in the metric's own direction: "-0.3 points (95 %: -0.9 to +0.3)".

    `named`: with the name of the metric, where it is not that of the comparison: "-0.3 points of macro-f1 (95 %: ...".
    """
    own = found.signed(1.0 if metric.maximise else -1.0)
    factor, digits = (100, ".1f") if metric.unit == "share" else (1, ".3g")
    value, low, high = (f"{factor * number:+{digits}}" for number in (own.value, own.low, own.high))
    points = f"points of {metric.name}" if named else "points"
    unit = points if metric.unit == "share" else metric.name
    return f"{value} {unit} (95 % interval {low} to {high})"


def _round(number: int) -> int:
    """Return a number with two significant digits."""
    return int(float(f"{number:.1e}"))


def costs(values: Mapping[str, float], objectives: Sequence[Objective]) -> tuple[float, ...]:
    """Return what a candidate costs, smaller is better: the objectives that are not qualities, in their order.

    Return the number of parameters if there is none.
    """
    declared = [objective for objective in objectives if not objective.is_quality]
    return tuple(objective.loss(values[objective.name]) for objective in declared) or (values["num_params"],)


def recommend(
    contenders: Sequence[Contender], *, margin: float, spread: SeedSpread | None = None, level: float = LEVEL
) -> Recommendation:
    """Recommend the cheapest contender whose quality is shown to be within the margin of the best.

    Best is the highest mean. Another one is as good if the interval of their paired difference lies above -margin
    (non-inferiority: Wellek, Testing Statistical Hypotheses of Equivalence and Noninferiority, 2010, ch. 2). An
    interval that reaches 0 does not suffice: "not distinguishable" is not "as good". Where nothing cheaper is shown to
    be as good, the best one is recommended. A comparison calls a member as good that is not with a probability of at
    most (1 - level) / 2. There are as many comparisons as cheaper members, and finalists are compared twice at most, so
    these errors can add up; `python -m autopeft.benchmarks coverage` simulates how far they do. The best one by
    estimate may itself not be the best.

    A contender with one run and no `spread` is never as good: its interval is about that one network. A contender with
    a score that is not finite (a diverged run) is worse. Raises ValueError if nobody is left.
    """
    means = {contender.trial: float(np.mean(as_runs(contender.scores))) for contender in contenders}
    sound = [contender for contender in contenders if isfinite(means[contender.trial])]
    if not sound:
        raise ValueError("no contender has finite scores")
    best = max(sound, key=lambda contender: means[contender.trial])
    differences = {
        contender.trial: paired_difference(contender.scores, best.scores, spread=spread, level=level)
        for contender in contenders
        if contender is not best
    }

    def standing(trial: int) -> Standing:
        if trial == best.trial:
            return "best"
        found = differences[trial]
        if min(found.low, found.value) >= -margin and (spread is not None or found.num_seeds > 1):
            return "as good"
        return "tied" if found.high >= 0 else "worse"

    def price(contender: Contender) -> tuple[tuple[float, ...], float]:
        return contender.costs, -means[contender.trial]

    standings = {contender.trial: standing(contender.trial) for contender in contenders}
    chosen = min((c for c in sound if standings[c.trial] in ("best", "as good")), key=price)
    undecided = [
        c
        for c in sound
        if standings[c.trial] in ("tied", "worse")
        and price(c) < price(chosen)
        and means[c.trial] - means[best.trial] > -margin
    ]

    def case(contender: Contender) -> OpenCase:
        pair = contender.scores, best.scores, -margin
        return OpenCase(
            trial=contender.trial,
            num_seeds=differences[contender.trial].num_seeds,
            num_examples=as_runs(best.scores).shape[1],
            seeds=seeds_to_show(*pair, spread=spread, level=level),
            examples=examples_to_show(*pair, spread=spread, level=level),
        )

    return Recommendation(
        best=best.trial,
        recommended=chosen.trial,
        margin=margin,
        standings=standings,
        differences=differences,
        open=tuple(case(contender) for contender in sorted(undecided, key=price)),
        is_cheapest=all(chosen.costs <= contender.costs for contender in sound),
    )
