"""A surrogate benchmark: the space of `table.yaml` with a quality that is learnt from real trainings (`table.SHIPPED`).

After Eggensperger et al. 2015 (Efficient benchmarking of hyperparameter optimizers via surrogates) and Zela et al. 2022
(Surrogate NAS benchmarks). The model is an ensemble of trees, as in both: a Gaussian process would favour the searchers
that use one. It predicts once, every architecture at every step of the learning rate. So the problem is a finite table,
its front is exact, and it is as realistic as the fit, whose quality on held-out rows is stated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autopeft.benchmarks.race.base import RaceProblem
from autopeft.benchmarks.race.table import SHIPPED, STUDY, TableRow, by_candidate, read
from autopeft.search_space.domains import Choice
from autopeft.search_space.problem import Problem, declared_costs
from autopeft.search_space.spaces.genes import TRAINING, Assignment
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.studies.analysis.pareto import Floats
from autopeft.studies.config.problem import problem_for

if TYPE_CHECKING:
    from sklearn.ensemble import ExtraTreesRegressor

RATE = TRAINING + "learning_rate"
#: Steps of the learning rate, equally spaced on its scale; a rate between two of them is as good as the nearer one.
STEPS = 9
FOLDS = 10
TREES = 400
#: Share of the candidates that may count as collapsed in training: two in 300 are at 5 and 8 %, the next is at 40, and
#: they would dominate trees that minimise squares. Their accuracy is raised to the first one above this share.
COLLAPSED = 0.01
#: Least candidates of a table.
LEAST = 50
#: Least differences between seeds from which their spread is estimated.
LEAST_REPEATS = 10


class NoTableError(ValueError):
    """There are too few rows to learn from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitQuality:
    """Quality of the predictions of held-out candidates; see `held_out`."""

    candidates: int
    r2: float
    spearman: float


def tabulated(path: Path = SHIPPED) -> RaceProblem:
    """Return the race problem of a table. Raises NoTableError for fewer than `LEAST` candidates."""
    problem = table_problem()
    space, rows = problem.space, read(path)
    inputs, quality, weights = _examples(space, rows)
    if len(quality) < LEAST:
        more = "`python -m autopeft.benchmarks tabulate` adds some"
        raise NoTableError(f"{path}: has {len(quality)} candidates, but a surrogate needs {LEAST}: {more}")
    fit = held_out(inputs, quality, weights)
    noise = seed_sd(rows)
    architectures = [genes for genes in settings(space) if space.decode(genes).architecture]
    costs = [declared_costs(space.decode(genes).architecture, space.backbone) for genes in architectures]
    grid = np.linspace(0.0, 1.0, STEPS)
    encoded = np.array([_encoded(space, genes, c["num_params"]) for genes, c in zip(architectures, costs, strict=True)])
    everything = np.hstack([np.repeat(encoded, STEPS, axis=0), np.tile(grid, len(encoded))[:, None]])
    predicted = _model().fit(inputs, quality, sample_weight=weights).predict(everything).reshape(-1, STEPS)
    places = {_name(genes): place for place, genes in enumerate(architectures)}
    domain = next(gene.domain for gene in space.genes if gene.name == RATE)

    def values(genes: Assignment) -> dict[str, float]:
        place = places.get(_name(genes))
        if place is None:  # without adapters
            return {"accuracy": 0.0, **declared_costs(space.decode(genes).architecture, space.backbone)}
        step = round(domain.to_unit(genes[RATE]) * (STEPS - 1))
        return {"accuracy": float(predicted[place, step]), **costs[place]}

    summary = (
        f"the space of table.yaml by trees over {len(rows)} trainings of {fit.candidates} candidates; held-out rows:"
        f" R2 {fit.r2:.2f}, Spearman {fit.spearman:.2f}; noise between seeds {noise:.4f}; front by enumeration"
    )
    points = {"accuracy": predicted.max(axis=1), "num_params": [c["num_params"] for c in costs]}
    return RaceProblem.of("table", summary, problem, values, {"accuracy": noise}, points)


def table_problem() -> Problem:
    """Return the problem of `table.yaml`."""
    from autopeft.evaluators.backbones import describe_backbone
    from autopeft.studies.config.loading import load_study

    study = load_study(STUDY, environment={})
    return problem_for(study, describe_backbone(study.model_id, study.model.revision, study.task))


