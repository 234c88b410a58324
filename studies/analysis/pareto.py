"""The Pareto front and its hypervolume. Points are rows of losses, or of their `coordinates` for a hypervolume.

Notation: n points, m objectives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Exact (WFG: While, Bradstreet and Barone 2012) for any number of objectives. Optuna keeps it in a private
# module, but the public alternative, botorch's, imports torch. tests/studies/analysis/test_pareto.py compares it with
# inclusion-exclusion.
from optuna._hypervolume import compute_hypervolume

from autopeft.search_space.dominance import coordinates, non_dominated
from autopeft.search_space.problem import Objective, Trial

Floats = NDArray[np.float64]


def losses(trials: Sequence[Trial], objectives: Sequence[Objective]) -> Floats:
    """Return the losses [n, m] of the trials.

    A trial that cannot be on the front (failed, running or infeasible) is a row of NaN.
    """
    table = np.full((len(trials), len(objectives)), np.nan)
    for row, trial in zip(table, trials, strict=True):
        if trial.state == "complete" and trial.measurement is not None and trial.violation <= 0:
            row[:] = [objective.loss(trial.measurement.values[objective.name]) for objective in objectives]
    return table


def scaled(points: ArrayLike, objectives: Sequence[Objective]) -> Floats:
    """Return the coordinates of losses [n, m]."""
    table = np.asarray(points, dtype=float).reshape(-1, len(objectives))
    return np.stack([coordinates(column, o) for column, o in zip(table.T, objectives, strict=True)], axis=1)


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Return the volume that the points [n, m] dominate, up to the reference point [m] (Zitzler and Thiele 1999).

    A point beyond the reference in some objective, or with a NaN, adds nothing.
    """
    end = np.asarray(reference, dtype=float)
    table = np.asarray(points, dtype=float).reshape(-1, len(end))
    inside = (table <= end).all(axis=1)
    return float(compute_hypervolume(table[inside], end))


def reference_point(trials: Sequence[Trial], objectives: Sequence[Objective]) -> Floats:
    """Return the `corner` [m] of the complete and feasible trials.

    Points of one curve need one reference point: compute it once, from all trials.
    """
    table = scaled(losses(trials, objectives), objectives)
    return corner(table[~np.isnan(table).any(axis=1)], objectives)


def corner(points: Floats, objectives: Sequence[Objective]) -> Floats:
    """Return the reference point [m] of the hypervolume for points [n, m].

    It has an objective's own `reference` where one is declared, otherwise the worst value plus a tenth of the range (if
    all are equal, a tenth more of a cost, or a tenth of another value). Hypervolumes with different reference points
    cannot be compared.
    Raises ValueError if a reference is not declared and there is no point.
    """
    ends = []
    for objective, column in zip(objectives, points.T, strict=True):
        if objective.reference is not None:
            ends.append(float(coordinates(objective.loss(objective.reference), objective)))
        elif len(column):
            alone = math.log(1.1) if objective.is_cost else 0.1 * (abs(column[0]) or 1.0)
            margin = 0.1 * np.ptp(column) or alone
            ends.append(column.max() + margin)
        else:
            raise ValueError(f"{objective.name}: no reference value is set and no feasible trial is complete")
    return np.array(ends)


def hypervolume_by_trial(trials: Sequence[Trial], objectives: Sequence[Objective], reference: ArrayLike) -> Floats:
    """Return the hypervolumes [n] of the first 1, 2, ..., n trials, in their order, for one `reference` point [m]."""
    table = scaled(losses(trials, objectives), objectives)
    curve = np.zeros(len(table))
    front = table[:0]
    for i, row in enumerate(table):
        front = np.vstack([front, row])
        front = front[non_dominated(front)]
        curve[i] = hypervolume(front, reference)
    return curve
