"""The searcher `linas`: NSGA-II on the predictions of cheap models, whose best points are measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from autopeft.search_space.problem import DECLARED
from autopeft.searchers.bo.acquisition_optimizer import keys_of, unseen
from autopeft.searchers.bo.encoding import Mask, Rows
from autopeft.searchers.evolution import Evolution
from autopeft.searchers.genetic import best_first, children, ranks, spread_first

if TYPE_CHECKING:
    from autopeft.searchers.predictor import Predictor

#: Population of the evolution on predictions, and its generations.
PREDICTED = 256
GENERATIONS = 20
#: Least trials with values that a predictor is fitted to.
LEAST_TRIALS = 4


class Linas(Evolution):
    """Lightweight iterative neural architecture search (LINAS).

    Cummings et al. 2022, "A hardware-aware system for accelerating deep neural network optimization": a predictor of
    each measured objective is fitted to the trials, NSGA-II runs for many generations on predictions alone, and the
    best points it finds are measured. Declared costs are exact and not predicted.
    """

    name = "linas"
    summary = "evolution on cheap predictors of the measured objectives (LINAS, Cummings et al. 2022)"

    cached_per_update = (*Evolution.cached_per_update, "predicted_best", "predictors")

    @override
    def sources(self) -> Iterator[tuple[Iterable[Rows], Mapping[str, Any]]]:
        if len(self.completed) >= self.num_initial and self.evaluated.has_losses.sum() >= LEAST_TRIALS:
            correlation = {name: round(p.correlation, 3) for name, p in self.predictors.items()}
            yield [self.predicted_best], {"phase": "model", "rank_correlation": correlation}
        yield from super().sources()

    @cached_property
    def predicted_best(self) -> Rows:
        """Points [., G] with the best predictions, best first and far apart.

        The evaluated trials compete with them: points that a trial dominates, or that are next to one, come late.
        """
        rng = np.random.default_rng([self.seed, len(self.completed), 2])
        rows = np.vstack([self.fittest(PREDICTED), self.encoding.draw(PREDICTED, rng), self.encoding.smallest()])
        found, losses, violation = rows[:0], self.evaluated.losses[:0], self.evaluated.violation[:0]
        seen: set[bytes] = set()
        for _ in range(GENERATIONS):
            active = self.encoding.active(rows)
            new = unseen(keys_of(rows, active), seen)
            rows, active = rows[new], active[new]
            may = self.feasible(rows, active)
            predicted = self.predict(rows[may], active[may])
            found, losses = np.vstack([found, rows[may]]), np.vstack([losses, predicted])
            violation = np.append(violation, self.bound_violation(predicted))
            best = best_first(losses, violation)[:PREDICTED]
            found, losses, violation = found[best], losses[best], violation[best]
            if not len(found):
                break
            rows = children(self.encoding, found, PREDICTED, rng)
        evaluated = set(keys_of(self.evaluated.rows, self.evaluated.active))
        taken = np.array([key in evaluated for key in keys_of(found, self.encoding.active(found))], dtype=bool)
        return found[spread_first(losses, ranks(losses, violation), taken)]

    def predict(self, rows: Rows, active: Mask) -> Rows:
        """Return the losses [n, m] of points [n, G]: predicted where measured, exact where declared."""
        costs, features = self.encoding.costs(rows, active), self.encoding.features(rows, active)
        columns = [
            self.predictors[o.name].optimistic(features) if o.name in self.predictors else o.loss(costs[o.name])
            for o in self.problem.objectives
        ]
        return np.column_stack(columns)

    def bound_violation(self, losses: Rows) -> Rows:
        """Return how far losses [n, m] lie beyond the objectives' bounds, [n], as `Objective.violation` does."""
        worst = np.full(len(losses), -1.0)
        for objective, column in zip(self.problem.objectives, losses.T, strict=True):
            if objective.bound is not None:
                excess = (column - objective.loss(objective.bound)) / (abs(objective.bound) or 1.0)
                worst = np.maximum(worst, excess)
        return worst

    @cached_property
    def predictors(self) -> dict[str, Predictor]:
        """Predictors by measured objective.

        A failed trial counts as the worst one, so predictions are bad where many trials fail.
        """
        from autopeft.searchers.predictor import Predictor

        trials = self.evaluated
        features = self.encoding.features(trials.rows, trials.active)
        worst = np.nanmax(trials.losses, axis=0)
        losses = np.where(trials.has_losses[:, None], trials.losses, worst)
        measured = [i for i, o in enumerate(self.problem.objectives) if o.name not in DECLARED]
        return {self.problem.objectives[i].name: Predictor.fit(features, losses[:, i], self.seed) for i in measured}
