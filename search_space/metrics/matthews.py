"""Matthews' correlation coefficient, for any number of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from autopeft.search_space.metrics.base import OverSet

if TYPE_CHECKING:
    from autopeft.search_space.metrics.base import Indices


@dataclass(frozen=True, slots=True, kw_only=True)
class Matthews(OverSet):
    """The R_K statistic (Gorodkin 2004), equal to scikit-learn's `matthews_corrcoef`.

    It is 0 if all targets, or all predictions, are of one class.
    """

    name: str = "matthews"
    unit: str = ""
    maximise: bool = True
    bound: float | None = 1.0
    worst: float | None = -1.0
    expression: str = "matthews_corrcoef(targets, predictions)"
    summary: str = "Matthews correlation of targets and predictions on the validation examples: 0 is chance"

    @override
    def of(self, targets: Indices, predictions: Indices) -> float:
        import numpy as np

        n, size = len(targets), int(max(targets.max(), predictions.max())) + 1
        # In integers, so that zero is exact.
        target_counts = np.bincount(targets, minlength=size)
        prediction_counts = np.bincount(predictions, minlength=size)
        covariance = n * int((targets == predictions).sum()) - int(target_counts @ prediction_counts)
        spread = (n * n - int(target_counts @ target_counts)) * (n * n - int(prediction_counts @ prediction_counts))
        return covariance / spread**0.5 if spread else 0.0
