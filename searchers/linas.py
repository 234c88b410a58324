"""The searcher `linas`: NSGA-II on what cheap predictors say, measured trial by trial."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from autopeft.search_space.problem import DECLARED
from autopeft.searchers.bo.acquisition_optimizer import keys_of, unknown
from autopeft.searchers.bo.encoding import Mask, Rows
from autopeft.searchers.evolution import Evolution
from autopeft.searchers.genetic import best_first, children, ranks, spread_first

if TYPE_CHECKING:
    from autopeft.searchers.predictor import Predictor

#: Points that live at a time in the evolution on predictions, and its generations.
PREDICTED = 256
GENERATIONS = 20
#: Trials with losses from which a predictor is fitted.
LEAST_TRIALS = 4


class Linas(Evolution):
    """Lightweight iterative neural architecture search (Cummings et al. 2022, "A hardware-aware system for accelerating
    deep neural network optimization"): the trials teach a predictor of each measured objective, NSGA-II runs for many
    generations on predictions alone, and the best of what it finds is measured. What is declared of an architecture is
    known and not predicted.
    """

    name = "linas"
    summary = "evolution on cheap predictors of the measured objectives (LINAS, Cummings et al. 2022)"

    of_ended = (*Evolution.of_ended, "foreseen", "predictors")

    def sources(self) -> Iterator[tuple[Iterable[Rows], Mapping[str, Any]]]:
        if len(self.completed) >= self.num_initial and self.ended.has_losses.sum() >= LEAST_TRIALS:
            correlation = {name: round(p.correlation, 3) for name, p in self.predictors.items()}
            yield [self.foreseen], {"phase": "model", "rank_correlation": correlation}
        yield from super().sources()

    @cached_property
    def foreseen(self) -> Rows:
        """[., G]: the points with the best predictions, best first and far apart. The trials compete with them: what
        they dominate, or what is next to them, comes late.
        """
        rng = np.random.default_rng([self.seed, len(self.completed), 2])
        rows = np.vstack([self.fittest(PREDICTED), self.encoding.draw(PREDICTED, rng), self.encoding.smallest()])
        found, losses, violation = rows[:0], self.ended.losses[:0], self.ended.violation[:0]
        seen: set[bytes] = set()
        for _ in range(GENERATIONS):
            active = self.encoding.active(rows)
            new = unknown(keys_of(rows, active), seen)
            rows, active = rows[new], active[new]
            may = self.admitted(rows, active)
            predicted = self.predicted(rows[may], active[may])
            found, losses = np.vstack([found, rows[may]]), np.vstack([losses, predicted])
            violation = np.append(violation, self.beyond(predicted))
            best = best_first(losses, violation)[:PREDICTED]
            found, losses, violation = found[best], losses[best], violation[best]
            if not len(found):
                break
            rows = children(self.encoding, found, PREDICTED, rng)
        ended = set(keys_of(self.ended.rows, self.ended.active))
        taken = np.array([key in ended for key in keys_of(found, self.encoding.active(found))], dtype=bool)
        return found[spread_first(losses, ranks(losses, violation), taken)]

    def predicted(self, rows: Rows, active: Mask) -> Rows:
        """[n, G] -> [n, m]"""
        costs, features = self.encoding.costs(rows, active), self.encoding.features(rows, active)
        columns = [
            self.predictors[o.name].optimistic(features) if o.name in self.predictors else o.loss(costs[o.name])
            for o in self.problem.objectives
        ]
        return np.column_stack(columns)

    def beyond(self, losses: Rows) -> Rows:
        """[n, m] -> [n]: how far beyond the objectives' bounds, as `Objective.violation`."""
        worst = np.full(len(losses), -1.0)
        for objective, column in zip(self.problem.objectives, losses.T, strict=True):
            if objective.bound is not None:
                excess = (column - objective.loss(objective.bound)) / (abs(objective.bound) or 1.0)
                worst = np.maximum(worst, excess)
        return worst

    @cached_property
    def predictors(self) -> dict[str, Predictor]:
        """By measured objective. A trial that failed counts as the worst: where many fail, nothing is promised."""
        from autopeft.searchers.predictor import Predictor

        ended = self.ended
        features = self.encoding.features(ended.rows, ended.active)
        worst = np.nanmax(ended.losses, axis=0)
        losses = np.where(ended.has_losses[:, None], ended.losses, worst)
        measured = [i for i, o in enumerate(self.problem.objectives) if o.name not in DECLARED]
        return {self.problem.objectives[i].name: Predictor.fit(features, losses[:, i], self.seed) for i in measured}
