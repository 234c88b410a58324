"""Accuracy of the additive latency model: the option `--latency` of `audit`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from autopeft.evaluators.costs.predictor import CostTable
from autopeft.searchers.scored.ranking import Ranking, ranking
from autopeft.studies.config.problem import problem_for, space_for
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.proxy_scores import architectures_only

if TYPE_CHECKING:
    from autopeft.evaluators.training.packed import PackedEvaluator

METRIC = "latency_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Foretold:
    """`foretold_s`, `measured_s`, `again_s`: [n] latencies of draws from the space; the last two are two measurements.
    `parts`: measurements that the table took.
    """

    foretold_s: tuple[float, ...]
    measured_s: tuple[float, ...]
    again_s: tuple[float, ...]
    parts: int

    def table(self) -> Ranking:
        return ranking(self.foretold_s, self.measured_s)

    def ceiling(self) -> Ranking:
        """How well a measurement ranks the next one."""
        return ranking(self.again_s, self.measured_s)

    def error(self, foretold: tuple[float, ...]) -> float:
        """Median of the relative errors."""
        measured = np.asarray(self.measured_s)
        return float(np.median(np.abs(np.asarray(foretold) - measured) / measured))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_markdown(self) -> str:
        low, high = 1e3 * min(self.measured_s), 1e3 * max(self.measured_s)
        lines = [
            f"{len(self.measured_s)} draws, {low:.1f} to {high:.1f} ms, foretold from {self.parts} measurements:\n"
        ]
        for name, found, values in (
            ("table", self.table(), self.foretold_s),
            ("a second measurement", self.ceiling(), self.again_s),
        ):
            interval = f"{found.tau_interval[0]:.2f} to {found.tau_interval[1]:.2f}"
            lines.append(f"- {name}: tau {found.tau:.2f} ({interval}), median error {self.error(values):.1%}")
        return "\n".join(lines) + "\n"


def foretell(settings: StudyFile, evaluator: PackedEvaluator, draws: int, advance: Callable[[], None]) -> Foretold:
    """Foretell and measure the latency of `draws` architectures of a study's space."""
    inner = architectures_only(problem_for(settings, evaluator.backbone), draws)
    space = space_for(settings, evaluator.backbone)
    table = CostTable(evaluator, inner.space, [METRIC], space.middle.training)
    rng = Random(settings.seed)
    found: list[tuple[float, float, float]] = []
    for _ in range(draws):
        architecture = inner.space.decode(inner.space.sample(rng)).architecture
        foretold = table.costs(architecture)[METRIC]
        measured, again = (table.measure(architecture)[METRIC] for _ in range(2))
        found.append((foretold, measured, again))
        advance()
    foretold_s, measured_s, again_s = zip(*found, strict=True)
    return Foretold(foretold_s=foretold_s, measured_s=measured_s, again_s=again_s, parts=table.num_measured)
