"""How well cheap scores rank candidates: Kendall's tau with an interval, and what following the scores would cost.

Notation: n candidates. Scores and losses are both to be minimised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau

#: Resamples of the bootstrap, and the share of them that an interval holds.
RESAMPLES = 1000
LEVEL = 0.95
#: Candidates that are taken by their scores, of which the best counts.
PICKED = (1, 3)

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """`tau`: Kendall's tau-b of scores and losses; `top_tau`: among the better half by the losses, where the ranking
    matters; 0 where either is constant. Intervals: percentiles of a bootstrap over the candidates. `regret`: by the
    number of candidates picked, how much worse the best of them is than the best of all, in the unit of the losses.
    """

    num: int
    tau: float
    tau_interval: Interval
    top_tau: float
    top_interval: Interval
    regret: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def ranking(scores: ArrayLike, losses: ArrayLike, *, seed: int = 0) -> Ranking:
    """Candidates without a score rank behind all others. Raises ValueError for fewer than three candidates."""
    table = np.column_stack([np.nan_to_num(np.asarray(scores, float), nan=np.inf), np.asarray(losses, float)])
    if len(table) < 3:
        raise ValueError(f"a ranking needs three candidates, got {len(table)}")
    # Infinite scores would not rank among themselves in every version of scipy; their ranks do.
    table[:, 0] = np.unique(table[:, 0], return_inverse=True)[1]
    top = table[np.argsort(table[:, 1], kind="stable")[: -(-len(table) // 2)]]
    rng = np.random.default_rng(seed)
    by_score = table[np.argsort(table[:, 0], kind="stable"), 1]
    return Ranking(
        num=len(table),
        tau=tau(table),
        tau_interval=_interval(table, rng),
        top_tau=tau(top),
        top_interval=_interval(top, rng),
        regret={k: float(by_score[:k].min() - by_score.min()) for k in PICKED},
    )


def tau(table: NDArray[np.float64]) -> float:
    """Kendall's tau-b of two columns; 0 where one of them is constant."""
    found = float(kendalltau(table[:, 0], table[:, 1]).statistic)
    return 0.0 if np.isnan(found) else found


def _interval(table: NDArray[np.float64], rng: np.random.Generator) -> Interval:
    drawn = [tau(table[rng.integers(len(table), size=len(table))]) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def strata(scores: Sequence[float], count: int, rng: np.random.Generator) -> list[int]:
    """Places of `count` candidates, one drawn from each of as many groups of neighbouring scores, best group first."""
    known = [place for place in np.argsort(scores, kind="stable") if np.isfinite(scores[place])]
    groups = np.array_split(np.array(known, dtype=int), max(1, min(count, len(known))))
    return [int(rng.choice(group)) for group in groups if len(group)]
