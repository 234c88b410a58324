"""Checks of a quality metric: its value, its contributions and their standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from autopeft.search_space.metrics import Columns, Quality
from autopeft.search_space.metrics.base import CONFIDENCE, PREDICTION, TARGET, Jackknifed, standard_error
from autopeft.search_space.metrics.mean import ACCURACY

#: Targets and predictions of degenerate sets.
DEGENERATE: Mapping[str, tuple[list[int], list[int]]] = {
    "all correct": ([0, 1, 2, 1], [0, 1, 2, 1]),
    "all wrong": ([0, 0, 1, 1], [1, 1, 0, 0]),
    "one class": ([3, 3, 3], [3, 3, 3]),
    "one target class": ([1, 1, 1, 1], [1, 0, 1, 2]),
    "one predicted class": ([0, 1, 2, 1], [2, 2, 2, 2]),
    "a class is never predicted": ([0, 1, 2, 2, 1, 0], [0, 1, 1, 0, 1, 0]),
    "a class is only predicted": ([0, 1, 1, 0], [0, 1, 2, 2]),
    "disjoint classes": ([0, 0, 1], [2, 3, 3]),
}


def check_metric(metric: Quality) -> None:
    """Check the values of a metric and the contributions that its errors come from.

    The value of every set is finite, within the metric's bound, the mean of the contributions, and independent of the
    order of the examples. The standard error of a metric over a set is that of the jackknife. Raises AssertionError,
    which names the first claim that fails.
    """
    assert metric.name, "a metric needs a name"
    assert metric.summary, f"{metric.name}: a metric needs a summary"
    sets = {name: np.array(pair) for name, pair in DEGENERATE.items()}
    rng = np.random.default_rng(0)
    for count in (2, 5, 20, 60):
        for num_classes in (2, 3, 5):
            targets, guesses = rng.integers(num_classes, size=(2, count))
            drawn = np.array([targets, np.where(rng.random(count) < 0.5, targets, guesses)])
            sets[f"{count} examples of {num_classes} classes"] = drawn
    for name, (targets, predictions) in sets.items():
        words = f"{metric.name}, {name}"
        columns = _columns(metric, targets, predictions)
        value, found = metric.value(columns), np.asarray(metric.contributions(columns), dtype=float)
        assert math.isfinite(value), f"{words}: the value is {value}"
        if metric.bound is not None:
            beyond = value - metric.bound if metric.maximise else metric.bound - value
            assert beyond <= 1e-12, f"{words}: {value} lies beyond the bound {metric.bound}"
        assert found.shape == targets.shape, f"{words}: {found.size} contributions for {targets.size} examples"
        assert math.isclose(found.mean(), value, abs_tol=1e-12), (
            f"{words}: the mean of the contributions is not {value}"
        )
        order = rng.permutation(len(targets))
        shuffled = metric.value(_columns(metric, targets[order], predictions[order]))
        assert math.isclose(shuffled, value, abs_tol=1e-12), f"{words}: the order of the examples matters"
        if isinstance(metric, Jackknifed):
            expected = _jackknife(metric, columns)
            error = standard_error(found.tolist())
            assert math.isclose(error, expected, abs_tol=1e-12), (
                f"{words}: the standard error is {error}, the jackknife's {expected}"
            )
    one = _columns(metric, np.array([1]), np.array([0]))
    assert list(metric.contributions(one)) == [metric.value(one)], (
        f"{metric.name}: the contribution of a single example is not the value"
    )


def _columns(metric: Quality, targets: np.ndarray, predictions: np.ndarray) -> Columns:
    """Return columns of a classification task, and a column of hits under the metric's own name."""
    hits = (targets == predictions).astype(float)
    columns = {
        ACCURACY.name: hits.tolist(),
        CONFIDENCE: (0.4 + (3 * targets + 5 * predictions) % 7 / 10).tolist(),
        TARGET: targets.astype(float).tolist(),
        PREDICTION: predictions.astype(float).tolist(),
        metric.name: hits.tolist(),
    }
    assert metric.computable(columns), f"{metric.name}: it cannot be computed from {', '.join(columns)}"
    return columns


def _jackknife(metric: Jackknifed, columns: Columns) -> float:
    """Compute the jackknife's standard error (Efron and Stein 1981) by leaving out each example in turn."""
    n = len(next(iter(columns.values())))
    rest = ([*range(i), *range(i + 1, n)] for i in range(n))
    without = np.array([metric.value({k: [column[j] for j in rows] for k, column in columns.items()}) for rows in rest])
    return float(np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum()))
