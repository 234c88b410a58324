"""Searchers that follow a fixed list of points: a low-discrepancy sequence, and the full grid of a small space."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import numpy as np
from typing_extensions import override

from autopeft.search_space.domains import Choice, Domain, Int, Value
from autopeft.search_space.problem import Problem
from autopeft.search_space.spaces.genes import Assignment
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.searchers.base import Searcher, Suggestion

GRID_POINTS_OF_A_RANGE = 5
LARGEST_GRID = 100_000


class Qmc(Searcher):
    """Scrambled Sobol points over the fixed encoding; coordinates of inactive genes are dropped.

    Optuna's own QMC sampler covers the genes that all trials share and draws conditional ones at random; over the fixed
    encoding every gene gets its coordinate of the sequence.
    """

    name = "qmc"
    summary = "scrambled Sobol sequence over all genes, conditional ones too (Owen 1997)"

    @override
    def suggest(self, count: int = 1) -> list[Suggestion]:
        from scipy.stats import qmc  # takes most of a second, which commands that only check a file would wait for

        space = self.problem.space
        sequence = qmc.Sobol(max(1, len(space.genes)), scramble=True, rng=np.random.default_rng(self.seed))
        if self.num_suggested:  # scipy overflows on a jump of 0
            sequence.fast_forward(self.num_suggested)
        points = [sequence.random(1)[0, : len(space.genes)] for _ in range(count)]
        return [Suggestion(genes=space.from_unit(point.tolist())) for point in points]


class Grid(Searcher):
    """Every point once, in an order drawn from the seed: a search that ends early has a random sample of the grid.

    Integer and real ranges of more than five values are cut into five. Raises ValueError for more than 100,000 points.
    """

    name = "grid"
    summary = "every point of a small space once"

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem, seed)
        self._points: list[Assignment] = []
        for point in _points(problem.space):
            if len(self._points) == LARGEST_GRID:
                raise ValueError(f"the grid has more than {LARGEST_GRID:,} points: use another searcher")
            self._points.append(point)
        Random(seed).shuffle(self._points)

    @override
    def suggest(self, count: int = 1) -> list[Suggestion]:
        start = max(0, self.num_suggested - len(self.problem.start))
        return [Suggestion(genes=dict(point)) for point in self._points[start : start + count]]


def _points(space: SearchSpace) -> Iterator[Assignment]:
    """Yield all assignments over the grid values, depth first."""
    open_ends: list[tuple[int, Assignment]] = [(0, {})]
    while open_ends:
        position, assignment = open_ends.pop()
        while position < len(space.genes) and not space.genes[position].is_active(assignment):
            position += 1
        if position == len(space.genes):
            yield assignment
            continue
        gene = space.genes[position]
        open_ends += [(position + 1, {**assignment, gene.name: value}) for value in grid_values(gene.domain)]


def grid_values(domain: Domain) -> list[Value]:
    """Return all values of a choice or of a short integer range; else five, equally spaced on the domain's scale."""
    if isinstance(domain, Choice):
        return list(domain.choices)
    if isinstance(domain, Int) and domain.cardinality <= GRID_POINTS_OF_A_RANGE:
        return list(range(domain.low, domain.high + 1, domain.step))
    low, high = domain.to_unit(domain.low), domain.to_unit(domain.high)
    shares = [i / (GRID_POINTS_OF_A_RANGE - 1) for i in range(GRID_POINTS_OF_A_RANGE)]
    return list(dict.fromkeys(domain.from_unit(low + share * (high - low)) for share in shares))
