"""Times and their ratios. What is compared runs in turns: the speed of a machine drifts, that of neighbours alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch

#: Pairs of a ratio that is taken in turns.
REPEATS = 15


def now(device: torch.device) -> float:
    """Seconds on a clock without a beginning, read when all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A median and what lies around it: the extremes, or the quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median and extremes."""
        return cls(median=statistics.median(values), low=min(values), high=max(values))

    def times(self, factor: float) -> Spread:
        return Spread(median=factor * self.median, low=factor * self.low, high=factor * self.high)


def interleaved(other: Callable[[], float], own: Callable[[], float], *, repeats: int = REPEATS) -> Spread:
    """Seconds of `other` over those of `own`, in turns: median and quartiles of the ratios of neighbours in time.

    Both return the seconds that they took. `repeats`: pairs, two at least, after two more to warm up.
    """
    arms = cycle([(other, own), (own, other)])
    ratios = []
    for _ in range(repeats + 2):
        taken = {arm: arm() for arm in next(arms)}
        ratios.append(taken[other] / taken[own])
    low, median, high = statistics.quantiles(ratios[2:], n=4, method="inclusive")
    return Spread(median=median, low=low, high=high)
