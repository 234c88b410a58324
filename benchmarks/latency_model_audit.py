"""Accuracy of the additive latency model: the option `--latency` of `audit`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from autopeft.evaluators.costs.predictor import CostTable
from autopeft.searchers.scored.ranking import RankCorrelation, rank_correlation
from autopeft.studies.config.problem import problem_for, space_for
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.proxy_scores import architectures_only

if TYPE_CHECKING:
    from autopeft.evaluators.training.packed import PackedEvaluator

METRIC = "latency_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyAudit:
    """Predicted and measured latencies [n] of draws from a space.

    `measured_s`, `repeated_s`: two measurements of each draw. `parts`: measurements that the model is made of.
    """

    predicted_s: tuple[float, ...]
    measured_s: tuple[float, ...]
    repeated_s: tuple[float, ...]
    parts: int

    def model(self) -> RankCorrelation:
        """Return how well predictions rank the first measurements."""
        return rank_correlation(self.predicted_s, self.measured_s)

    def ceiling(self) -> RankCorrelation:
        """Return how well the second measurements rank the first ones."""
        return rank_correlation(self.repeated_s, self.measured_s)

    def error(self, predicted_s: tuple[float, ...]) -> float:
        """Return the median of the relative errors."""
        measured = np.asarray(self.measured_s)
        return float(np.median(np.abs(np.asarray(predicted_s) - measured) / measured))

    def to_dict(self) -> dict[str, Any]:
        """Return the latencies as data."""
        return asdict(self)

    def to_markdown(self) -> str:
        """Return rank correlations and errors as a list."""
        low, high = 1e3 * min(self.measured_s), 1e3 * max(self.measured_s)
        lines = [
            f"{len(self.measured_s)} draws, {low:.1f} to {high:.1f} ms, predicted from {self.parts} measurements:\n"
        ]
        for name, found, values in (
            ("table", self.model(), self.predicted_s),
            ("a second measurement", self.ceiling(), self.repeated_s),
        ):
            interval = f"{found.tau_interval[0]:.2f} to {found.tau_interval[1]:.2f}"
            lines.append(f"- {name}: tau {found.tau:.2f} ({interval}), median error {self.error(values):.1%}")
        return "\n".join(lines) + "\n"


def audit_latency(
    settings: StudyFile, evaluator: PackedEvaluator, draws: int, advance: Callable[[], None]
) -> LatencyAudit:
    """Predict and measure the latency of `draws` architectures of a study's space."""
    inner = architectures_only(problem_for(settings, evaluator.backbone), draws)
    space = space_for(settings, evaluator.backbone)
    table = CostTable(evaluator, inner.space, [METRIC], space.middle.training)
    rng = Random(settings.seed)
    found: list[tuple[float, float, float]] = []
    for _ in range(draws):
        architecture = inner.space.decode(inner.space.sample(rng)).architecture
        predicted = table.costs(architecture)[METRIC]
        measured, repeated = (table.measure(architecture)[METRIC] for _ in range(2))
        found.append((predicted, measured, repeated))
        advance()
    predicted_s, measured_s, repeated_s = zip(*found, strict=True)
    return LatencyAudit(predicted_s=predicted_s, measured_s=measured_s, repeated_s=repeated_s, parts=table.num_measured)
