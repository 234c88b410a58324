"""The models of `bo` given the trials: a Gaussian process per measured objective, and one of failures.

Notation: n trials, G genes, D features, m objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any

import numpy as np
import torch
from botorch.utils.sampling import draw_sobol_normal_samples
from torch import Tensor

from autopeft.search_space.dominance import coordinates, non_dominated
from autopeft.search_space.problem import Problem
from autopeft.searchers.bo.acquisition import Posterior, hypervolume_improvement, log_trainable, quiet
from autopeft.searchers.bo.acquisition_optimizer import Acquisition
from autopeft.searchers.bo.cheapest_as_good import CheapestAsGood
from autopeft.searchers.bo.encoding import Encoding, Mask, Rows
from autopeft.searchers.bo.observations import Data, Observations
from autopeft.searchers.bo.surrogate import GaussianProcess, relevance

#: From the inputs, rows and active genes of points to the logarithm [n] of their acquisition values.
Improvement = Callable[[Tensor, Rows, Mask], Tensor]

#: Below this many trials a correlation is not evidence against the model.
LEAST_TRIALS_TO_DOUBT = 20
#: Correlation, times the root of the trials, that a model must exceed: the one-sided 5 % point of a normal variable.
CHANCE = 1.645
#: Spaces with this many genes have some that hardly matter; and the trials it takes to find which (docs/searchers.md).
MANY_GENES = 30
SPARSE_TRIALS_PER_GENE = 3
#: Variance of the labels -1 and 1 (failed). A process that interpolates their steps has lengthscales too short to
#: predict anything at other points.
LABEL_NOISE = 0.3
#: Joint samples of the losses for a probability.
CHANCE_SAMPLES = 512
#: Genes whose relevance is in the diagnostics.
SHOWN_GENES = 10


@dataclass(frozen=True)
class ModelPosterior:
    """Gaussian processes conditioned on the trials.

    `centre` and `scale` [m] standardise the losses; `processes` by index of the objective; `failures` is above 0 where
    a candidate cannot be trained; `prior`: the processes of a prior study.
    """

    problem: Problem
    encoding: Encoding
    data: Data
    observations: Observations
    prior: Sequence[GaussianProcess]
    centre: Rows
    scale: Rows
    processes: Mapping[int, GaussianProcess]
    failures: GaussianProcess | None

    @classmethod
    def of(
        cls,
        problem: Problem,
        encoding: Encoding,
        observations: Observations,
        data: Data,
        prior: Sequence[GaussianProcess] = (),
    ) -> ModelPosterior:
        """Fit the processes. `prior`: the measured objectives' processes of a prior study, see `processes_of`."""
        centre = data.losses.mean(0)
        scale = np.where(np.ptp(data.losses, axis=0) > 0, data.losses.std(0), 1.0)
        inputs = _inputs(encoding, observations, prior, data.rows, data.active, centre, scale)
        width, rate = len(encoding.gene_of_feature), encoding.rate and encoding.rate[0]
        kinds = kinds_of(problem, len(data.rows))
        processes = {
            i: GaussianProcess.chosen(
                inputs,
                (data.losses[:, i] - centre[i]) / scale[i],
                data.noise[:, i] / scale[i] ** 2,
                width,
                kinds,
                rate=rate,
                trend=width + (rate is not None) + column if prior else None,
            )
            for column, i in enumerate(observations.modelled)
        }
        failures = None
        if data.failed.any():
            labels = np.where(data.failed, 1.0, -1.0)
            tried = _inputs(encoding, observations, prior, data.tried, data.tried_active, centre, scale)
            failures = GaussianProcess.fit(tried, labels, np.full(len(labels), LABEL_NOISE), width, "smooth")
        return cls(problem, encoding, data, observations, prior, centre, scale, processes, failures)

    def inputs(self, rows: Rows, active: Mask) -> Tensor:
        """Return the inputs of the processes, see `_inputs`."""
        return _inputs(self.encoding, self.observations, self.prior, rows, active, self.centre, self.scale)

    # The proposal

    def acquisition(self, pending: Rows, seed: int) -> Acquisition:
        """Return the acquisition function of the problem's goal, given that `pending` [., G] are running."""
        with quiet():
            improvement = (self._savings if self.problem.goal == "cheapest_as_good" else self._growth)(pending, seed)

        def evaluate(rows: Rows, active: Mask) -> Rows:
            with quiet():
                inputs = self.inputs(rows, active)
                found = improvement(inputs, rows, active)
                if self.failures is not None:
                    found = found + log_trainable(self.failures.model, inputs)
                return found.numpy()

        return evaluate

    def _growth(self, pending: Rows, seed: int) -> Improvement:
        modelled = self.observations.modelled
        sources = [
            modelled.index(i) if i in self.processes else -1 - self.observations.declared.index(i)
            for i in range(len(self.problem.objectives))
        ]
        improvement = hypervolume_improvement(
            [self.processes[i].model for i in modelled],
            sources,
            self.inputs(self.data.rows, self.data.active),
            self.inputs(pending, self.encoding.active(pending)),
            torch.as_tensor((self._reference() - self.centre) / self.scale),
            seed,
        )
        return lambda inputs, rows, active: improvement(inputs)

    def _savings(self, pending: Rows, seed: int) -> Improvement:
        quality = self.problem.first(quality=True)
        points = np.vstack([self.data.rows, pending])
        active = self.encoding.active(points)
        baseline = self.inputs(points, active)
        objective = self.problem.objectives[quality]
        best = objective.value(float(self.data.losses[:, quality].min()))
        bound = inf if objective.bound is None else objective.loss(objective.bound)
        improvement = CheapestAsGood(
            self.processes[quality].model,
            baseline,
            self._log_costs(baseline, points, active),
            self.problem.margin(best) / self.scale[quality],
            seed,
            (bound - self.centre[quality]) / self.scale[quality],
        )
        return lambda inputs, rows, active: improvement(inputs, self._log_costs(inputs, rows, active))

    def _log_costs(self, inputs: Tensor, rows: Rows, active: Mask) -> Tensor:
        """Return the coordinate [n], a logarithm, of the first cost; for a measured one, the prediction of it."""
        i = self.problem.first(quality=False)
        if i in self.processes:
            mean = self.processes[i].model.posterior(inputs).mean[:, 0]
            return torch.as_tensor(mean.numpy() * self.scale[i] + self.centre[i])
        objective = self.problem.objectives[i]
        return torch.as_tensor(coordinates(self.encoding.costs(rows, active)[objective.name], objective))

    def chance_of_cheaper(self, proposed: Rows, cost: float, seed: int) -> float:
        """Return the probability that one of the points [., G] is within the margin of the best and costs less.

        The best of trials and proposed points. `cost`: loss of the first cost to minimise.
        """
        quality = self.problem.first(quality=True)
        objective, known = self.problem.objectives[quality], len(self.data.rows)
        points = np.vstack([self.data.rows, proposed])
        active = self.encoding.active(points)
        with quiet():
            inputs = self.inputs(points, active)
            posterior = Posterior.of(self.processes[quality].model)
            normal = draw_sobol_normal_samples(len(points), CHANCE_SAMPLES, dtype=torch.double, seed=seed)
            losses = posterior.joint(inputs, normal)
            most = float(coordinates(cost, self.problem.objectives[self.problem.first(quality=False)]))
            cheaper = self._log_costs(inputs, points, active)[known:] < most - 1e-9
            if self.failures is not None:
                trainable = log_trainable(self.failures.model, inputs[known:]).exp()
            else:
                trainable = torch.ones(len(proposed), dtype=torch.double)
        best = objective.value(float(self.data.losses[:, quality].min()))
        worst = losses.amin(1, keepdim=True) + self.problem.margin(best) / self.scale[quality]
        if objective.bound is not None:
            worst = worst.clamp_max((objective.loss(objective.bound) - self.centre[quality]) / self.scale[quality])
        found = (losses[:, known:] <= worst) & cheaper
        return float(1 - (1 - found * trainable).prod(1).mean())

    def _reference(self) -> Rows:
        """Return the reference point [m]: an objective's own, else the worst complete trial's plus 0.1 range.

        Reports measure the hypervolume in the same way. It is never beyond an objective's bound.
        """
        losses = self.data.losses[self.data.complete] if self.data.complete.any() else self.data.losses
        corner: Rows = losses.max(0) + 0.1 * np.ptp(losses, axis=0)
        for i, objective in enumerate(self.problem.objectives):
            if objective.reference is not None:
                corner[i] = coordinates(objective.loss(objective.reference), objective)
            if objective.bound is not None:
                corner[i] = min(corner[i], coordinates(objective.loss(objective.bound), objective))
        return corner

    @cached_property
    def incumbents(self) -> Rows:
        """Trials [., G] whose posterior means no other trial dominates."""
        losses = self.data.losses.copy()
        with torch.no_grad():
            inputs = self.inputs(self.data.rows, self.data.active)
            for i, process in self.processes.items():
                losses[:, i] = process.model.posterior(inputs).mean[:, 0] * self.scale[i] + self.centre[i]
        return self.data.rows[non_dominated(losses)]

    # The quality of the models

    @cached_property
    def rank_correlation(self) -> dict[str, float]:
        """Spearman's correlation of left-out predictions by objective."""
        return {self.problem.objectives[i].name: s.rank_correlation() for i, s in self.processes.items()}

    @property
    def better_than_chance(self) -> bool:
        """Whether some objective of left-out trials is ranked better than chance; True while trials are few.

        A lenient test: the hyperparameters have seen the trials that are left out, so a third of pure noises pass.
        """
        n = len(self.data.rows)
        if not self.processes:
            return False
        return n < LEAST_TRIALS_TO_DOUBT or max(self.rank_correlation.values()) > CHANCE / (n - 1) ** 0.5

    @cached_property
    def diagnostics(self) -> dict[str, Any]:
        """Diagnostics of a suggestion: rank correlation by objective, and the genes that matter most."""
        shown: dict[str, dict[str, float]] = {}
        features = self.encoding.features(self.data.rows, self.data.active)
        for i, process in self.processes.items():
            shares = relevance(process.lengthscales(), self.encoding.gene_of_feature, features.var(0))
            top = sorted(shares.items(), key=lambda pair: -pair[1])[:SHOWN_GENES]
            shown[self.problem.objectives[i].name] = {gene: round(share, 4) for gene, share in top}
        correlation = {name: round(value, 4) for name, value in self.rank_correlation.items()}
        return {"phase": "model", "rank_correlation": correlation, "relevance": shown}


