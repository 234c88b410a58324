"""Searchers that follow a fixed list of points: a low-discrepancy sequence, and the full grid of a small space."""

from __future__ import annotations

from collections.abc import Iterator

from scipy.stats import qmc

from autopeft.search_space.domains import Choice, Float, Int, Value
from autopeft.search_space.genes import Gene
from autopeft.search_space.space import Assignment
from autopeft.searchers.base import Searcher, Suggestion

GRID_POINTS_OF_A_RANGE = 5
LARGEST_GRID = 100_000


class Qmc(Searcher):
    """Scrambled Sobol points over the fixed encoding; coordinates of inactive genes fall away.

    Optuna's own QMC sampler covers the genes that all trials share and draws conditional ones at random; over the fixed
    encoding every gene gets its coordinate of the sequence.
    """

    name = "qmc"
    summary = "scrambled Sobol sequence over all genes, conditional ones too (Owen 1997)"

    def suggest(self, count: int = 1) -> list[Suggestion]:
        space = self.problem.space
        sequence = qmc.Sobol(d=len(space.genes), scramble=True, seed=self.seed)
        sequence.fast_forward(self.num_suggested)
        points = [sequence.random(1)[0] for _ in range(count)]
        return [Suggestion(genes=space.from_unit(list(map(float, point)))) for point in points]


class Grid(Searcher):
    """Every point once; ranges are cut into five values. Raises ValueError for more than 100,000 points."""

    name = "grid"
    summary = "every point of a small space once"

    def __init__(self, problem, seed):
        super().__init__(problem, seed)
        self._points: list[Assignment] = []
        for point in self._walk(0, {}):
            self._points.append(point)
            if len(self._points) > LARGEST_GRID:
                raise ValueError(f"the grid has more than {LARGEST_GRID:,} points: use another searcher")

    def _walk(self, position: int, assignment: Assignment) -> Iterator[Assignment]:
        genes = self.problem.space.genes
        while position < len(genes) and not genes[position].is_active(assignment):
            position += 1
        if position == len(genes):
            yield assignment
            return
        for value in _values(genes[position]):
            yield from self._walk(position + 1, {**assignment, genes[position].name: value})

    def suggest(self, count: int = 1) -> list[Suggestion]:
        start = self.num_suggested
        return [Suggestion(genes=point) for point in self._points[start : start + count]]


def _values(gene: Gene) -> list[Value]:
    domain = gene.domain
    if isinstance(domain, Choice):
        return list(domain.choices)
    if isinstance(domain, Int) and domain.cardinality <= GRID_POINTS_OF_A_RANGE:
        return list(range(domain.low, domain.high + 1, domain.step))
    assert isinstance(domain, (Int, Float))
    units = [i / (GRID_POINTS_OF_A_RANGE - 1) for i in range(GRID_POINTS_OF_A_RANGE)]
    return list(dict.fromkeys(domain.from_unit(unit) for unit in units))
