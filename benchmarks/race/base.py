"""What searchers race on: a search problem whose true values are known, and with them its true front."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import ArrayLike

from autopeft.search_space.architecture import digest
from autopeft.search_space.problem import Measurement, Problem
from autopeft.search_space.spaces.genes import Assignment
from autopeft.studies.analysis.pareto import Floats, hypervolume

#: The known front's nadir plus this share of its range is the corner up to which hypervolumes count, as in a study.
MARGIN = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceProblem:
    """A problem with a known answer.

    `values`: genes -> noise-free metrics, which no searcher sees; what it sees has normal noise of `std_err`.
    `front`: [n, m] losses of the best that can be reached; `reference`: [m]; `best`: the hypervolume of the front.
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
        """`points`: columns [n] by objective; those of the front must be among them."""
        table = np.stack([o.loss(np.asarray(points[o.name], dtype=float)) for o in problem.objectives], axis=1)
        front = pareto(table)
        reference = front.max(axis=0) + MARGIN * np.ptp(front, axis=0)
        return cls(
            name=name,
            summary=summary,
            problem=problem,
            values=values,
            std_err=std_err,
            front=front,
            reference=reference,
            best=hypervolume(front, reference),
        )

    @property
    def key(self) -> str:
        """Results of two problems can be compared if they have the same one."""
        space = self.problem.space
        genes = [[gene.name, repr(gene.domain)] for gene in space.genes]
        probes = [self.losses(self.values(space.sample(Random(seed)))) for seed in range(8)]
        numbers = [*self.std_err.values(), *self.front.ravel(), *np.ravel(probes)]
        return digest([genes, [f"{number:.6g}" for number in numbers]])

    def losses(self, values: Mapping[str, float]) -> list[float]:
        return [objective.loss(values[objective.name]) for objective in self.problem.objectives]

    def measurement(self, values: Mapping[str, float], seed: int, number: int) -> Measurement:
        """What a searcher is told of trial `number`; the noise follows from `seed` and `number` alone."""
        rng = Random(f"noise of {seed}/{number}")
        noisy = {name: values[name] + rng.gauss(0.0, spread) for name, spread in self.std_err.items()}
        return Measurement(values={**values, **noisy}, std_err=dict(self.std_err), seed=seed, evaluator="race")

    def shares(self, values: Iterable[Mapping[str, float]]) -> list[float]:
        """Of the known front's hypervolume: what the first 1, 2, ... points dominate."""
        shares: list[float] = []
        found = self.front[:0]
        for point in (self.losses(v) for v in values):
            if (found <= point).all(axis=1).any():
                shares.append(shares[-1])
                continue
            found = np.vstack([found[~(found >= point).all(axis=1)], point])
            shares.append(hypervolume(found, self.reference) / self.best)
        return shares


def pareto(points: ArrayLike) -> Floats:
    """[n, m] -> [k, m]: the points that no other dominates, in lexical order, each once."""
    rows = np.unique(np.asarray(points, dtype=float), axis=0)
    # Only an earlier row can dominate a later one; the first of every block is a member.
    front = rows[:0]
    while len(rows):
        front, rows = np.vstack([front, rows[:1]]), rows[1:]
        rows = rows[~(front[-1] <= rows).all(axis=1)]
    return front


def best_sums(tables: Sequence[ArrayLike]) -> Floats:
    """Tables [n_i, m] of losses -> [k, m]: the non-dominated sums of one row of each.

    Dynamic programming (Nemhauser and Ullmann 1969): what a dominated partial sum can become, another becomes better.
    """
    total = np.zeros((1, np.asarray(tables[0]).shape[1]))
    for table in tables:
        total = pareto((total[:, None] + np.asarray(table, dtype=float)[None]).reshape(-1, total.shape[1]))
    return total
