"""The trials as training data of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autopeft.search_space.dominance import coordinates, non_dominated
from autopeft.search_space.problem import DECLARED, Problem, Trial, declared_costs
from autopeft.searchers.bo.encoding import Encoding, Mask, Rows
from autopeft.searchers.courses import Extrapolation, at_rung

#: `Searcher.losses`.
Losses = Callable[[Trial], list[float] | None]

#: Losses are clipped to the median plus this number of interquartile ranges: how bad a diverged training is, is noise
#: that would dominate the fit.
FARTHEST_RANGES = 4.0


@dataclass(frozen=True, slots=True)
class Data:
    """The n trials that ended with values, and all N trials that show whether a candidate is trained and feasible.

    `rows` [n, G], `active` [n, G]; `losses` [n, m] of all objectives, as `coordinates`; `noise` [n, m] variances,
    NaN where unknown; `complete` [n]: trained to the end; `tried` [N, G], `tried_active`, `failed` [N]. A candidate
    beyond the bound of a metric that is only reported has failed: no model has its values.
    """

    rows: Rows
    active: Mask
    losses: Rows
    noise: Rows
    complete: Mask
    tried: Rows
    tried_active: Mask
    failed: Mask


class Observations:
    """Converter of trials to data.

    `modelled`: indices of the objectives that are measured; `declared`: of those that follow from the genes.
    """

    def __init__(self, problem: Problem, encoding: Encoding) -> None:
        self.problem = problem
        self.encoding = encoding
        self.modelled = [i for i, o in enumerate(problem.objectives) if o.name not in DECLARED]
        self.declared = [i for i, o in enumerate(problem.objectives) if o.name in DECLARED]

    def of(self, trials: Sequence[Trial], losses: Losses) -> Data | None:
        """Return the data of trials; None if fewer than two different candidates have values."""
        observed: dict[str, tuple[Trial, list[float]]] = {}
        tried: dict[str, tuple[Trial, bool]] = {}
        for trial in trials:
            found, key = losses(trial), trial.candidate.key
            if found is not None and self._is_beyond_reported(trial):
                tried.setdefault(key, (trial, True))
            elif found is not None:
                observed.setdefault(key, (trial, found))
                tried.setdefault(key, (trial, False))
            elif trial.state == "failed" or (trial.state == "infeasible" and not self._is_ruled_out(trial)):
                tried.setdefault(key, (trial, True))
        if len(observed) < 2:
            return None
        table = [trial for trial, _ in observed.values()]
        values = np.array([row for _, row in observed.values()])
        noise = np.array([self._noise(trial) for trial in table])
        for i, objective in enumerate(self.problem.objectives):
            values[:, i] = coordinates(values[:, i], objective)
        self._finish_courses(table, values, noise)
        for i in self.modelled:
            low, middle, high = np.quantile(values[:, i], [0.25, 0.5, 0.75])
            values[:, i] = np.minimum(values[:, i], middle + FARTHEST_RANGES * max(high - low, 1e-12))
        rows = self.encoding.rows([trial.genes for trial in table])
        every = self.encoding.rows([trial.genes for trial, _ in tried.values()])
        return Data(
            rows=rows,
            active=self.encoding.active(rows),
            losses=values,
            noise=noise,
            complete=np.array([trial.state == "complete" for trial in table]),
            tried=every,
            tried_active=self.encoding.active(every),
            failed=np.array([failed for _, failed in tried.values()]),
        )

    def best_prior(self, losses: Losses) -> Rows:
        """Return the front of the prior study [., G], best quality first."""
        complete = [trial for trial in self.problem.prior if trial.state == "complete"]
        points = [(found, trial.genes) for trial in complete if (found := losses(trial))]
        table = np.array([found for found, _ in points]).reshape(-1, len(self.problem.objectives))
        front = [point for point, member in zip(points, non_dominated(table), strict=True) if member]
        return self.encoding.rows([genes for _, genes in sorted(front, key=lambda point: point[0])])

    def _is_ruled_out(self, trial: Trial) -> bool:
        """Whether declared costs explain why a candidate was infeasible; then a model has nothing to learn from it."""
        if not trial.candidate.architecture:
            return True
        costs = declared_costs(trial.candidate.architecture, self.problem.space.backbone)
        return self.problem.limits.rejection(costs) is not None

    def _is_beyond_reported(self, trial: Trial) -> bool:
        """Whether a candidate that was trained to the end is beyond the bound of what is only reported."""
        known = [o for o in self.problem.reported if o.name in trial.values]
        return trial.state == "complete" and any(o.violation(trial.values[o.name]) > 0 for o in known)

    def _noise(self, trial: Trial) -> list[float]:
        assert trial.measurement is not None
        errors = trial.measurement.std_err
        # The error of a logarithm is the relative error.
        units = [trial.values[o.name] or 1.0 if o.is_cost else 1.0 for o in self.problem.objectives]
        found = zip(self.problem.objectives, units, strict=True)
        return [(errors[o.name] / unit) ** 2 if o.name in errors else float("nan") for o, unit in found]

    def _finish_courses(self, trials: Sequence[Trial], values: Rows, noise: Rows) -> None:
        """Replace the values of pruned trials by extrapolated final values, in `values` and `noise`.

        See `Extrapolation`; it is fitted on the complete trials that passed the same rung. The variance of the
        deviations is the noise of the extrapolated value.
        """
        complete = [k for k, trial in enumerate(trials) if trial.state == "complete"]
        for i in self.modelled:
            objective = self.problem.objectives[i]
            if not objective.is_quality:
                continue  # costs are measured before the training
            spread = float(np.var(values[complete, i])) if len(complete) > 1 else float(np.var(values[:, i]))
            for k, trial in enumerate(trials):
                if trial.state != "pruned" or trial.measurement is None:
                    continue
                share = trial.measurement.share
                pairs = [
                    (loss, values[c, i])
                    for c in complete
                    if (loss := at_rung(trials[c].measurement, share)) is not None
                ]
                line = Extrapolation.of(*np.array(pairs, dtype=float).reshape(-1, 2).T)
                own = at_rung(trial.measurement, share)
                if line is None or own is None:
                    noise[k, i] = spread  # the value at the rung, with a large noise
                    continue
                values[k, i], noise[k, i] = float(line(np.array(own))), line.variance
