"""Limits: upper bounds on the costs of a candidate, checked before any training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopeft.search_space.backbones.backbone import Backbone


@dataclass(frozen=True, slots=True)
class Limits:
    """`maxima`: the largest allowed value by metric name, in the metric's unit."""

    maxima: Mapping[str, float]

    @classmethod
    def of(cls, maxima: Mapping[str, float], backbone: Backbone) -> Limits:
        """Return limits in which `trainable_fraction`, a share of the backbone's parameters, bounds `num_params`."""
        maxima = dict(maxima)
        fraction = maxima.pop("trainable_fraction", None)
        if fraction is not None:
            maxima["num_params"] = min(maxima.get("num_params", float("inf")), fraction * backbone.num_params)
        return cls(maxima)

    def rejection(self, costs: Mapping[str, float]) -> tuple[float, str] | None:
        """Return the largest relative excess (0.5: 50 % above the limit) and a reason for each limit exceeded.

        None if all limits hold; a limit on a cost that is not in `costs` holds.
        """
        excess = {name: _excess(costs[name], limit) for name, limit in self.maxima.items() if name in costs}
        exceeded = {name: value for name, value in excess.items() if value > 0}
        if not exceeded:
            return None
        reasons = [
            f"{name} {_formatted(costs[name])} is above the limit {_formatted(self.maxima[name])}" for name in exceeded
        ]
        return max(exceeded.values()), "; ".join(reasons)


def _excess(cost: float, limit: float) -> float:
    """Return the excess relative to the limit; absolute for a limit of 0."""
    return cost / limit - 1 if limit > 0 else cost - limit


def _formatted(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
