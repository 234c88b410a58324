"""How well cheap scores rank candidates: Kendall's tau with an interval, and what following the scores would cost.

Notation: n candidates. Scores and losses are both to be minimised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Resamples of the bootstrap, and the share of them that an interval holds.
RESAMPLES = 1000
LEVEL = 0.95
#: Least candidates of a rank correlation.
LEAST_RANKED = 3
#: Numbers of candidates picked by their scores, of which the best counts.
PICKED = (1, 3)

Interval = tuple[float, float]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCorrelation:
    """Agreement of scores and losses.

    `tau`: Kendall's tau-b of scores and losses; `top_tau`: among the better half by the losses, where the ranking
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
        """Return the fields as they are written to diagnostics."""
        return asdict(self)


def rank_correlation(scores: ArrayLike, losses: ArrayLike, *, seed: int = 0) -> RankCorrelation:
    """Correlate scores [n] with losses [n]; candidates without a score rank behind all others.

    Raises ValueError for fewer than three candidates.
    """
    score, loss = np.nan_to_num(np.asarray(scores, float), nan=np.inf), np.asarray(losses, float)
    if len(score) < LEAST_RANKED:
        raise ValueError(f"a rank correlation needs {LEAST_RANKED} candidates, got {len(score)}")
    top = np.argsort(loss, kind="stable")[: -(-len(loss) // 2)]
    rng = np.random.default_rng(seed)
    tau, tau_interval = _tau(score, loss, rng)
    top_tau, top_interval = _tau(score[top], loss[top], rng)
    by_score = loss[np.argsort(score, kind="stable")]
    return RankCorrelation(
        num=len(loss),
        tau=tau,
        tau_interval=tau_interval,
        top_tau=top_tau,
        top_interval=top_interval,
        regret={k: float(by_score[:k].min() - loss.min()) for k in PICKED},
    )


def _tau(score: Floats, loss: Floats, rng: np.random.Generator) -> tuple[float, Interval]:
    """Return Kendall's tau-b of two columns [n] and its interval; 0 where one of them is constant.

    With x, y [n, n] the signs of the differences, tau-b is sum(x y) over the root of sum(x^2) sum(y^2). A resample is
    a number of copies of each candidate, c: [n], and its sums are c^T (x y) c and so on: all at once.
    """
    n = len(score)
    x, y = (_order(column) for column in (score, loss))
    copies = np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)])
    agreed, apart_x, apart_y = ((copies @ table * copies).sum(1) for table in (x * y, x * x, y * y))
    scale = np.sqrt(apart_x * apart_y)
    found = np.divide(agreed, scale, out=np.zeros_like(agreed), where=scale > 0)
    low, high = np.quantile(found[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(found[0]), (float(low), float(high))


def _order(column: Floats) -> Floats:
    """Compare all pairs, [n] -> [n, n]: 1 where the row's value is larger, -1 where it is smaller; inf equals inf."""
    return (column[:, None] > column).astype(float) - (column[:, None] < column)


def strata(scores: Sequence[float], count: int, rng: np.random.Generator) -> list[int]:
    """Return indices of `count` candidates, one drawn from each group of neighbouring scores, best group first."""
    finite = [place for place in np.argsort(scores, kind="stable") if np.isfinite(scores[place])]
    groups = np.array_split(np.array(finite, dtype=int), max(1, min(count, len(finite))))
    return [int(rng.choice(group)) for group in groups if len(group)]
