"""Metrics, and the two ways to compute a quality metric from the columns of a split.

A column has one entry per example: a task yields `loss`, `accuracy` and, for classes, `target`, `prediction`, `brier`
and `confidence` or, for examples with any number of labels, `targets` and `predictions`. The evaluator adds `domain`
where rows have one. A quality metric is the mean of a column (`PerExample`) or a function of the whole set that is not
a mean (`Jackknifed`). Both return one contribution per example, with the value as the mean of all; standard errors,
paired differences and comparisons over seeds use only these contributions.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Indices = NDArray[np.int64]
    Numbers = NDArray[np.float64]

#: "quality": measured on held-out rows; "declared": analytic; "measured": by a clock or a counter.
MetricSource = Literal["quality", "declared", "measured"]
#: A number per example, or in some columns a list with a number per label.
Columns = Mapping[str, Sequence[Any]]
#: Columns of a task with classes: indices of labels, in the order of the labels.
TARGET, PREDICTION = "target", "prediction"
#: The columns of a task with any number of labels per example: 1 or 0 for each label, in the order of the labels.
TARGETS, PREDICTIONS = "targets", "predictions"
#: The columns of probabilities of classes: the squared error over all classes, and the probability of the prediction.
BRIER, CONFIDENCE = "brier", "confidence"
#: The column of the domains of the rows, by name.
DOMAIN = "domain"


#: A loss of quality that counts as none: a point of a share (accuracy, F1), one per cent of the best other value.
POINT = PER_CENT = 0.01


class MetricError(ValueError):
    """A metric cannot be computed; the message names it and the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A number that an evaluator reports. `bound`, `worst`: the best and the worst possible value, if there are any."""

    name: str
    unit: str
    maximise: bool
    source: MetricSource
    summary: str
    bound: float | None = None
    worst: float | None = None

    def default_margin(self, best: float) -> float:
        """Return the loss of quality that counts as none where the best value is `best`, in the unit of the metric."""
        return POINT if self.unit == "share" else PER_CENT * abs(best)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality(Metric):
    """A quality metric. `expression`: scikit-learn's computation from `targets` and `predictions`, if there is one.

    `package`: an optional package that it needs.
    """

    package: ClassVar[str] = ""
    source: MetricSource = "quality"
    expression: str = ""
    #: Decimals to which contributions are rounded for storage.
    digits: ClassVar[int] = 4

    @property
    def whole(self) -> Quality:
        """The metric over all rows, of which this one is a part by domains; itself where it is over all rows."""
        return self

    @abstractmethod
    def computable(self, columns: Collection[str]) -> bool:
        """Return whether the columns that a task yields are sufficient."""

    @abstractmethod
    def value(self, columns: Columns) -> float:
        """Return the metric over all N examples of the columns, [N] each. Raises MetricError."""

    @abstractmethod
    def contributions(self, columns: Columns) -> Sequence[float]:
        """Return one number per example, [N].

        Their mean is the value, and the standard error of their mean is that of the value. Raises MetricError.
        """

    def lacking(self) -> str | None:
        """Return what to do about the missing package of this metric; None if nothing is missing."""
        if not self.package or find_spec(self.package) is not None:
            return None
        name = self.package.replace("_", "-")
        return f"the metric {self.name} needs the package {name}, which is not installed: pip install {name}"


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
class OnOwnRows(PerExample):
    """The mean of a column that is shorter or longer than those of the task, because it is of other rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Jackknifed(Quality):
    """A function of a whole set that is no mean, with contributions from the jackknife.

    They are its pseudo-values (Tukey 1958), shifted so that their mean is the value itself and not the jackknife's
    estimate of it:

        contribution[i] = value + (N - 1) (mean of the values without one example - value without example i)

    The standard error of their mean is that of the jackknife (Efron and Stein 1981). Contributions of two candidates
    leave out the same example, so their differences give the paired jackknife of the difference of the values. The
    jackknife assumes a smooth function: for a class of a few examples, each of which changes the value by a step, the
    interval is rough, as any other interval would be.
    """

    # Finer than for a mean: few contributions differ, so rounding errors would not average out.
    digits: ClassVar[int] = 9

    @abstractmethod
    def without_each(self, columns: Columns) -> Numbers:
        """Return the value of the set without example i, for every i: [N], N > 1. Raises MetricError."""

    @override
    def contributions(self, columns: Columns) -> Sequence[float]:
        value = self.value(columns)
        n = len(next(iter(columns.values())))
        if n == 1:
            return [value]
        without = self.without_each(columns)
        contributions: list[float] = (value + (n - 1) * (without.mean() - without)).tolist()
        return contributions


@dataclass(frozen=True, slots=True, kw_only=True)
class OverSet(Jackknifed):
    """A function of the targets and predictions of a whole set, in any order."""

    #: Pairs of columns from which it can be computed; the first that a task yields is taken.
    forms: ClassVar[tuple[tuple[str, str], ...]] = ((TARGET, PREDICTION),)

    @override
    def computable(self, columns: Collection[str]) -> bool:
        return any(set(form) <= set(columns) for form in self.forms)

    @abstractmethod
    def of(self, targets: Indices, predictions: Indices) -> float:
        """Return the metric of a set. Raises MetricError.

        targets, predictions: indices of labels, [N] each; in the form of `TARGETS` and `PREDICTIONS` 1 and 0 per label,
        [N, C] each.
        """

    @override
    def value(self, columns: Columns) -> float:
        return self.of(*_arrays(self._pairs(columns)))

    @override
    def without_each(self, columns: Columns) -> Numbers:
        import numpy as np

        pairs = self._pairs(columns)
        # The order does not matter, so leaving out any example of equal target and prediction gives the same value.
        _, first, kind = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
        without = np.array([self.of(*_arrays(np.delete(pairs, i, axis=0))) for i in first])
        return without[kind.reshape(-1)]

    def _pairs(self, columns: Columns) -> Indices:
        """Return the target and the prediction of each example: [N, 2], or [N, 2, C]."""
        import numpy as np

        form = next(form for form in self.forms if set(form) <= columns.keys())
        return np.stack([np.array(columns[name], dtype=float).astype(np.int64) for name in form], axis=1)


def standard_error(column: Sequence[float]) -> float:
    """Return the standard error of the mean of a column [N]: over examples only, not over seeds."""
    n = len(column)
    mean = sum(column) / n
    return math.sqrt(sum((x - mean) ** 2 for x in column) / max(1, n - 1) / n)


def _arrays(pairs: Indices) -> tuple[Indices, Indices]:
    """Return targets and predictions, [N] or [N, C] each, from [N, 2] or [N, 2, C]."""
    return pairs[:, 0], pairs[:, 1]
