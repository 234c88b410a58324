"""Successive halving with several objectives: the candidates that continue at a rung."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autopeft.search_space.dominance import non_dominated


def survivors(losses: Sequence[Sequence[float]], keep: float) -> list[int]:
    """Return the indices of the candidates that continue: the share `keep`, rounded up; all losses are minimised.

    Candidates continue by non-dominated rank, as in the multi-objective successive halving of Schmucker et al. 2021.
    From the rank that does not fit as a whole: the best in the first objective, then always the one farthest from all
    that were selected (the epsilon-net of Salinas et al. 2021). Distances are between ranks, because the objectives
    have no common unit. A loss that is not finite counts as infinite.
    """
    points = np.array([[x if math.isfinite(x) else math.inf for x in row] for row in losses], dtype=float)
    count = math.ceil(round(keep * len(points), 6))
    places = np.column_stack([_ranks(column) for column in points.T]) if len(points) else points
    chosen: list[int] = []
    left = np.arange(len(points))
    while len(chosen) < count:
        first = non_dominated(points[left])
        layer, left = left[first].tolist(), left[~first]
        room = count - len(chosen)
        chosen += layer if len(layer) <= room else _spread(layer, places, room)
    return sorted(chosen)


def _ranks(column: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each value's position among the distinct values, in [0, 1]."""
    values, places = np.unique(column, return_inverse=True)
    return places / max(1, len(values) - 1)


def _spread(layer: list[int], places: NDArray[np.float64], room: int) -> list[int]:
    """Select `room` members of a layer: the best one, then greedily the one farthest from all selected."""
    taken = [min(layer, key=lambda i: (places[i][0], i))]
    while len(taken) < room:
        rest = [i for i in layer if i not in taken]
        taken.append(max(rest, key=lambda i: (min(float(np.linalg.norm(places[i] - places[j])) for j in taken), -i)))
    return taken
