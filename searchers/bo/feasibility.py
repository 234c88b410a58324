"""Feasibility of points, as far as it is known before any trial."""

from __future__ import annotations

from autopeft.search_space.problem import Problem
from autopeft.searchers.bo.encoding import Encoding, Mask, Rows


def feasible(problem: Problem, encoding: Encoding, rows: Rows, active: Mask) -> Mask:
    """Return whether points [n, G] have an adapter and declared costs within the limits and bounds, [n]."""
    keeps = ~encoding.is_empty(rows, active)
    costs = encoding.costs(rows, active)
    for name in problem.limits.maxima.keys() & costs.keys():
        keeps &= costs[name] <= problem.limits.maxima[name]
    for objective in problem.measures:
        if objective.name in costs and objective.bound is not None:
            keeps &= objective.loss(costs[objective.name]) <= objective.loss(objective.bound)
    return keeps
