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
    """Gorodkin 2004, as scikit-learn's `matthews_corrcoef`: 0 where all targets, or all predictions, are one class."""

    name: str = "matthews"
    unit: str = ""
    maximise: bool = True
    bound: float | None = 1.0
    summary: str = "Matthews correlation of targets and predictions on the validation examples: 0 is chance"

    @override
    def of(self, targets: Indices, predictions: Indices) -> float:
        import numpy as np

        n, size = len(targets), int(max(targets.max(), predictions.max())) + 1
        # As whole numbers, so that what is 0 is 0.
        wanted = np.bincount(targets, minlength=size)
        said = np.bincount(predictions, minlength=size)
        covariance = n * int((targets == predictions).sum()) - int(wanted @ said)
        spread = (n * n - int(wanted @ wanted)) * (n * n - int(said @ said))
        return covariance / spread**0.5 if spread else 0.0
