"""Simulations of metrics over a set, of calibration and by domain: coverage of their intervals, and their bias.

A row has one of four classes and one of three domains. The logits of candidate k are

    sharpness (skill[domain] one-hot(target) + shared noise of the row + own noise of the candidate)

so candidates find the same rows hard, and with a sharpness above 1 they are too sure. Texts have scores as ROUGE-L has
them: some rows are 0 or 1, the others between. The truth is the value of a large sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.special import ndtr, softmax

from autopeft.search_space.metrics import Columns, Quality
from autopeft.search_space.metrics.base import BRIER, CONFIDENCE, DOMAIN, PREDICTION, TARGET
from autopeft.search_space.problem import METRICS
from autopeft.studies.analysis.statistics import estimate, paired_difference
from autopeft.studies.reports.markdown import table

Floats = NDArray[np.float64]
CLASSES, DOMAINS = (0.4, 0.3, 0.2, 0.1), ("a", "b", "c")
#: Shares of the domains, and what is taken off the skill in each: one is the worst, or all are alike.
SHARES, LOSSES = (0.5, 0.3, 0.2), {"one is worst": (0.0, 0.3, 1.0), "all alike": (0.0, 0.0, 0.0)}
SKILLS, SHARPNESS, NOISE_SD = (2.0, 1.7), 1.5, 0.8
#: Rows of the sample that stands for the truth.
POPULATION = 300_000
_NAMES = ("accuracy", "brier", "ece", "macro-f1", "matthews", "rouge-l", "accuracy@c", "accuracy@worst")

Spread = Literal["one is worst", "all alike"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSetting:
    """What is simulated: a metric on that many rows. `domains`: a key of `LOSSES`."""

    metric: str
    num_rows: int
    domains: Spread


_SPREADS: tuple[tuple[str, Spread], ...] = (
    *((name, "one is worst") for name in _NAMES),
    ("accuracy@worst", "all alike"),
)
METRIC_SCENARIOS = tuple(
    MetricSetting(metric=name, num_rows=rows, domains=domains)
    for name, domains in _SPREADS
    for rows in (100, 300, 1000)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricCoverage:
    """Shares of the 95 % intervals of one run that contain the truth: of values, and of differences of two candidates.

    `bias`: the mean value minus the truth, and `std_err`: the mean standard error, both in the unit of the metric.
    """

    setting: MetricSetting
    truth: float
    value: float
    difference: float
    bias: float
    std_err: float


def metric_coverage(setting: MetricSetting, *, simulations: int, seed: int = 0) -> MetricCoverage:
    """Draw validation sets, and count the intervals of single runs that contain the truth."""
    metric = METRICS[setting.metric]
    assert isinstance(metric, Quality)
    truth = _truth(metric, setting.domains)
    rng = np.random.default_rng([seed, setting.num_rows, *setting.metric.encode()])
    within, paired, values, errors = [], [], [], []
    for _ in range(simulations):
        first, second = (metric.contributions(columns) for columns in drawn(rng, setting.num_rows, setting.domains))
        alone, difference = estimate(first), paired_difference(first, second)
        within.append(alone.low <= truth[0] <= alone.high)
        paired.append(difference.low <= truth[0] - truth[1] <= difference.high)
        values.append(alone.value)
        errors.append(alone.std_err)
    return MetricCoverage(
        setting=setting,
        truth=truth[0],
        value=float(np.mean(within)),
        difference=float(np.mean(paired)),
        bias=float(np.mean(values)) - truth[0],
        std_err=float(np.mean(errors)),
    )


@cache
def _truth(metric: Quality, domains: Spread) -> tuple[float, float]:
    first, second = (metric.value(columns) for columns in drawn(np.random.default_rng(7), POPULATION, domains))
    return first, second


def drawn(rng: Generator, num_rows: int, domains: Spread) -> tuple[Columns, Columns]:
    """Draw rows and the columns that two candidates have on them."""
    targets = rng.choice(len(CLASSES), p=CLASSES, size=num_rows)
    places = rng.choice(len(DOMAINS), p=SHARES, size=num_rows)
    shared = rng.normal(0, NOISE_SD, (num_rows, len(CLASSES)))
    texts = rng.normal(0, 1, num_rows)
    names = np.array(DOMAINS)[places].tolist()
    found = []
    for skill in SKILLS:
        skills = skill - np.array(LOSSES[domains])[places]
        logits = shared + rng.normal(0, NOISE_SD, shared.shape)
        logits[np.arange(num_rows), targets] += skills
        shares = softmax(SHARPNESS * logits, axis=1)
        predictions = shares.argmax(axis=1)
        scores = ndtr((texts + rng.normal(0, 0.7, num_rows) + skill - 2) / 0.8)
        found.append(
            {
                TARGET: targets,
                PREDICTION: predictions,
                CONFIDENCE: shares.max(axis=1),
                BRIER: ((shares - np.eye(len(CLASSES))[targets]) ** 2).sum(axis=1).tolist(),
                "accuracy": (predictions == targets).astype(float).tolist(),
                "rouge-l": np.where(scores < 0.2, 0.0, np.where(scores > 0.95, 1.0, scores)).tolist(),
                DOMAIN: names,
            }
        )
    return found[0], found[1]


def to_dict(found: Sequence[MetricCoverage]) -> list[dict[str, Any]]:
    """Return the table as plain data for JSON."""
    return [asdict(one) for one in found]


def to_markdown(found: Sequence[MetricCoverage]) -> str:
    """Return the table as Markdown."""
    rows = [("metric", "domains", "rows", "truth", "value", "difference", "bias", "standard error")]
    for one in found:
        at = one.setting
        shares = (f"{100 * one.value:.1f}", f"{100 * one.difference:.1f}", f"{one.bias:+.4f}", f"{one.std_err:.4f}")
        rows.append((at.metric, at.domains, f"{at.num_rows:,}", f"{one.truth:.3f}", *shares))
    return f"{table(rows, right=range(2, 8))}\n"
