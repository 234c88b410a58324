"""Calibration: how far the probabilities of a classifier are from what happens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from autopeft.search_space.metrics.base import BRIER, CONFIDENCE, Columns, Jackknifed, PerExample
from autopeft.search_space.metrics.mean import ACCURACY

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

#: The number of bins of Guo et al. (2017).
NUM_BINS = 15
BRIER_SCORE = PerExample(
    name=BRIER,
    unit="",
    maximise=False,
    bound=0.0,
    worst=2.0,
    summary="Brier score of the validation examples: squared error of the probabilities, summed over classes, 0 to 2",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationError(Jackknifed):
    """The expected calibration error (Guo et al. 2017, equation 3) of the predicted class.

    Bin m of M has the examples whose confidence is in ((m - 1) / M, m / M]. The error is the mean over all examples of
    the absolute difference between accuracy and mean confidence of their bin:

        sum over m of |sum of accuracy[i] - confidence[i] over the examples i of bin m| / N

    It is biased upwards in small sets: with few examples in a bin, accuracy and confidence differ by chance.
    """

    name: str = "ece"
    unit: str = "share"
    maximise: bool = False
    bound: float | None = 0.0
    worst: float | None = 1.0
    summary: str = "expected calibration error on the validation examples, over 15 bins of the predicted probability"

    @override
    def computable(self, columns: Collection[str]) -> bool:
        return {ACCURACY.name, CONFIDENCE} <= set(columns)

    @override
    def value(self, columns: Columns) -> float:
        gaps, bins = _gaps_and_bins(columns)
        return float(abs(_sums(gaps, bins)).sum() / len(gaps))

    @override
    def without_each(self, columns: Columns) -> Numbers:
        gaps, bins = _gaps_and_bins(columns)
        sums = _sums(gaps, bins)
        # Without an example, the sum of its bin alone is another one.
        totals: Numbers = abs(sums).sum() - abs(sums[bins]) + abs(sums[bins] - gaps)
        return totals / (len(gaps) - 1)


def _gaps_and_bins(columns: Columns) -> tuple[Numbers, NDArray[np.int64]]:
    """Return accuracy minus confidence and the number of the bin of each example, [N] each."""
    import numpy as np

    confidences = np.array(columns[CONFIDENCE], dtype=float)
    bins = np.clip(np.ceil(confidences * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    return np.array(columns[ACCURACY.name], dtype=float) - confidences, bins


def _sums(gaps: Numbers, bins: NDArray[np.int64]) -> Numbers:
    """Return the sum of the gaps of each bin."""
    import numpy as np

    return np.bincount(bins, weights=gaps, minlength=NUM_BINS).astype(np.float64)
