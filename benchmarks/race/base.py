"""A race problem: a search problem whose true values are known, and with them its true front."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import ArrayLike

from autopeft.search_space.architecture import digest
from autopeft.search_space.problem import Measurement, Problem
from autopeft.search_space.spaces.genes import Assignment
from autopeft.studies.analysis.pareto import Floats, hypervolume, scaled

#: The known front's nadir plus this share of its range is the corner up to which hypervolumes count, as in a study.
MARGIN = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceProblem:
    """A problem with a known answer.

    `values`: genes -> noise-free metrics, which no searcher sees; measurements have normal noise of `std_err`.
    `front`: [n, m] losses of the true front; `reference`: [m], in coordinates; `best`: the hypervolume of the front.
    """

    name: str
    summary: str
    problem: Problem
    values: Callable[[Assignment], Mapping[str, float]]
    std_err: Mapping[str, float]
    front: Floats
    reference: Floats
    best: float

    @classmethod
    def of(
        cls,
        name: str,
        summary: str,
        problem: Problem,
        values: Callable[[Assignment], Mapping[str, float]],
        std_err: Mapping[str, float],
        points: Mapping[str, ArrayLike],
    ) -> RaceProblem:
        """Return a problem whose front is that of `points`: columns [n] by objective, the true front among them."""
        table = np.stack([o.loss(np.asarray(points[o.name], dtype=float)) for o in problem.objectives], axis=1)
        front = pareto(table)
        spread = scaled(front, problem.objectives)
        reference = spread.max(axis=0) + MARGIN * np.ptp(spread, axis=0)
        return cls(
            name=name,
            summary=summary,
            problem=problem,
            values=values,
            std_err=std_err,
            front=front,
            reference=reference,
            best=hypervolume(spread, reference),
        )

    @property
    def key(self) -> str:
        """A digest of space, values, noise and scores: results of two problems can be compared if it is the same."""
        space = self.problem.space
        genes = [[gene.name, repr(gene.domain)] for gene in space.genes]
        probes = [self.losses(self.values(space.sample(Random(seed)))) for seed in range(8)]
        numbers = [*self.std_err.values(), *self.front.ravel(), *np.ravel(probes)]
        return digest([genes, [f"{number:.6g}" for number in numbers], f"{self.best:.6g}"])

    def losses(self, values: Mapping[str, float]) -> list[float]:
        """Return the values of the objectives, all to be minimised."""
        return [objective.loss(values[objective.name]) for objective in self.problem.objectives]

    def measurement(self, values: Mapping[str, float], seed: int, number: int) -> Measurement:
        """Return the noisy measurement of trial `number`; the noise depends on `seed` and `number` alone."""
        rng = Random(f"noise of {seed}/{number}")
        noisy = {name: values[name] + rng.gauss(0.0, spread) for name, spread in self.std_err.items()}
        return Measurement(values={**values, **noisy}, std_err=dict(self.std_err), seed=seed, evaluator="race")

    def shares(self, values: Iterable[Mapping[str, float]]) -> list[float]:
        """Return the shares of the true front's hypervolume that the first 1, 2, ... points dominate."""
        shares: list[float] = []
        found = self.front[:0]
        points = [self.losses(v) for v in values]
        for point in scaled(points, self.problem.objectives):
            if (found <= point).all(axis=1).any():
                shares.append(shares[-1])
                continue
            found = np.vstack([found[~(found >= point).all(axis=1)], point])
            shares.append(hypervolume(found, self.reference) / self.best)
        return shares

    def savings(self, values: Iterable[Mapping[str, float]]) -> list[float]:
        """Return what the goal "cheapest_as_good" has reached after the first 1, 2, ... points.

        That is the first cost of the cheapest point on the true front within the margin of the best, over that of the
        cheapest one found: 1 is perfect, and 0 means that none within the margin has been found.
        """
        quality, cost = (self.problem.first(quality=wanted) for wanted in (True, False))
        best = self.front[:, quality].min()
        worst = best + self.problem.margin(self.problem.objectives[quality].value(float(best)))
        goal = self.front[self.front[:, quality] <= worst, cost].min()
        found, cheapest = [], np.inf
        for point in map(self.losses, values):
            if point[quality] <= worst:
                cheapest = min(cheapest, point[cost])
            found.append(float(goal / cheapest))
        return found

    def cheapest(self, values: Sequence[Mapping[str, float]]) -> float:
        """Return the first cost of the cheapest of these points that are within the margin of the best of them."""
        quality, cost = (self.problem.first(quality=wanted) for wanted in (True, False))
        points = np.array([self.losses(v) for v in values])
        best = float(points[:, quality].min())
        worst = best + self.problem.margin(self.problem.objectives[quality].value(best))
        return float(points[points[:, quality] <= worst, cost].min())


def pareto(points: ArrayLike) -> Floats:
    """Return the points of [n, m] that no other dominates, [k, m], in lexical order, each once."""
    rows = np.unique(np.asarray(points, dtype=float), axis=0)
    # Only an earlier row can dominate a later one; the first of every block is a member.
    front = rows[:0]
    while len(rows):
        front, rows = np.vstack([front, rows[:1]]), rows[1:]
        rows = rows[~(front[-1] <= rows).all(axis=1)]
    return front


def best_sums(tables: Sequence[ArrayLike]) -> Floats:
    """Return the non-dominated sums [k, m] of one row of each table [n_i, m] of losses.

    Dynamic programming (Nemhauser and Ullmann 1969): a dominated partial sum cannot lead to a non-dominated sum.
    """
    total = np.zeros((1, np.asarray(tables[0]).shape[1]))
    for table in tables:
        total = pareto((total[:, None] + np.asarray(table, dtype=float)[None]).reshape(-1, total.shape[1]))
    return total
