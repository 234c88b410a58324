"""How the recommended member of a front is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import ArrayLike

from autopeft.search_space.problem import Objective
from autopeft.studies.analysis.statistics import Estimate, SeedSd, as_runs, paired_difference


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
class Recommendation:
    """Numbers of the trials, and the comparisons that they follow from."""

    best: int
    recommended: int
    #: Includes the best one.
    tied: tuple[int, ...]
    #: By trial, for every other contender: its mean score minus that of the best.
    differences: Mapping[int, Estimate]


def costs(values: Mapping[str, float], objectives: Sequence[Objective]) -> tuple[float, ...]:
    """Return what a candidate costs, smaller is better: the objectives that are not qualities, in their order.

    Return the number of parameters if there is none.
    """
    declared = [objective for objective in objectives if not objective.is_quality]
    return tuple(objective.loss(values[objective.name]) for objective in declared) or (values["num_params"],)


def recommend(contenders: Sequence[Contender], *, seed_sd: SeedSd | None = None, level: float = 0.95) -> Recommendation:
    """Recommend the cheapest contender that the paired test cannot tell from the best one.

    Best is the highest mean. A contender is tied with it while the interval of their difference reaches 0.
    Every comparison is made at its own `level`, with no correction (Holm's, say) for their number: a
    correction calls more contenders tied, and a user loses by a worse candidate called tied. "Not
    distinguishable" is not "as good as": `differences` says how much worse the recommended one may be. A
    contender with a score that is not finite (a diverged run) is neither best nor tied. Raises ValueError if
    nobody is left.
    """
    means = {contender.trial: float(np.mean(as_runs(contender.scores))) for contender in contenders}
    sound = [contender for contender in contenders if isfinite(means[contender.trial])]
    if not sound:
        raise ValueError("no contender has finite scores")
    best = max(sound, key=lambda contender: means[contender.trial])
    differences = {
        contender.trial: paired_difference(contender.scores, best.scores, seed_sd=seed_sd, level=level)
        for contender in contenders
        if contender is not best
    }
    tied = [contender for contender in sound if contender is best or differences[contender.trial].high >= 0]
    cheapest = min(tied, key=lambda contender: (contender.costs, -means[contender.trial]))
    return Recommendation(
        best=best.trial,
        recommended=cheapest.trial,
        tied=tuple(contender.trial for contender in tied),
        differences=differences,
    )
