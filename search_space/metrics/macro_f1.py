"""The F1 score of each class, averaged over the classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.metrics.base import PREDICTIONS, TARGETS, OverSet

if TYPE_CHECKING:
    from autopeft.search_space.metrics.base import Indices


@dataclass(frozen=True, slots=True, kw_only=True)
class MacroF1(OverSet):
    """F1 over classes, equal to scikit-learn's `f1_score(average="macro", zero_division=0)`.

    For examples with one label, the mean is over the classes that occur among the targets or the predictions; a class
    that is never predicted, or never correctly, counts as 0. For examples with any number of labels, it is over all
    labels, and a label without a true positive counts as 0, even if no example has it and none is predicted.
    """

    forms: ClassVar[tuple[tuple[str, str], ...]] = (*OverSet.forms, (TARGETS, PREDICTIONS))

    name: str = "macro-f1"
    unit: str = "share"
    maximise: bool = True
    bound: float | None = 1.0
    worst: float | None = 0.0
    expression: str = 'f1_score(targets, predictions, average="macro", zero_division=0)'
    summary: str = "F1 score of each class on the validation examples, averaged over the classes"

    @override
    def of(self, targets: Indices, predictions: Indices) -> float:
        import numpy as np

        if targets.ndim == 2:
            named = (targets + predictions).sum(0)
            return float(np.mean(2 * (targets * predictions).sum(0) / named.clip(1)))
        size = int(max(targets.max(), predictions.max())) + 1
        hits = np.bincount(targets[targets == predictions], minlength=size)
        # Twice the true positives, plus the false positives and the false negatives.
        total = np.bincount(targets, minlength=size) + np.bincount(predictions, minlength=size)
        present = total > 0
        return float(np.mean(2 * hits[present] / total[present]))
