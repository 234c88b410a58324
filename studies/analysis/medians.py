"""Medians over seeds, with intervals where there are enough seeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopeft.studies.analysis.pareto import Floats

DRAWS = 4000
#: With fewer seeds, not even their range is a 95 % interval for the median.
LEAST_SEEDS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Median:
    """A median with its interval.

    `low`, `high`: ends of the central 95 % of the medians of bootstrap samples of the seeds; None with too few seeds.
    """

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def median_of(values: Floats) -> Median:
    """Return the median of the values [seeds] with its bootstrap interval."""
    if len(values) < LEAST_SEEDS:
        return Median(value=float(np.median(values)), low=None, high=None)
    low, high = np.quantile(np.median(values[draws(len(values))], axis=1), [0.025, 0.975])
    return Median(value=float(np.median(values)), low=float(low), high=float(high))


def draws(size: int) -> np.ndarray:
    """Draw bootstrap samples: indices of seeds [DRAWS, size], with replacement and the same in every call."""
    return np.random.default_rng(0).integers(size, size=(DRAWS, size))
