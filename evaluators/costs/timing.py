"""Times and their ratios. Compared operations alternate: the speed of a machine drifts, but alike for neighbours."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch

#: Default number of pairs for a ratio.
REPEATS = 15
#: New tokens whose mean time is that of a further one, at most.
TIMED_TOKENS = 8


def now(device: torch.device) -> float:
    """Return the time in seconds of a monotonic clock, after all queued work of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A median with an interval: the extremes, or the quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return median and extremes of values."""
        return cls(median=statistics.median(values), low=min(values), high=max(values))

    def times(self, factor: float) -> Spread:
        """Return the spread of the values times `factor`."""
        return Spread(median=factor * self.median, low=factor * self.low, high=factor * self.high)


def text_seconds(
    generate: Callable[[int, int], None], rows: int, tokens: int, within_s: float, clock: Callable[[], float]
) -> float:
    """Return the seconds of one text of `tokens` new tokens, of `rows` that grow side by side.

    `generate(n, t)` continues n prompts by t tokens each; the time of its first token includes that of the prompts, the
    others are taken to be alike. Takes about `within_s` seconds by `clock`, or a few tokens after one prompt if longer.
    """

    def timed(n: int, t: int) -> float:
        begin = clock()
        generate(n, t)
        return clock() - begin

    timed(1, 1)  # a first call is slower
    one_s = max(timed(1, 1), 1e-6)
    # A quarter of the time for the first tokens, another for further ones, which take no longer.
    n = max(1, min(rows, int(within_s / (4 * one_s))))
    first_s = timed(n, 1)
    further = min(tokens - 1, TIMED_TOKENS, max(1, int(within_s / (2 * max(first_s, 1e-6)))))
    if further == 0:
        return first_s / n
    each_s = max(0.0, timed(n, 1 + further) - first_s) / further
    return (first_s + (tokens - 1) * each_s) / n


def interleaved(other: Callable[[], float], own: Callable[[], float], *, repeats: int = REPEATS) -> Spread:
    """Return median and quartiles of the ratio of the time of `other` to that of `own`, over neighbouring runs.

    Both functions return their time in seconds and run in alternating order. `repeats`: number of pairs, at least two,
    after two more as a warm-up.
    """
    arms = cycle([(other, own), (own, other)])
    ratios = []
    for _ in range(repeats + 2):
        taken = {arm: arm() for arm in next(arms)}
        ratios.append(taken[other] / taken[own])
    low, median, high = statistics.quantiles(ratios[2:], n=4, method="inclusive")
    return Spread(median=median, low=low, high=high)
