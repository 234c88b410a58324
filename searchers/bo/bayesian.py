"""The searcher `bo`: Bayesian optimisation over the mixed and conditional genes of a space, with several objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from autopeft.search_space.problem import SEARCH, Problem, Trial
from autopeft.searchers.base import Searcher, Suggestion
from autopeft.searchers.bo.acquisition_optimizer import SCREENED, Acquisition, keys_of, propose
from autopeft.searchers.bo.encoding import Encoding, Mask, Rows
from autopeft.searchers.bo.feasibility import feasible
from autopeft.searchers.bo.initial import design, num_initial
from autopeft.searchers.bo.observations import Observations
from autopeft.searchers.optuna_samplers import NsgaII

if TYPE_CHECKING:
    from autopeft.searchers.bo.posterior import ModelPosterior
    from autopeft.searchers.bo.surrogate import GaussianProcess

#: Children of NSGA-II of which the first feasible one is proposed.
CHILDREN = 8


class Bayesian(Searcher):
    """Gaussian processes of the measured objectives, and the expected hypervolume improvement under noise.

    Declared costs of an architecture (parameters, bytes, operations) are known before any trial and are not modelled.
    Trials that were observed outside the search (`Problem.observed`) are modelled like its own, and not proposed again.
    The first points come from `initial.design`. While no process ranks left-out trials better than chance, NSGA-II
    proposes.
    """

    name = "bo"
    summary = "Gaussian processes and expected hypervolume improvement over mixed, conditional genes (BoTorch)"

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem, seed)
        self.encoding = Encoding(problem.space)
        self.observations = Observations(problem, self.encoding)
        self._design: Rows | None = None
        self._prior_processes: list[GaussianProcess] | None = None
        # Cached by the completed trials, on which alone it depends: a batch is filled without new ones.
        self._posterior: tuple[tuple[Trial, ...], ModelPosterior | None] = ((), None)

    @override
    def suggest(self, count: int = 1) -> list[Suggestion]:
        running = list(self.pending)
        suggestions: list[Suggestion] = []
        for _ in range(count):
            suggestion = self._next(running)
            if suggestion is None:
                break
            suggestions.append(suggestion)
            running.append(self._trial(len(self.completed) + len(running), suggestion))
        return suggestions

    def _trial(self, number: int, suggestion: Suggestion) -> Trial:
        candidate = self.problem.space.decode(suggestion.genes)
        state = suggestion.state
        return Trial(number=number, role=SEARCH, candidate=candidate, genes=suggestion.genes, searcher_state=state)

    def _next(self, running: Sequence[Trial]) -> Suggestion | None:
        pending = self.encoding.rows([trial.genes for trial in running])
        observed = np.vstack([self.encoding.rows([trial.genes for trial in self.completed]), pending])
        # Number of the suggestion: every draw has a stream of its own.
        number = len(observed)
        rng = np.random.default_rng([self.seed, number])
        allowed = self._allowed(observed)
        posterior = None if self._num_counting() + len(pending) < num_initial(self.problem) else self._fit()
        if posterior is None:
            for row in self._initial():
                if np.isfinite(allowed(row[None], self.encoding.active(row[None])))[0]:
                    return self._suggestion(row, {"phase": "initial"})
            posterior = self._fit()
        if posterior is None or not posterior.better_than_chance:
            return self._evolved(running, posterior, allowed, rng)
        improvement = posterior.acquisition(pending, seed=int(rng.integers(2**31)))

        def acquisition(rows: Rows, active: Mask) -> Rows:
            return allowed(rows, active) + improvement(rows, active)

        point = propose(self.encoding, acquisition, posterior.incumbents, rng)
        if point is None:
            return None
        return self._suggestion(point, posterior.diagnostics)

    def _suggestion(self, row: Rows, diagnostics: Mapping[str, Any]) -> Suggestion:
        return Suggestion(genes=self.encoding.assignment(row), state={"diagnostics": dict(diagnostics)})

    @override
    def chance_of_cheaper(self, count: int, cost: float) -> tuple[int, float] | None:
        if not self.problem.has_quality_and_cost:
            return None
        posterior = None if self._num_counting() < num_initial(self.problem) else self._fit()
        if posterior is None or not posterior.better_than_chance:
            return None
        proposed = self.encoding.rows([suggestion.genes for suggestion in self.suggest(count)])
        return len(proposed), posterior.chance_of_cheaper(proposed, cost, self.seed) if len(proposed) else 0.0

    def _num_counting(self) -> int:
        return sum(trial.state in ("complete", "pruned") for trial in self.completed)

    # Constraints

    def _allowed(self, observed: Rows) -> Acquisition:
        """Return a function that is 0 for points that may be proposed, -inf for observed and infeasible ones."""
        observed = np.vstack([observed, self.encoding.rows([trial.genes for trial in self.problem.observed])])
        keys = set(keys_of(observed, self.encoding.active(observed)))

        def allowed(rows: Rows, active: Mask) -> Rows:
            fresh = np.array([key not in keys for key in keys_of(rows, active)], dtype=bool)
            return np.where(fresh & feasible(self.problem, self.encoding, rows, active), 0.0, -np.inf)

        return allowed

    # The phases

    def _initial(self) -> Rows:
        if self._design is None:
            rng = np.random.default_rng([self.seed, 2**31])
            nothing = np.zeros((0, len(self.encoding.genes)))
            best_prior = self.observations.best_prior(self.losses)
            self._design = design(self.problem, self.encoding, self._allowed(nothing), best_prior, rng)
        return self._design

    def _fit(self) -> ModelPosterior | None:
        """Return the models of all trials; None where too few have values."""
        from autopeft.searchers.bo.posterior import ModelPosterior

        if self._posterior[0] != self.completed:
            posterior, data = None, self.observations.of((*self.problem.observed, *self.completed), self.losses)
            if data is not None:
                prior = self._fit_prior()
                posterior = ModelPosterior.of(self.problem, self.encoding, self.observations, data, prior)
            self._posterior = self.completed, posterior
        return self._posterior[1]

    def _fit_prior(self) -> Sequence[GaussianProcess]:
        """Return the models of a prior study's trials."""
        from autopeft.searchers.bo.posterior import processes_of

        if self._prior_processes is None:
            data = self.observations.of(self.problem.prior, self.losses)
            self._prior_processes = [] if data is None else processes_of(self.encoding, self.observations, data)
        return self._prior_processes

    def _evolved(
        self,
        running: Sequence[Trial],
        posterior: ModelPosterior | None,
        allowed: Acquisition,
        rng: np.random.Generator,
    ) -> Suggestion | None:
        """Return a suggestion of NSGA-II, or a draw where NSGA-II finds no feasible point.

        Trials without a generation count as its first one.
        """
        evolution = NsgaII(self.problem, self.seed)
        evolution.update(self.completed, running)
        children = evolution.suggest(CHILDREN)
        own = self.encoding.rows([child.genes for child in children])
        rows = np.vstack([own, self.encoding.draw(SCREENED, rng)])
        free = np.flatnonzero(np.isfinite(allowed(rows, self.encoding.active(rows))))
        if not len(free):
            return None
        first = int(free[0])
        state = children[first].state if first < len(children) else {}
        note = "the surrogate ranks left-out trials no better than chance"
        if posterior is None:
            note = "nothing to model yet"
        elif not posterior.processes:
            note = "no objective is measured"
        found = {} if posterior is None else posterior.diagnostics
        diagnostics = {**found, "phase": "evolution", "note": f"{note}: NSGA-II proposes"}
        return Suggestion(genes=self.encoding.assignment(rows[first]), state={**state, "diagnostics": diagnostics})
