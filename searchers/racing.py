"""Racing: the candidates that continue at a rung, because their end may still be the best or the cheapest as good."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from autopeft.search_space.problem import SEARCH, Objective, Problem, Trial
from autopeft.searchers.courses import Extrapolation, at_rung

#: A candidate stops where the probability that it ends as good is below this (docs/searchers.md, "Rungs").
LEAST_CHANCE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """A training at a rung: its held-out loss there, its cost, and its `final` loss of the quality once it has one.

    `rival`: whether the search proposed it, and it is not beyond a bound. A baseline may lie outside of the space, and
    be better than all in it; so may be what learns more than the bound of another metric permits.
    """

    loss: float
    cost: float
    final: float | None = None
    rival: bool = True


def racing(batch: Sequence[Course], others: Sequence[Course], margin: float) -> list[int]:
    """Return the indices of the candidates of a batch that continue.

    `others`: all trainings that ever were at this rung. What every one ends with is extrapolated from its loss here;
    the trainings that have ended show how well that works, so that many continue where the rung says little about the
    end. A candidate continues if it may be within `margin` of the best end, and if it is cheaper than all that are more
    likely than not within the margin, or may itself be the best. So a cheaper one never stops a better one. Only rivals
    count in these comparisons. All continue while too few trainings have ended. A loss that is not finite stops.
    """
    finite = [i for i, course in enumerate(batch) if np.isfinite(course.loss)]
    known = [course for course in others if course.final is not None and np.isfinite([course.loss, course.final]).all()]
    line = Extrapolation.of(np.array([c.loss for c in known]), np.array([c.final for c in known], dtype=float))
    if line is None or not finite:
        return finite
    pool = [*(batch[i] for i in finite), *(c for c in others if c.rival and np.isfinite(c.loss))]
    means = line(np.array([course.loss for course in pool]))
    deviations = np.full(len(pool), line.variance**0.5)
    for k, course in enumerate(pool):
        if course.final is not None and np.isfinite(course.final):
            means[k], deviations[k] = course.final, 1e-12
    costs = np.array([course.cost for course in pool])
    best = means.min()
    as_good = ndtr((best + margin - means) / deviations)
    cheapest = costs[as_good >= 0.5].min()
    may_be_best = ndtr((best - means) / deviations) >= LEAST_CHANCE
    going = (as_good >= LEAST_CHANCE) & ((costs <= cheapest) | may_be_best)
    return [i for k, i in enumerate(finite) if going[k]]


def continuing(problem: Problem, trials: Iterable[Trial], rung: float, losses: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of the candidates of a batch that continue, see `racing`.

    `trials`: of the study so far; `losses`: of each candidate, at the rung, then its costs in the order of the
    objectives.
    """
    quality, cost = (problem.objectives[problem.first(quality=wanted)] for wanted in (True, False))
    others = list(_courses(quality, cost, trials, rung))
    best = min((course.final for course in others if course.final is not None), default=0.0)
    place = [objective for objective in problem.objectives if not objective.is_quality].index(cost)
    batch = [Course(loss=loss, cost=costs[place]) for loss, *costs in losses]
    return racing(batch, others, problem.margin(quality.value(best)))


def _courses(quality: Objective, cost: Objective, trials: Iterable[Trial], rung: float) -> Iterator[Course]:
    """Yield the courses of all trials that were at this rung, of the search and of the baselines."""
    for trial in trials:
        loss = at_rung(trial.measurement, rung)
        if loss is not None and trial.of is None:
            final = quality.loss(trial.values[quality.name]) if trial.state == "complete" else None
            rival = trial.role == SEARCH and trial.violation <= 0
            yield Course(loss=loss, cost=trial.values[cost.name], final=final, rival=rival)
