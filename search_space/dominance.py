"""Pareto dominance, and the scale of hypervolumes. Points are rows of losses: every objective is minimised here.

Notation: n points, m objectives. A point dominates another if it is no worse in every objective and better in one.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from autopeft.search_space.problem import DECLARED, Objective

#: A measured cost below this counts as this in a hypervolume: a nanosecond, and less than a byte.
LEAST_MEASURED = 1e-9


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Return which of the points [n, m] no other dominates, as a mask [n].

    Equal points have equal entries. A point with a NaN is never on the front and dominates nothing.
    """
    losses = np.asarray(points, dtype=float)
    mask: NDArray[np.bool_] = ~np.isnan(losses).any(axis=1)
    for i in np.flatnonzero(mask):
        mask[i] = not ((losses <= losses[i]).all(axis=1) & (losses < losses[i]).any(axis=1)).any()
    return mask


def coordinates(losses: ArrayLike, objective: Objective) -> NDArray[np.float64]:
    """Return losses of an objective on the scale on which hypervolumes are measured.

    That is the natural logarithm for a cost to minimise: from 3,000 to 6,000 parameters is as far as from 30,000 to
    60,000. A count below 1 counts as 1. Other losses are unchanged.
    """
    found: NDArray[np.float64] = np.asarray(losses, dtype=float)
    if not objective.is_cost:
        return found
    least = 1.0 if objective.name in DECLARED else LEAST_MEASURED
    logarithms: NDArray[np.float64] = np.log(np.maximum(found, least))
    return logarithms


def from_coordinate(coordinate: float, objective: Objective) -> float:
    """Return the loss at a coordinate."""
    return math.exp(coordinate) if objective.is_cost else coordinate
