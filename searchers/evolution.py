"""The searcher `evolution`: NSGA-II over encoded rows, without a study to rebuild for every suggestion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from autopeft.search_space.problem import Problem, Trial
from autopeft.searchers.base import Searcher, Suggestion
from autopeft.searchers.bo.acquisition_optimizer import keys_of, unseen
from autopeft.searchers.bo.encoding import Encoding, Mask, Rows
from autopeft.searchers.bo.feasibility import feasible
from autopeft.searchers.genetic import best_first, children

#: Points that are generated or drawn at once.
BLOCK = 128
#: Blocks in a row without a new point, after which a source counts as exhausted.
PATIENCE = 4
#: Draws of which the first generation is made.
POOL = 1024


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Table of n trials that ended.

    `rows` [n, G], `active` [n, G], `losses` [n, m] with NaN for a trial without values, `violation` [n].
    """

    rows: Rows
    active: Mask
    losses: Rows
    violation: Rows

    @property
    def has_losses(self) -> Mask:
        """Whether a trial has values, [n]."""
        return np.asarray(np.isfinite(self.losses).all(axis=1))


class Evolution(Searcher):
    """NSGA-II with constrained domination (Deb et al. 2002): every batch is a generation of the best trials' children.

    Points whose declared costs are beyond a limit or bound are not proposed. With one objective under limits this is
    the constrained evolutionary search of HAT (Wang et al. 2020, section 3.2): the fittest subnets within the limit
    are parents of mutants and of crossings.
    """

    name = "evolution"
    summary = "constrained evolution over encoded genes, fast with thousands of trials (Deb et al. 2002)"

    #: Cached properties that are computed from the evaluated trials and cleared when there are new ones.
    cached_per_update: ClassVar[tuple[str, ...]] = ("evaluated",)

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem, seed)
        self.encoding = Encoding(problem.space)
        # As many as NSGA-II's: some generations even in short studies.
        self.population = max(4, min(50, 2 * round(problem.num_trials**0.5)))
        self.num_initial = self.population if problem.initial is None else problem.initial
        self._rows: dict[int, tuple[Mapping[str, Any], Rows]] = {}

    @override
    def update(self, completed: Sequence[Trial], pending: Sequence[Trial] = ()) -> None:
        before = self.completed
        super().update(completed, pending)
        self.completed = tuple(sorted(self.completed, key=lambda trial: trial.number))
        if self.completed != before:
            for name in self.cached_per_update:
                self.__dict__.pop(name, None)

    @override
    def suggest(self, count: int = 1) -> list[Suggestion]:
        rows = self._rows_of(self.pending)
        pending = set(keys_of(rows, self.encoding.active(rows)))
        return list(islice((suggestion for key, suggestion in self._proposals() if key not in pending), count))

    def _proposals(self) -> Iterator[tuple[bytes, Suggestion]]:
        """Yield feasible points and their keys, none twice and none that was evaluated.

        They depend on the evaluated trials alone, so a batch continues after its pending points.
        """
        seen = set(keys_of(self.evaluated.rows, self.evaluated.active))
        for blocks, diagnostics in self.sources():
            for key, row in self._fresh(blocks, seen):
                state = {"diagnostics": dict(diagnostics)}
                yield key, Suggestion(genes=self.encoding.assignment(row), state=state)

    def _fresh(self, blocks: Iterable[Rows], seen: set[bytes]) -> Iterator[tuple[bytes, Rows]]:
        """Yield the feasible points that are not `seen`, until `PATIENCE` blocks in a row have none."""
        barren = 0
        for rows in blocks:
            active = self.encoding.active(rows)
            keys = keys_of(rows, active)
            new = unseen(keys, seen)
            new = [i for i, may in zip(new, self.feasible(rows[new], active[new]), strict=True) if may]
            yield from ((keys[i], rows[i]) for i in new)
            barren = 0 if new else barren + 1
            if barren == PATIENCE:
                return

    def feasible(self, rows: Rows, active: Mask) -> Mask:
        """Whether points may be proposed, see `feasibility.feasible`."""
        return feasible(self.problem, self.encoding, rows, active)

    # Sources of points

    def sources(self) -> Iterator[tuple[Iterable[Rows], Mapping[str, Any]]]:
        """Yield blocks [., G] of points to propose and their diagnostics; the next source once one is exhausted."""
        if len(self.completed) < self.num_initial:
            yield [self._first], {"phase": "initial"}
        if self.evaluated.has_losses.any():
            yield self._generation(), {"phase": "evolution"}
        yield self._draws(), {"phase": "evolution", "note": "nothing new to breed: points are drawn"}

    @cached_property
    def _first(self) -> Rows:
        """First generation [., G]: the largest and the smallest point, draws, and the smallest of each adapter.

        The last ones may be feasible where limits exclude all draws.
        """
        space, rng = self.problem.space, np.random.default_rng([self.seed, 2**31])
        ends = self.encoding.rows([space.largest(), space.smallest()])
        rows = np.vstack([ends, self.encoding.draw(max(POOL, 4 * self.num_initial), rng), self.encoding.smallest()])
        found = (row for _, row in self._fresh([rows], set()))
        return np.vstack([rows[:0], *islice(found, self.num_initial)])

    def _generation(self) -> Iterator[Rows]:
        rng = np.random.default_rng([self.seed, len(self.completed)])
        parents = self.fittest(self.population)
        while True:
            yield children(self.encoding, parents, BLOCK, rng)

    def _draws(self) -> Iterator[Rows]:
        rng = np.random.default_rng([self.seed, len(self.completed), 1])
        yield self.encoding.smallest()
        while True:
            yield self.encoding.draw(BLOCK, rng)

    def fittest(self, count: int) -> Rows:
        """Return the best trials with values [count, G], best first."""
        fit = self.evaluated.has_losses
        return self.evaluated.rows[fit][best_first(self.evaluated.losses[fit], self.evaluated.violation[fit])[:count]]

    # The trials as a table

    @cached_property
    def evaluated(self) -> Evaluated:
        """The completed trials."""
        rows = self._rows_of(self.completed)
        missing = [np.nan] * len(self.problem.objectives)
        losses = [self.losses(trial) or missing for trial in self.completed]
        return Evaluated(
            rows=rows,
            active=self.encoding.active(rows),
            losses=np.array(losses).reshape(len(rows), len(self.problem.objectives)),
            violation=np.array([trial.violation for trial in self.completed], dtype=float),
        )

    def _rows_of(self, trials: Sequence[Trial]) -> Rows:
        """Return the rows [n, G] of trials. Each is cached, because every update has all trials."""
        for trial in trials:
            if trial.number not in self._rows or self._rows[trial.number][0] != trial.genes:
                self._rows[trial.number] = trial.genes, self.encoding.rows([trial.genes])[0]
        return np.array([self._rows[trial.number][1] for trial in trials]).reshape(
            len(trials), len(self.encoding.genes)
        )