def kinds_of(problem: Problem, num_trials: int) -> tuple[str, ...]:
    """Return the kernels to choose among. With few trials per gene a sparse process takes chance for relevance."""
    if problem.surrogate is not None:
        return (problem.surrogate,)
    num_genes = len(problem.space.genes)
    enough = num_genes >= MANY_GENES and num_trials >= SPARSE_TRIALS_PER_GENE * num_genes
    return ("smooth", "sparse") if enough else ("smooth",)


def processes_of(encoding: Encoding, observations: Observations, data: Data) -> list[GaussianProcess]:
    """Fit a process to each measured objective, each over its own standardised losses."""
    inputs = encoding.inputs(data.rows, data.active, encoding.costs(data.rows, data.active)["num_params"])
    width, rate = len(encoding.gene_of_feature), encoding.rate and encoding.rate[0]
    found = []
    for i in observations.modelled:
        scale = data.losses[:, i].std() or 1.0
        losses = (data.losses[:, i] - data.losses[:, i].mean()) / scale
        noise = data.noise[:, i] / scale**2
        found.append(GaussianProcess.fit(torch.as_tensor(inputs), losses, noise, width, "smooth", rate))
    return found


def _inputs(
    encoding: Encoding,
    observations: Observations,
    prior: Sequence[GaussianProcess],
    rows: Rows,
    active: Mask,
    centre: Rows,
    scale: Rows,
) -> Tensor:
    """Return [n, . + e + k]: `Encoding.inputs`, a prior study's predictions of measured objectives, declared losses.

    The declared losses are standardised. e: processes of the prior study; k: declared objectives.
    """
    costs = encoding.costs(rows, active)
    own = encoding.inputs(rows, active, costs["num_params"])
    columns = [own]
    with torch.no_grad():
        columns += [process.model.posterior(torch.as_tensor(own)).mean.numpy() for process in prior]
    for i in observations.declared:
        objective = observations.problem.objectives[i]
        columns.append((coordinates(objective.loss(costs[objective.name]), objective) - centre[i]) / scale[i])
    return torch.as_tensor(np.column_stack(columns))
