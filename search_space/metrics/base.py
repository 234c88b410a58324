"""What a metric is, and the two ways in which a quality is computed of a split's columns.

A column has one entry per example: a task yields `loss`, `accuracy` and, for classes, `target` and `prediction` or,
where an example has any number of labels, `targets` and `predictions`. A metric of quality is the mean of a column
(`PerExample`), or a function of a whole set that is no mean of anything (`OverSet`). Either gives one contribution per
example with the value as their mean, and everything behind (standard errors, paired differences, seeds) reads those
alone.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Indices = NDArray[np.int64]

#: "quality": found on held-out rows; "declared": analytic; "measured": by a clock or a counter.
Source = Literal["quality", "declared", "measured"]
#: Per example a number, or for some columns a list with a number per label.
Columns = Mapping[str, Sequence[Any]]
#: The columns of a task with classes: indices of labels, in the order of the labels.
TARGET, PREDICTION = "target", "prediction"
#: The columns of a task with any number of labels per example: 1 or 0 for each label, in the order of the labels.
TARGETS, PREDICTIONS = "targets", "predictions"


class MetricError(ValueError):
    """A metric that cannot be computed; the text says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A number that an evaluator reports. `bound`: the best value that there can be, where there is one."""

    name: str
    unit: str
    maximise: bool
    source: Source
    summary: str
    bound: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality(Metric):
    """A metric of quality. `expression`: how scikit-learn computes it, from `targets` and `predictions`, if it does."""

    source: Source = "quality"
    expression: str = ""
    #: Decimals with which contributions are kept.
    digits: ClassVar[int] = 4

    @abstractmethod
    def computable(self, columns: Collection[str]) -> bool:
        """Whether these columns, which a task yields, are enough."""

    @abstractmethod
    def value(self, columns: Columns) -> float:
        """Of all examples. Raises MetricError."""

    @abstractmethod
    def contributions(self, columns: Columns) -> Sequence[float]:
        """One number per example, their mean the value and the standard error of their mean that of the value. Raises
        MetricError.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class PerExample(Quality):
    """The mean of the column of its name."""

    @override
    def computable(self, columns: Collection[str]) -> bool:
        return self.name in columns

    @override
    def value(self, columns: Columns) -> float:
        column = columns[self.name]
        return sum(column) / len(column)

    @override
    def contributions(self, columns: Columns) -> Sequence[float]:
        return columns[self.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class OverSet(Quality):
    """A function of the targets and predictions of a whole set, in any order.

    Its contributions are the jackknife's pseudo-values (Tukey 1958), shifted so that their mean is the value itself
    and not the jackknife's estimate of it:

        contribution[i] = value + (N - 1) (mean of the values without one example - value without example i)

    The standard error of their mean is the jackknife's (Efron and Stein 1981). As what is left out is the same example
    for two candidates, the difference of their contributions is that of their values, jackknifed in pairs. The
    jackknife wants a smooth function: a class of a handful of examples, whose every one moves the value in a step,
    makes it rough, as it makes any other interval.
    """

    #: Pairs of columns of which it can be computed.
    forms: ClassVar[tuple[tuple[str, str], ...]] = ((TARGET, PREDICTION),)
    # Not as rough as those of a mean: there are few different ones, so rounding would not average out.
    digits: ClassVar[int] = 9

    @override
    def computable(self, columns: Collection[str]) -> bool:
        return any(set(form) <= set(columns) for form in self.forms)

    @abstractmethod
    def of(self, targets: Indices, predictions: Indices) -> float:
        """Return the value of a set. Raises MetricError.

        targets, predictions: indices of labels, [N] each; in the form of `TARGETS` and `PREDICTIONS` 1 and 0 per label,
        [N, C] each.
        """

    @override
    def value(self, columns: Columns) -> float:
        return self.of(*_arrays(self._pairs(columns)))

    @override
    def contributions(self, columns: Columns) -> Sequence[float]:
        import numpy as np

        pairs = self._pairs(columns)
        n, value = len(pairs), self.value(columns)
        if n == 1:
            return [value]
        # The order does not matter, so examples with the same target and prediction leave the same set behind.
        _, first, kind = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
        without = np.array([self.of(*_arrays(np.delete(pairs, i, axis=0))) for i in first])[kind.reshape(-1)]
        found: list[float] = (value + (n - 1) * (without.mean() - without)).tolist()
        return found

    def _pairs(self, columns: Columns) -> Indices:
        """Target and prediction of each example: [N, 2], or [N, 2, C]."""
        import numpy as np

        form = next(form for form in self.forms if set(form) <= columns.keys())
        return np.stack([np.array(columns[name], dtype=float).astype(np.int64) for name in form], axis=1)


def standard_error(column: Sequence[float]) -> float:
    """Of the mean over examples; a single seed says nothing of the spread between seeds."""
    n = len(column)
    mean = sum(column) / n
    return math.sqrt(sum((x - mean) ** 2 for x in column) / max(1, n - 1) / n)


def _arrays(pairs: Indices) -> tuple[Indices, Indices]:
    """Targets and predictions, [N] or [N, C] each, from [N, 2] or [N, 2, C]."""
    return pairs[:, 0], pairs[:, 1]
