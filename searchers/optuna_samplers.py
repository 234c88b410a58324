"""Random search, TPE and NSGA-II by Optuna, through ask and tell.

An in-memory Optuna study is rebuilt from the trials for every call, and its sampler gets a seed made of the study's seed
and the number of trials: state comes from the trials alone. What a sampler keeps in a trial's system attributes (NSGA-II
its generation) travels in `Trial.searcher_state`.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from autopeft.search_space.domains import Choice, Domain, Float, Int, Value
from autopeft.search_space.problem import Trial
from autopeft.searchers.base import Searcher, Suggestion

optuna.logging.set_verbosity(optuna.logging.WARNING)


def distribution(domain: Domain) -> BaseDistribution:
    """Ordered choices become whole numbers (their positions), so that a sampler knows which of them are close."""
    if isinstance(domain, Float):
        return FloatDistribution(domain.low, domain.high, log=domain.log)
    if isinstance(domain, Int):
        return IntDistribution(domain.low, domain.high, log=domain.log, step=domain.step)
    if domain.ordered:
        return IntDistribution(0, len(domain.choices) - 1)
    return CategoricalDistribution(domain.choices)


def ask(trial: optuna.Trial, name: str, domain: Domain) -> Value:
    """Let the trial's sampler choose a value of `domain`."""
    if isinstance(domain, Float):
        return from_optuna(domain, trial.suggest_float(name, domain.low, domain.high, log=domain.log))
    if isinstance(domain, Int):
        return trial.suggest_int(name, domain.low, domain.high, log=domain.log, step=domain.step)
    if domain.ordered:
        return from_optuna(domain, trial.suggest_int(name, 0, len(domain.choices) - 1))
    return trial.suggest_categorical(name, domain.choices)


def to_optuna(domain: Domain, value: Value) -> Any:
    return domain.index(value) if isinstance(domain, Choice) and domain.ordered else value


def from_optuna(domain: Domain, value: Any) -> Value:
    if isinstance(domain, Choice) and domain.ordered:
        return domain.choices[value]
    # The samplers' floats are cut to the digits that a domain keeps, so that they survive its encoding.
    return domain.from_unit(domain.to_unit(value)) if isinstance(domain, Float) else value


class OptunaSearcher(Searcher):
    @abstractmethod
    def sampler(self, seed: int) -> BaseSampler:
        """A new sampler of this searcher's kind."""

    def suggest(self, count: int = 1) -> list[Suggestion]:
        study = self._rebuild()
        suggestions = []
        for _ in range(count):
            number = len(study.get_trials(deepcopy=False))
            study.sampler = self.sampler((self.seed * 1_000_003 + number) % 2**32)
            trial = study.ask()
            genes = self.problem.space.complete({}, lambda gene, trial=trial: ask(trial, gene.name, gene.domain))
            state = study.get_trials(deepcopy=False)[trial.number].system_attrs
            suggestions.append(Suggestion(genes=genes, state=dict(state)))
        return suggestions

    def _rebuild(self) -> optuna.Study:
        study = optuna.create_study(directions=["minimize"] * len(self.problem.objectives), sampler=self.sampler(0))
        known = [losses for trial in self.completed if (losses := self.losses(trial))]
        # An infeasible trial has no values of its own; by its constraint it ranks behind every feasible one anyway.
        worst = [max(column) for column in zip(*known, strict=True)] or [0.0] * len(self.problem.objectives)
        for trial in sorted((*self.completed, *self.pending), key=lambda t: t.number):
            study.add_trial(self._frozen(trial, worst))
        return study

    def _frozen(self, trial: Trial, worst: list[float]) -> optuna.trial.FrozenTrial:
        domains = {gene.name: gene.domain for gene in self.problem.space.genes}
        states = {"running": TrialState.RUNNING, "failed": TrialState.FAIL}
        ended = trial.state in ("complete", "infeasible")
        return optuna.trial.create_trial(
            state=states.get(trial.state, TrialState.COMPLETE),
            params={name: to_optuna(domains[name], value) for name, value in trial.genes.items()},
            distributions={name: distribution(domains[name]) for name in trial.genes},
            values=(self.losses(trial) or worst) if ended else None,
            constraints={"limits": trial.violation} if ended else None,
            system_attrs=dict(trial.searcher_state),
        )


class Random(OptunaSearcher):
    name = "random"
    summary = "independent uniform draws; the baseline for every other searcher"

    def sampler(self, seed):
        return RandomSampler(seed=seed)


class Tpe(OptunaSearcher):
    name = "tpe"
    summary = "multi-objective tree-structured Parzen estimator (Ozaki et al. 2022)"

    def sampler(self, seed):
        startup = min(10, max(4, self.problem.num_trials // 4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)


class NsgaII(OptunaSearcher):
    name = "nsga2"
    summary = "evolution by non-dominated rank and crowding (Deb et al. 2002)"

    def sampler(self, seed):
        # A population of about the square root of the budget, doubled: some generations even in short studies.
        population = max(4, min(50, 2 * round(self.problem.num_trials**0.5)))
        return NSGAIISampler(seed=seed, population_size=population)