def settings(space: SearchSpace) -> Iterator[Assignment]:
    """Yield every setting of the architecture's genes, which must be choices; training genes are at their middle."""
    genes = [gene for gene in space.genes if not gene.name.startswith(TRAINING)]
    middle = {g.name: g.domain.from_unit(0.5) for g in space.genes if g.name.startswith(TRAINING)}
    incomplete: list[tuple[int, Assignment]] = [(0, {})]
    while incomplete:
        position, assignment = incomplete.pop()
        while position < len(genes) and not genes[position].is_active(assignment):
            position += 1
        if position == len(genes):
            yield {**assignment, **middle}
            continue
        domain = genes[position].domain
        assert isinstance(domain, Choice), f"{genes[position].name} is not countable"
        incomplete += [(position + 1, {**assignment, genes[position].name: value}) for value in domain.choices]


def seed_sd(rows: Sequence[TableRow]) -> float:
    """Return the pooled standard deviation of the accuracy between the seeds of one candidate.

    Where there are too few repeats, return the rows' own standard error over examples.
    """
    accuracies = _accuracies(rows).values()
    dof = sum(len(found) - 1 for found in accuracies)
    if dof < LEAST_REPEATS:
        return float(np.sqrt(np.mean([row.measurement.std_err["accuracy"] ** 2 for row in rows])))
    return float(np.sqrt(sum(np.var(found) * len(found) for found in accuracies) / dof))


def held_out(inputs: Floats, quality: Floats, weights: Floats) -> FitQuality:
    """Cross-validate in ten folds; the seeds of a candidate are one example, their mean."""
    from scipy.stats import spearmanr
    from sklearn.metrics import r2_score
    from sklearn.model_selection import KFold, cross_val_predict

    folds = KFold(FOLDS, shuffle=True, random_state=0)
    found = cross_val_predict(_model(), inputs, quality, cv=folds, params={"sample_weight": weights})
    return FitQuality(
        candidates=len(quality),
        r2=float(r2_score(quality, found)),
        spearman=float(spearmanr(quality, found).statistic),
    )


def _model() -> ExtraTreesRegressor:
    from sklearn.ensemble import ExtraTreesRegressor

    return ExtraTreesRegressor(n_estimators=TREES, random_state=0)


def _accuracies(rows: Sequence[TableRow]) -> dict[str, list[float]]:
    return {key: [row.measurement.values["accuracy"] for row in own] for key, own in by_candidate(rows).items()}


def _examples(space: SearchSpace, rows: Sequence[TableRow]) -> tuple[Floats, Floats, Floats]:
    """Return inputs [n, d], mean accuracy [n] and number of seeds [n], by candidate."""
    accuracies = _accuracies(rows)
    first = {row.candidate: row for row in reversed(rows)}
    domain = next(gene.domain for gene in space.genes if gene.name == RATE)
    inputs = [
        [*_encoded(space, row.genes, row.measurement.values["num_params"]), domain.to_unit(row.genes[RATE])]
        for row in (first[candidate] for candidate in accuracies)
    ]
    quality = np.array([float(np.mean(found)) for found in accuracies.values()])
    if len(quality):
        quality = np.maximum(quality, np.quantile(quality, COLLAPSED, method="higher"))
    return np.array(inputs), quality, np.array([len(found) for found in accuracies.values()], dtype=float)


def _encoded(space: SearchSpace, genes: Assignment, num_params: float) -> list[float]:
    """Return the features of an architecture.

    Sizes on the unit interval, 0 where there is none (which makes the on/off genes redundant); the parameters and their
    logarithm; and sums that single trees can hardly represent: the size of each adapter and the number of sizes.
    """
    own = [gene for gene in space.genes if gene.size is None and not gene.name.startswith(TRAINING)]
    sizes = [gene.domain.to_unit(genes[gene.name]) if gene.name in genes else 0.0 for gene in own]
    of_adapter: dict[str | None, float] = {}
    for gene, size in zip(own, sizes, strict=True):
        of_adapter[gene.adapter] = of_adapter.get(gene.adapter, 0.0) + size
    count = sum(size > 0 for size in sizes)
    return [*sizes, num_params, float(np.log(max(num_params, 1.0))), *of_adapter.values(), float(count)]


def _name(genes: Assignment) -> tuple[tuple[str, object], ...]:
    """Return the genes of the architecture, as a key."""
    return tuple((name, value) for name, value in genes.items() if not name.startswith(TRAINING))
