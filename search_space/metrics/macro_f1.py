"""The F1 score of each class, averaged over the classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from autopeft.search_space.metrics.base import OverSet

if TYPE_CHECKING:
    from autopeft.search_space.metrics.base import Indices


@dataclass(frozen=True, slots=True, kw_only=True)
class MacroF1(OverSet):
    """As scikit-learn's `f1_score(average="macro", zero_division=0)`.

    The mean is over the classes that are among the targets or the predictions. A class that is never predicted, or
    never right, counts as 0.
    """

    name: str = "macro-f1"
    unit: str = "share"
    maximise: bool = True
    bound: float | None = 1.0
    summary: str = "F1 score of each class on the validation examples, averaged over the classes"

    @override
    def of(self, targets: Indices, predictions: Indices) -> float:
        import numpy as np

        size = int(max(targets.max(), predictions.max())) + 1
        right = np.bincount(targets[targets == predictions], minlength=size)
        # Twice the true positives, the false positives and the false negatives.
        named = np.bincount(targets, minlength=size) + np.bincount(predictions, minlength=size)
        there = named > 0
        return float(np.mean(2 * right[there] / named[there]))
