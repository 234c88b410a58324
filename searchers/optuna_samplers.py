"""Random search, TPE and NSGA-II by Optuna, through ask and tell.

An in-memory Optuna study is rebuilt from the trials for every suggestion, and its sampler gets a seed made of the
study's seed and the number of trials: state comes from the trials alone. A sampler's system attributes of a trial (the
generation of NSGA-II) are stored in `Trial.searcher_state`.
"""

from __future__ import annotations

import random
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial
from typing_extensions import override

from autopeft.search_space.domains import Choice, Domain, Float, Int, Value
from autopeft.search_space.problem import Problem, Trial
from autopeft.searchers.base import Searcher, Suggestion

optuna.logging.set_verbosity(optuna.logging.WARNING)


def distribution(domain: Domain) -> BaseDistribution:
    """Return the distribution of a domain.

    Ordered choices become integers (their positions), so that a sampler knows which of them are close.
    """
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
        return cast(Value, trial.suggest_int(name, domain.low, domain.high, log=domain.log, step=domain.step))
    if domain.ordered:
        return from_optuna(domain, trial.suggest_int(name, 0, len(domain.choices) - 1))
    return cast(Value, trial.suggest_categorical(name, domain.choices))


def to_optuna(domain: Domain, value: Value) -> Any:
    """Return the value that `distribution` has for `value`."""
    return domain.index(value) if isinstance(domain, Choice) and domain.ordered else value


def from_optuna(domain: Domain, value: Any) -> Value:
    """Return the value of `domain` for one of its `distribution`."""
    if isinstance(domain, Choice) and domain.ordered:
        choice: Value = domain.choices[value]
        return choice
    # The samplers' floats are rounded to the digits of the domain, so that encoding and decoding does not change them.
    return domain.from_unit(domain.to_unit(value)) if isinstance(domain, Float) else cast(Value, value)


class OptunaSearcher(Searcher):
    """Searcher that asks a sampler of Optuna."""

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem, seed)
        self._domains = {gene.name: gene.domain for gene in problem.space.genes}
        self._distributions = {name: distribution(domain) for name, domain in self._domains.items()}

    @abstractmethod
    def sampler(self, seed: int) -> BaseSampler:
        """Return a new sampler of this searcher's kind."""

    def visible_genes(self, number: int, genes: Mapping[str, Value]) -> Mapping[str, Value]:
        """Return the genes of trial `number` that the sampler sees. Default: the active ones."""
        return genes

    @override
    def suggest(self, count: int = 1) -> list[Suggestion]:
        trials = sorted((*self.completed, *self.pending), key=lambda trial: trial.number)
        observed = [losses for trial in trials if (losses := self.losses(trial))]
        # An infeasible trial has no values of its own; by its constraint it ranks behind every feasible one anyway.
        worst = [max(column) for column in zip(*observed, strict=True)] or [0.0] * len(self.problem.objectives)
        past = [self._ended(trial, worst) for trial in trials]
        suggestions: list[Suggestion] = []
        for _ in range(count):
            suggestions.append(self._suggest(past))
            # The next suggestion sees this one as a running trial, as after an `update`.
            past.append(self._frozen(TrialState.RUNNING, len(past), suggestions[-1].genes, suggestions[-1].state))
        return suggestions

    def _suggest(self, past: Sequence[FrozenTrial]) -> Suggestion:
        sampler = self.sampler((self.seed * 1_000_003 + len(past)) % 2**32)
        study = optuna.create_study(directions=["minimize"] * len(self.problem.objectives), sampler=sampler)
        for frozen in past:
            study.add_trial(frozen)
        trial = study.ask()
        genes = self.problem.space.complete({}, lambda gene: ask(trial, gene.name, gene.domain))
        return Suggestion(genes=genes, state=dict(study.get_trials(deepcopy=False)[trial.number].system_attrs))

    def _ended(self, trial: Trial, worst: Sequence[float]) -> FrozenTrial:
        state, values = TrialState.FAIL, None
        if trial.state == "running":
            state = TrialState.RUNNING
        elif trial.state == "infeasible":
            state, values = TrialState.COMPLETE, worst
        elif (losses := self.losses(trial)) is not None:
            state, values = TrialState.COMPLETE, losses
        return self._frozen(state, trial.number, trial.genes, trial.searcher_state, values, trial.violation)

    def _frozen(
        self,
        state: TrialState,
        number: int,
        genes: Mapping[str, Value],
        searcher_state: Mapping[str, Any],
        values: Sequence[float] | None = None,
        violation: float = 0.0,
    ) -> FrozenTrial:
        genes = self.visible_genes(number, genes)
        return create_trial(
            state=state,
            params={name: to_optuna(self._domains[name], value) for name, value in genes.items()},
            distributions={name: self._distributions[name] for name in genes},
            values=values,
            constraints=None if values is None else {"limits": violation},
            system_attrs=dict(searcher_state),
        )


class Random(OptunaSearcher):
    """Independent uniform draws."""

    name = "random"
    summary = "independent uniform draws; the baseline for every other searcher"

    @override
    def sampler(self, seed: int) -> BaseSampler:
        return RandomSampler(seed=seed)


class Tpe(OptunaSearcher):
    """Multi-objective tree-structured Parzen estimator."""

    name = "tpe"
    summary = "multi-objective tree-structured Parzen estimator (Ozaki et al. 2022)"

    @override
    def sampler(self, seed: int) -> BaseSampler:
        startup = min(10, max(4, self.problem.num_trials // 4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)


class NsgaII(OptunaSearcher):
    """Optuna's NSGA-II over the fixed encoding, in which every individual has every gene.

    Optuna lets only those genes evolve that every trial has. So that conditional genes evolve too, a trial has random
    values of its inactive genes beside its own.
    """

    name = "nsga2"
    summary = "evolution by non-dominated rank and crowding (Deb et al. 2002)"

    @override
    def sampler(self, seed: int) -> BaseSampler:
        # Twice the square root of the budget: some generations even in short studies.
        population = max(4, min(50, 2 * round(self.problem.num_trials**0.5)))
        return _Evolution(population_size=population, seed=seed)

    @override
    def visible_genes(self, number: int, genes: Mapping[str, Value]) -> Mapping[str, Value]:
        rng = random.Random(f"{self.seed}/{number}")
        return {gene.name: genes.get(gene.name, gene.domain.sample(rng)) for gene in self.problem.space.genes}

    @override
    def update(self, completed: Sequence[Trial], pending: Sequence[Trial] = ()) -> None:
        # Trials that it did not propose (start points, those of another searcher) belong to its first generation.
        key = _Evolution._get_generation_key()
        own = [t if key in t.searcher_state else replace(t, searcher_state={key: 0}) for t in completed]
        super().update(own, pending)


class _Evolution(NSGAIISampler):
    """NSGA-II whose mutations have a random stream of their own.

    Optuna gives mutation and crossover the same seed. With a new sampler per trial a mutated value would then depend
    on the very number that has decided about the crossover.
    """

    def __init__(self, *, population_size: int, seed: int) -> None:
        super().__init__(population_size=population_size, seed=seed)
        self._mutations = RandomSampler(seed=(seed + 2**31) % 2**32)

    @override
    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._mutations.sample_independent(study, trial, param_name, param_distribution)
