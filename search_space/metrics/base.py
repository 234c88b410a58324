"""What a metric is, and the two ways in which a quality is computed of a split's columns.

A column has one number per example: a task yields `loss`, `accuracy` and, for classes, `target` and `prediction`. A
metric of quality is the mean of a column (`PerExample`), or a function of a whole set that is no mean of anything
(`OverSet`). Either gives one contribution per example with the value as their mean, and everything behind (standard
errors, paired differences, seeds) reads those alone.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import override

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Indices = NDArray[np.int64]

#: "quality": found on held-out rows; "declared": analytic; "measured": by a clock or a counter.
Source = Literal["quality", "declared", "measured"]
Columns = Mapping[str, Sequence[float]]
#: The columns of a task with classes: indices of labels, in the order of the labels.
TARGET, PREDICTION = "target", "prediction"


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
    """A metric of quality. `needs`: columns that a task must yield; `tasks`: those that do, None for all of them."""

    source: Source = "quality"
    tasks: tuple[str, ...] | None = None
    #: Decimals with which contributions are kept.
    digits: ClassVar[int] = 4

    @property
    @abstractmethod
    def needs(self) -> tuple[str, ...]:
        """Names of the columns that it is computed of."""

    @abstractmethod
    def value(self, columns: Columns) -> float:
        """Return the value over all examples. Raises MetricError."""

    @abstractmethod
    def contributions(self, columns: Columns) -> Sequence[float]:
        """Return one number per example. Their mean is the value, and its standard error that of the value.

        Raises MetricError.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class PerExample(Quality):
    """The mean of the column of its name."""

    @property
    @override
    def needs(self) -> tuple[str, ...]:
        return (self.name,)

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

    tasks: tuple[str, ...] | None = ("classification",)
    # Not as rough as those of a mean: there are few different ones, so rounding would not average out.
    digits: ClassVar[int] = 9

    @property
    @override
    def needs(self) -> tuple[str, ...]:
        return (TARGET, PREDICTION)

    @abstractmethod
    def of(self, targets: Indices, predictions: Indices) -> float:
        """Return the value of a set, from the indices of its labels, [N] each. Raises MetricError."""

    @override
    def value(self, columns: Columns) -> float:
        return self.of(*_pairs(columns).T)

    @override
    def contributions(self, columns: Columns) -> Sequence[float]:
        import numpy as np

        pairs = _pairs(columns)
        n, value = len(pairs), self.value(columns)
        if n == 1:
            return [value]
        # The order does not matter, so examples with the same target and prediction leave the same set behind.
        _, first, kind = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
        without = np.array([self.of(*np.delete(pairs, i, axis=0).T) for i in first])[kind.reshape(-1)]
        return (value + (n - 1) * (without.mean() - without)).tolist()


def standard_error(column: Sequence[float]) -> float:
    """Return the standard error of the mean over examples; one seed says nothing of the spread between seeds."""
    n = len(column)
    mean = sum(column) / n
    return math.sqrt(sum((x - mean) ** 2 for x in column) / max(1, n - 1) / n)


def _pairs(columns: Columns) -> Indices:
    """Return targets and predictions: [N, 2]."""
    import numpy as np

    return np.array([columns[TARGET], columns[PREDICTION]], dtype=float).astype(np.int64).T
