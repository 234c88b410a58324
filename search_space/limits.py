"""Limits: what a candidate may cost at most. They reject before any training, and say why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopeft.search_space.backbones.backbone import Backbone


@dataclass(frozen=True, slots=True)
class Limits:
    """`most`: the largest allowed value by metric name, in the metric's unit."""

    most: Mapping[str, float]

    @classmethod
    def of(cls, most: Mapping[str, float], backbone: Backbone) -> Limits:
        """`trainable_fraction`, a share of the backbone's parameters, becomes a limit on `num_params`."""
        most = dict(most)
        fraction = most.pop("trainable_fraction", None)
        if fraction is not None:
            most["num_params"] = min(most.get("num_params", float("inf")), fraction * backbone.num_params)
        return cls(most)

    def objection(self, costs: Mapping[str, float]) -> tuple[float, str] | None:
        """The largest relative excess (0.5: half as much again) and every reason; None if all known costs are fine."""
        excess = {name: _excess(costs[name], most) for name, most in self.most.items() if name in costs}
        beyond = {name: value for name, value in excess.items() if value > 0}
        if not beyond:
            return None
        reasons = [f"{name} {_shown(costs[name])} is above the limit {_shown(self.most[name])}" for name in beyond]
        return max(beyond.values()), "; ".join(reasons)


def _excess(cost: float, most: float) -> float:
    """Relative to the limit; a limit of 0 has no relation to anything."""
    return cost / most - 1 if most > 0 else cost - most


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
