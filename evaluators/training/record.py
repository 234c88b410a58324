"""The record of one candidate's training, the resulting measurement, and failures of training."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autopeft.evaluators.atomic import disk_error
from autopeft.evaluators.base import Outcome, OutOfMemoryError, Request
from autopeft.search_space.metrics import ALWAYS, FORGETTING, Columns, MetricError, OfTexts, Quality
from autopeft.search_space.metrics.base import standard_error
from autopeft.search_space.metrics.texts import GENERATED, with_numbers
from autopeft.search_space.problem import Measurement

logger = logging.getLogger(__name__)


class TrainingFailedError(RuntimeError):
    """A training that failed because of the candidate itself, such as a diverged loss."""


@dataclass(slots=True)
class Scores:
    """Columns of a slot after its training; `routes` and `averaged` of its mixtures are as in `Measurement`."""

    validation: Columns = field(default_factory=dict)
    test: Columns = field(default_factory=dict)
    routes: dict[str, Any] = field(default_factory=dict)
    averaged: Columns = field(default_factory=dict)


@dataclass(slots=True)
class Record:
    """The results of a candidate's training so far. `metrics`: the qualities to report."""

    metrics: tuple[Quality, ...] = ALWAYS
    losses: list[float] = field(default_factory=list)
    rungs: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    scores: Scores = field(default_factory=Scores)
    train_s: float = 0.0
    wall_s: float = 0.0

    def rung(self, share: float, columns: Columns) -> None:
        """Record the values at a rung. Raises TrainingFailedError for a loss that is not finite, and MetricError."""
        self.rungs.append((share, self._values(self._numbers(finite(columns)))))

    def end(self, scores: Scores) -> None:
        """Record the final scores. Raises TrainingFailedError for a loss that is not finite, and MetricError."""
        for columns in (scores.validation, scores.test):
            if columns:
                finite(columns)
        validation, test, averaged = map(self._numbers, (scores.validation, scores.test, scores.averaged))
        self.scores = replace(scores, validation=validation, test=test, averaged=averaged)

    def measurement(self, request: Request, evaluator: str) -> Measurement:
        """Return the measurement. Raises IndexError if training ended before the first rung, and MetricError."""
        scores = self.scores
        # A candidate that ended at a rung has the values of that rung.
        share, values = self.rungs[-1] if not scores.validation else (request.fidelity.share, {})
        contributions = self._contributions(scores.validation)
        return Measurement(
            values=values or self._values(scores.validation),
            std_err={metric.name: standard_error(column) for metric, column in contributions},
            seed=request.seed,
            share=share,
            evaluator=evaluator,
            wall_s=self.wall_s,
            train_s=self.train_s,
            losses=tuple(round(loss, 5) for loss in self.losses),
            rungs=tuple(self.rungs),
            per_example={metric.name: _rounded(column, metric.digits) for metric, column in contributions},
            routes=scores.routes,
            averaged=self._values(scores.averaged),
            test=self._values(scores.test),
            test_per_example={
                metric.name: _rounded(column, metric.digits) for metric, column in self._contributions(scores.test)
            },
        )

    def _numbers(self, columns: Columns) -> Columns:
        """Return the columns with numbers in place of texts, once for all that is computed of them."""
        of_texts = [metric for metric in dict.fromkeys(m.whole for m in self.metrics) if isinstance(metric, OfTexts)]
        return with_numbers(columns, of_texts) if of_texts and GENERATED in columns else columns

    def _values(self, columns: Columns) -> dict[str, float]:
        """Return the metrics of these columns; at a rung there may be no texts."""
        return {metric.name: metric.value(columns) for metric in self.metrics if metric.computable(columns)}

    def _contributions(self, columns: Columns) -> list[tuple[Quality, Sequence[float]]]:
        return [(metric, metric.contributions(columns)) for metric in self.metrics] if columns else []


def failure(request: Request, error: Exception) -> Outcome:
    """Turn an exception into the outcome of its candidate, so that other candidates continue.

    Raises an error of the disk as OSError: it is no fault of the candidate, which succeeds once there is space.
    """
    if (of_the_disk := disk_error(error)) is not None:
        raise of_the_disk from error
    if isinstance(error, OutOfMemoryError):
        return Outcome(failure="infeasible", reason=str(error))
    if isinstance(error, TrainingFailedError):
        return Outcome(failure="failed", reason=str(error))
    if isinstance(error, MetricError):
        return Outcome(failure="failed", reason=str(error), error=error)
    logger.debug("candidate %s", request.candidate.key, exc_info=error)
    return Outcome(failure="failed", reason=f"{type(error).__name__}: {error}", error=error)


def finite(columns: Columns) -> Columns:
    """Return the columns unchanged. Raises TrainingFailedError for a loss that is not finite."""
    for name, what in (("loss", "held-out loss"), (FORGETTING.name, "loss on the retained rows")):
        if not all(map(math.isfinite, columns.get(name, ()))):
            raise TrainingFailedError(f"the {what} is not finite")
    return columns


def _rounded(column: Sequence[float], digits: int) -> tuple[float, ...]:
    return tuple(round(x, digits) for x in column)
