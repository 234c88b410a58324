"""The simulation of metrics: its columns are those of a classifier, and the shares are counted right."""

from __future__ import annotations

import numpy as np
import pytest

from autopeft.benchmarks import metric_coverage as simulated
from autopeft.benchmarks.metric_coverage import LOSSES, METRIC_SCENARIOS, MetricSetting, drawn
from autopeft.search_space.metrics import Quality
from autopeft.search_space.metrics.base import DOMAIN
from autopeft.search_space.problem import METRICS
from autopeft.studies.analysis.statistics import Estimate


def value(name: str, columns: object) -> float:
    metric = METRICS[name]
    assert isinstance(metric, Quality)
    return metric.value(columns)  # type: ignore[arg-type]


def test_the_first_candidate_is_better_and_the_third_domain_is_the_worst() -> None:
    first, second = drawn(np.random.default_rng(0), 20_000, "one is worst")
    assert value("accuracy", first) > value("accuracy", second)
    assert value("accuracy@worst", first) == value("accuracy@c", first) < value("accuracy@a", first)
    same, _ = drawn(np.random.default_rng(0), 20_000, "all alike")
    shares = [value(f"accuracy@{name}", same) for name in sorted(set(same[DOMAIN]))]
    assert np.ptp(shares) < 0.03
    assert LOSSES["all alike"] == (0.0, 0.0, 0.0)
    assert value("ece", first) > 0.02, "it is too sure"


def test_intervals_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = MetricSetting(metric="macro-f1", num_rows=300, domains="one is worst")
    monkeypatch.setattr(simulated, "POPULATION", 30_000)
    found = simulated.metric_coverage(setting, simulations=100)
    assert 0.88 <= found.value <= 1
    assert 0.88 <= found.difference <= 1
    assert abs(found.bias) < found.std_err
    # Intervals of no width contain nothing.
    nothing = Estimate(value=0.0, std_err=0.0, low=0.0, high=0.0, num_seeds=1)
    monkeypatch.setattr(simulated, "estimate", lambda *_: nothing)
    assert simulated.metric_coverage(setting, simulations=3).value == 0.0
    text = simulated.to_markdown([found])
    assert f"| macro-f1 | one is worst | 300 | {found.truth:.3f} | {100 * found.value:.1f} |" in text


def test_every_scenario_is_of_a_quality() -> None:
    assert {"ece", "brier", "macro-f1", "matthews", "rouge-l", "accuracy@worst"} <= {s.metric for s in METRIC_SCENARIOS}
    assert all(isinstance(METRICS[s.metric], Quality) for s in METRIC_SCENARIOS)
