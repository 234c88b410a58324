"""Which points no other dominates. Points are rows of losses: every objective is minimised here.

Notation: n points, m objectives. A point dominates another if it is no worse in every objective and better in one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """[n, m] -> [n]: which points no other dominates.

    Equal points stand or fall together. A point with a NaN is never on the front and dominates nothing.
    """
    table = np.asarray(points, dtype=float)
    known = ~np.isnan(table).any(axis=1)
    mask = known.copy()
    for i in np.flatnonzero(known):
        mask[i] = not ((table <= table[i]).all(axis=1) & (table < table[i]).any(axis=1)).any()
    return mask
