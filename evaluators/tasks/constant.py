"""Scores of constant predictions: what a model reaches that has learnt nothing about its inputs.

Notation: N examples, C labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from autopeft.evaluators.rows import Row
from autopeft.evaluators.tasks.base import Task
from autopeft.search_space.metrics import MetricError, Quality
from autopeft.search_space.metrics.base import DOMAIN, PREDICTION, PREDICTIONS, TARGET, TARGETS
from autopeft.search_space.metrics.mean import ACCURACY, LOSS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Indices = NDArray[np.int64]

#: Constant predictions that are compared: a metric of the user may take a while.
MOST_CONSTANTS = 32


def constant_scores(
    task: type[Task],
    train: Sequence[Row],
    validation: Sequence[Row],
    labels: Sequence[str],
    metrics: Sequence[Quality],
) -> dict[str, float]:
    """Return the score of the best constant prediction on the validation rows, by metric.

    `accuracy` and metrics over predictions: the best of the most frequent labels or, for rows with any number
    of labels, of the most frequent set of labels and the sets of the 0, 1, 2, ... most frequent labels; for each metric
    the best in its own direction. `loss`: the cross-entropy of the validation rows' labels under the label frequencies
    of the training rows, in nats; for any number of labels, the mean over labels. A metric that has no finite value for
    a constant prediction is left out. Empty for a task without labels (`Task.truth`).
    """
    targets, trained = task.truth(validation, labels), task.truth(train, labels)
    if targets is None or trained is None:
        return {}
    scores = {LOSS.name: _loss(targets, trained, len(labels))}
    names = (TARGET, PREDICTION) if targets.ndim == 1 else (TARGETS, PREDICTIONS)
    domains = {DOMAIN: [row["domain"] for row in validation]} if "domain" in validation[0] else {}
    found: dict[str, list[float]] = {}
    for predictions in _constants(targets, len(labels)):
        right = (predictions == targets).reshape(len(targets), -1).all(-1)
        columns: dict[str, Any] = {names[0]: targets, names[1]: predictions, ACCURACY.name: right, **domains}
        for metric in metrics:
            if metric.computable(columns):
                with suppress(MetricError):
                    found.setdefault(metric.name, []).append(float(metric.value(columns)))
    for metric in metrics:
        finite = [value for value in found.get(metric.name, ()) if math.isfinite(value)]
        if finite:
            scores[metric.name] = max(finite) if metric.maximise else min(finite)
    return {name: value for name, value in scores.items() if math.isfinite(value)}


def _constants(targets: Indices, num_labels: int) -> Iterator[Indices]:
    """Yield constant predictions in the form of targets, [N] or [N, C]."""
    import numpy as np

    if targets.ndim == 1:
        counts = np.bincount(targets, minlength=num_labels)
        for label in np.argsort(-counts, kind="stable")[:MOST_CONSTANTS]:
            yield np.full_like(targets, label)
        return
    sets, counts = np.unique(targets, axis=0, return_counts=True)
    yield np.tile(sets[counts.argmax()], (len(targets), 1))
    by_frequency = np.argsort(-targets.sum(0), kind="stable")
    for size in np.unique(np.linspace(0, num_labels, min(num_labels + 1, MOST_CONSTANTS)).round().astype(int)):
        predictions = np.zeros_like(targets)
        predictions[:, by_frequency[:size]] = 1
        yield predictions


def _loss(targets: Indices, trained: Indices, num_labels: int) -> float:
    """Return the loss of the training rows' label frequencies; infinite if they exclude a label of `targets`."""
    import numpy as np
    from scipy.special import xlogy

    if targets.ndim == 1:
        frequencies = np.bincount(trained, minlength=num_labels) / len(trained)
        return float(-xlogy(1.0, frequencies[targets]).mean())
    shares = trained.mean(0)
    return float(-(xlogy(targets, shares) + xlogy(1 - targets, 1 - shares)).mean())
