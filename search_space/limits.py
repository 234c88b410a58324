"""Limits: what a candidate may cost at most. They reject before any training, and say why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopeft.search_space.backbone import Backbone


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
        excess = {name: costs[name] / most - 1 for name, most in self.most.items() if name in costs}
        beyond = {name: value for name, value in excess.items() if value > 0}
        if not beyond:
            return None
        reasons = [f"{name} {costs[name]:,.6g} is above the limit {self.most[name]:,.6g}" for name in beyond]
        return max(beyond.values()), "; ".join(reasons)
