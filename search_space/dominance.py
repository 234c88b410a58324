"""Pareto dominance. Points are rows of losses: every objective is minimised here.

Notation: n points, m objectives. A point dominates another if it is no worse in every objective and better in one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Return which of the points [n, m] no other dominates, as a mask [n].

    Equal points have equal entries. A point with a NaN is never on the front and dominates nothing.
    """
    losses = np.asarray(points, dtype=float)
    mask: NDArray[np.bool_] = ~np.isnan(losses).any(axis=1)
    for i in np.flatnonzero(mask):
        mask[i] = not ((losses <= losses[i]).all(axis=1) & (losses < losses[i]).any(axis=1)).any()
    return mask
