"""Medians over seeds, with intervals where there are seeds enough."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopeft.studies.analysis.pareto import Floats

DRAWS = 4000
#: With fewer seeds not even their range is an interval of 95 % for the median.
LEAST_SEEDS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Median:
    """`low`, `high`: the central 95 % of bootstrap draws of the seeds; None where there are too few of them."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def median_of(values: Floats) -> Median:
    """[seeds]"""
    if len(values) < LEAST_SEEDS:
        return Median(value=float(np.median(values)), low=None, high=None)
    low, high = np.quantile(np.median(values[draws(len(values))], axis=1), [0.025, 0.975])
    return Median(value=float(np.median(values)), low=float(low), high=float(high))


def draws(size: int) -> np.ndarray:
    """[DRAWS, size]: indices of seeds, drawn with repetition; always the same ones."""
    return np.random.default_rng(0).integers(size, size=(DRAWS, size))
