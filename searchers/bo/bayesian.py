"""The searcher `bo`: Bayesian optimisation over the mixed and conditional genes of a space, with several objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from autopeft.search_space.problem import SEARCH, Problem, Trial
from autopeft.searchers.base import Searcher, Suggestion
from autopeft.searchers.bo.acquisition_optimizer import SCREENED, Judge, keys_of, propose
from autopeft.searchers.bo.encoding import Encoding, Mask, Rows
from autopeft.searchers.bo.feasibility import admitted
from autopeft.searchers.bo.initial import design, num_initial
from autopeft.searchers.bo.observations import Observations
from autopeft.searchers.optuna_samplers import NsgaII

if TYPE_CHECKING:
    from autopeft.searchers.bo.posterior import Belief
    from autopeft.searchers.bo.surrogate import Surrogate

#: Children of NSGA-II among which one is looked for that may be proposed.
CHILDREN = 8


class Bayesian(Searcher):
    """Gaussian processes for what is measured, and the expected improvement of the hypervolume under noise.

    What is declared of an architecture (parameters, bytes, operations) is known before any trial and is not modelled.
    Trials that are known beside the search (`Problem.known`) are modelled like its own, and not asked for again.
    The first points come from `initial.design`. Where no process ranks the trials that it has not seen better than
    chance, NSGA-II goes on, until one does.
    """

    name = "bo"
    summary = "Gaussian processes and expected hypervolume improvement over mixed, conditional genes (BoTorch)"

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem, seed)
        self.encoding = Encoding(problem.space)
        self.observations = Observations(problem, self.encoding)
        self._design: Rows | None = None
        self._earlier: list[Surrogate] | None = None
        # The belief follows from the ended trials alone, and a batch is filled without new ones.
        self._belief: tuple[tuple[Trial, ...], Belief | None] = ((), None)

    def suggest(self, count: int = 1) -> list[Suggestion]:
        under_way = list(self.pending)
        suggestions: list[Suggestion] = []
        for _ in range(count):
            suggestion = self._next(under_way)
            if suggestion is None:
                break
            suggestions.append(suggestion)
            under_way.append(self._trial(len(self.completed) + len(under_way), suggestion))
        return suggestions

    def _trial(self, number: int, suggestion: Suggestion) -> Trial:
        candidate = self.problem.space.decode(suggestion.genes)
        state = suggestion.state
        return Trial(number=number, role=SEARCH, candidate=candidate, genes=suggestion.genes, searcher_state=state)

    def _next(self, under_way: Sequence[Trial]) -> Suggestion | None:
        pending = self.encoding.rows([trial.genes for trial in under_way])
        known = np.vstack([self.encoding.rows([trial.genes for trial in self.completed]), pending])
        # Number of the suggestion: every draw has a stream of its own.
        number = len(known)
        rng = np.random.default_rng([self.seed, number])
        allowed = self._allowed(known)
        counting = sum(trial.state in ("complete", "pruned") for trial in self.completed) + len(pending)
        belief = None if counting < num_initial(self.problem) else self._believe()
        if belief is None:
            for row in self._initial():
                if np.isfinite(allowed(row[None], self.encoding.active(row[None])))[0]:
                    return self._suggestion(row, {"phase": "initial"})
            belief = self._believe()
        if belief is None or not belief.better_than_chance:
            return self._evolved(under_way, belief, allowed, rng)
        worth = belief.worth(pending, seed=int(rng.integers(2**31)))

        def judge(rows: Rows, active: Mask) -> Rows:
            return allowed(rows, active) + worth(rows, active)

        row = propose(self.encoding, judge, belief.incumbents, rng)
        if row is None:
            return None
        return self._suggestion(row, belief.diagnostics)

    def _suggestion(self, row: Rows, diagnostics: Mapping[str, Any]) -> Suggestion:
        return Suggestion(genes=self.encoding.assignment(row), state={"diagnostics": dict(diagnostics)})

    # What may be proposed

    def _allowed(self, known: Rows) -> Judge:
        """0 for points that may be proposed; -inf for known ones and those that are not admitted."""
        known = np.vstack([known, self.encoding.rows([trial.genes for trial in self.problem.observed])])
        keys = set(keys_of(known, self.encoding.active(known)))

        def judge(rows: Rows, active: Mask) -> Rows:
            fresh = np.array([key not in keys for key in keys_of(rows, active)], dtype=bool)
            return np.where(fresh & admitted(self.problem, self.encoding, rows, active), 0.0, -np.inf)

        return judge

    # The phases

    def _initial(self) -> Rows:
        if self._design is None:
            rng = np.random.default_rng([self.seed, 2**31])
            nothing = np.zeros((0, len(self.encoding.genes)))
            earlier = self.observations.best_earlier(self.losses)
            self._design = design(self.problem, self.encoding, self._allowed(nothing), earlier, rng)
        return self._design

    def _believe(self) -> Belief | None:
        from autopeft.searchers.bo.posterior import Belief

        if self._belief[0] != self.completed:
            belief, data = None, self.observations.of((*self.problem.observed, *self.completed), self.losses)
            if data is not None:
                belief = Belief.of(self.problem, self.encoding, self.observations, data, self._of_earlier())
            self._belief = self.completed, belief
        return self._belief[1]

    def _of_earlier(self) -> Sequence[Surrogate]:
        from autopeft.searchers.bo.posterior import surrogates_of

        if self._earlier is None:
            data = self.observations.of(self.problem.prior, self.losses)
            self._earlier = [] if data is None else surrogates_of(self.encoding, self.observations, data)
        return self._earlier

    def _evolved(
        self, under_way: Sequence[Trial], belief: Belief | None, allowed: Judge, rng: np.random.Generator
    ) -> Suggestion | None:
        """NSGA-II goes on from all trials, as one generation where they have none of their own; a draw where it finds
        nothing that may be proposed.
        """
        evolution = NsgaII(self.problem, self.seed)
        evolution.update(self.completed, under_way)
        children = evolution.suggest(CHILDREN)
        own = self.encoding.rows([child.genes for child in children])
        rows = np.vstack([own, self.encoding.draw(SCREENED, rng)])
        free = np.flatnonzero(np.isfinite(allowed(rows, self.encoding.active(rows))))
        if not len(free):
            return None
        first = int(free[0])
        state = children[first].state if first < len(children) else {}
        note = "the surrogate ranks left-out trials no better than chance"
        if belief is None:
            note = "nothing to model yet"
        elif not belief.surrogates:
            note = "no objective is measured"
        found = {} if belief is None else belief.diagnostics
        diagnostics = {**found, "phase": "evolution", "note": f"{note}: NSGA-II proposes"}
        return Suggestion(genes=self.encoding.assignment(rows[first]), state={**state, "diagnostics": diagnostics})
