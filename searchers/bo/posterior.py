"""What `bo` believes after a number of trials: one process per measured objective, and one for what fails.

Notation: n trials, G genes, D features, m objectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autopeft.search_space.dominance import non_dominated
from autopeft.search_space.problem import Problem
from autopeft.searchers.bo.acquisition import acquisition
from autopeft.searchers.bo.acquisition_optimizer import Judge
from autopeft.searchers.bo.encoding import Encoding, Mask, Rows
from autopeft.searchers.bo.observations import Data, Observations
from autopeft.searchers.bo.surrogate import Surrogate, relevance

#: Below this many trials a correlation says nothing about the model.
LEAST_TRIALS_TO_DOUBT = 20
#: Correlation, times the root of the trials, that a model must exceed: the one-sided 5 % point of a normal variable.
CHANCE = 1.645
#: Spaces with so many genes have some that hardly matter; and the trials it takes to tell which (docs/searchers.md).
MANY_GENES = 30
SPARSE_TRIALS_PER_GENE = 3
#: Variance of the labels -1 and 1 of what fails. A process that follows their steps exactly has lengthscales too short
#: to say anything of other points.
LABEL_NOISE = 0.3
#: Genes whose relevance is told.
SHOWN_GENES = 10


@dataclass(frozen=True)
class Belief:
    """`centre` and `scale` [m] standardise the losses; `surrogates` by place of the objective; `failures` says of a
    point whether it can be trained, above 0: no.
    """

    problem: Problem
    encoding: Encoding
    data: Data
    observations: Observations
    earlier: Sequence[Surrogate]
    centre: Rows
    scale: Rows
    surrogates: Mapping[int, Surrogate]
    failures: Surrogate | None

    @classmethod
    def of(
        cls,
        problem: Problem,
        encoding: Encoding,
        observations: Observations,
        data: Data,
        earlier: Sequence[Surrogate] = (),
    ) -> Belief:
        """`earlier`: what a study of before makes of the measured objectives, see `surrogates_of`."""
        centre = data.losses.mean(0)
        scale = np.where(np.ptp(data.losses, axis=0) > 0, data.losses.std(0), 1.0)
        inputs = _inputs(encoding, observations, earlier, data.rows, data.active, centre, scale)
        width = len(encoding.gene_of_feature)
        kinds = kinds_of(problem, len(data.rows))
        surrogates = {
            i: Surrogate.chosen(
                inputs,
                (data.losses[:, i] - centre[i]) / scale[i],
                data.noise[:, i] / scale[i] ** 2,
                width,
                kinds,
                trend=width + column if earlier else None,
            )
            for column, i in enumerate(observations.modelled)
        }
        failures = None
        if data.failed.any():
            labels = np.where(data.failed, 1.0, -1.0)
            tried = _inputs(encoding, observations, earlier, data.tried, data.tried_active, centre, scale)
            failures = Surrogate.fit(tried, labels, np.full(len(labels), LABEL_NOISE), width, "smooth")
        return cls(problem, encoding, data, observations, earlier, centre, scale, surrogates, failures)

    def inputs(self, rows: Rows, active: Mask) -> Tensor:
        return _inputs(self.encoding, self.observations, self.earlier, rows, active, self.centre, self.scale)

    # The proposal

    def worth(self, pending: Rows, seed: int) -> Judge:
        """The worth of points, given that `pending` [., G] are under way."""
        modelled = self.observations.modelled
        sources = [
            modelled.index(i) if i in self.surrogates else -1 - self.observations.declared.index(i)
            for i in range(len(self.problem.objectives))
        ]
        judge = acquisition(
            [self.surrogates[i].model for i in modelled],
            None if self.failures is None else self.failures.model,
            sources,
            self.inputs(self.data.rows, self.data.active),
            self.inputs(pending, self.encoding.active(pending)),
            torch.as_tensor((self._reference() - self.centre) / self.scale),
            seed,
        )
        return lambda rows, active: judge(self.inputs(rows, active)).numpy()

    def _reference(self) -> Rows:
        """[m]: an objective's own reference, else the worst complete trial's loss and a tenth of the range, which is
        how reports measure the hypervolume; never beyond what the user accepts.
        """
        losses = self.data.losses[self.data.complete] if self.data.complete.any() else self.data.losses
        corner = losses.max(0) + 0.1 * np.ptp(losses, axis=0)
        for i, objective in enumerate(self.problem.objectives):
            if objective.reference is not None:
                corner[i] = objective.loss(objective.reference)
            if objective.bound is not None:
                corner[i] = min(corner[i], objective.loss(objective.bound))
        return corner

    @cached_property
    def incumbents(self) -> Rows:
        """[., G]: the trials that no other dominates, by what the processes make of them."""
        losses = self.data.losses.copy()
        with torch.no_grad():
            inputs = self.inputs(self.data.rows, self.data.active)
            for i, surrogate in self.surrogates.items():
                losses[:, i] = surrogate.model.posterior(inputs).mean[:, 0] * self.scale[i] + self.centre[i]
        return self.data.rows[non_dominated(losses)]

    # What it is worth itself

    @cached_property
    def rank_correlation(self) -> dict[str, float]:
        return {self.problem.objectives[i].name: s.rank_correlation() for i, s in self.surrogates.items()}

    @property
    def better_than_chance(self) -> bool:
        """Whether it ranks some objective of left-out trials better than chance; True while trials are few.

        A mild test: its hyperparameters have seen the trials that are left out, so a third of pure noises pass.
        """
        n = len(self.data.rows)
        if not self.surrogates:
            return False
        return n < LEAST_TRIALS_TO_DOUBT or max(self.rank_correlation.values()) > CHANCE / (n - 1) ** 0.5

    @cached_property
    def diagnostics(self) -> dict[str, Any]:
        shown: dict[str, dict[str, float]] = {}
        features = self.encoding.features(self.data.rows, self.data.active)
        for i, surrogate in self.surrogates.items():
            shares = relevance(surrogate.lengthscales(), self.encoding.gene_of_feature, features.var(0))
            top = sorted(shares.items(), key=lambda pair: -pair[1])[:SHOWN_GENES]
            shown[self.problem.objectives[i].name] = {gene: round(share, 4) for gene, share in top}
        correlation = {name: round(value, 4) for name, value in self.rank_correlation.items()}
        return {"phase": "model", "rank_correlation": correlation, "relevance": shown}


def kinds_of(problem: Problem, num_trials: int) -> tuple[str, ...]:
    """The kernels to choose among. With few trials per gene a sparse process takes chance for relevance."""
    if problem.surrogate is not None:
        return (problem.surrogate,)
    num_genes = len(problem.space.genes)
    enough = num_genes >= MANY_GENES and num_trials >= SPARSE_TRIALS_PER_GENE * num_genes
    return ("smooth", "sparse") if enough else ("smooth",)


def surrogates_of(encoding: Encoding, observations: Observations, data: Data) -> list[Surrogate]:
    """One per measured objective, each over its own standardised losses."""
    features = encoding.features(data.rows, data.active)
    found = []
    for i in observations.modelled:
        scale = data.losses[:, i].std() or 1.0
        losses = (data.losses[:, i] - data.losses[:, i].mean()) / scale
        noise = data.noise[:, i] / scale**2
        found.append(Surrogate.fit(torch.as_tensor(features), losses, noise, features.shape[1], "smooth"))
    return found


def _inputs(
    encoding: Encoding,
    observations: Observations,
    earlier: Sequence[Surrogate],
    rows: Rows,
    active: Mask,
    centre: Rows,
    scale: Rows,
) -> Tensor:
    """[n, D + e + k]: features, what an earlier study makes of the measured objectives, and the standardised losses of
    the declared ones.
    """
    costs = encoding.costs(rows, active)
    features = encoding.features(rows, active)
    columns = [features]
    with torch.no_grad():
        columns += [surrogate.model.posterior(torch.as_tensor(features)).mean.numpy() for surrogate in earlier]
    for i in observations.declared:
        objective = observations.problem.objectives[i]
        columns.append((objective.loss(costs[objective.name]) - centre[i]) / scale[i])
    return torch.as_tensor(np.column_stack(columns))
