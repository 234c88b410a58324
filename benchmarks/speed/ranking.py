"""How early held-out losses rank candidates like full training, and the cost of a loop with Optuna's pruner.

Computed on lists of numbers, one per candidate; nothing here trains.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

Floats = NDArray[np.float64]

#: Shares of the training steps at which rankings are compared with the true one.
SHARES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
#: Spearman's correlation in the top half that a ranking must reach.
WANTED = 0.8
#: The share of candidates that continues at a rung, for our selection and, inverted, the pruner's reduction factor.
KEEP = 0.5
DRAWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlation:
    """Spearman's correlation, and the central 95 % of bootstrap draws of the candidates.

    None: one of the rankings is constant.
    """

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, scores: Sequence[float], quality: Sequence[float]) -> Correlation:
        """Correlate two rankings [n]."""
        x, y = np.asarray(scores, dtype=float), np.asarray(quality, dtype=float)
        if len(x) < 2 or len(set(x)) == 1 or len(set(y)) == 1:
            return cls(value=None, low=None, high=None)
        draws = np.random.default_rng(0).integers(len(x), size=(DRAWS, len(x)))
        drawn = _correlations(x[draws], y[draws])
        low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (-1.0, 1.0)
        return cls(value=float(spearmanr(x, y).statistic), low=float(low), high=float(high))


def _correlations(x: Floats, y: Floats) -> Floats:
    """Return Spearman's correlation by row, without the rows in which one ranking is constant."""
    x, y = rankdata(x, axis=1), rankdata(y, axis=1)
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    scale = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    found: Floats = (x * y).sum(1)[scale > 0] / scale[scale > 0]
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Correlation of a ranking with the true one: over all candidates, and among the truly better half of them."""

    all: Correlation
    top_half: Correlation


def agreement(scores: Sequence[float], quality: Sequence[float]) -> Agreement:
    """Return the agreement of scores with quality; more is better in both."""
    top = top_half(quality)
    return Agreement(
        all=Correlation.of(scores, quality),
        top_half=Correlation.of([scores[i] for i in top], [quality[i] for i in top]),
    )


def top_half(quality: Sequence[float]) -> list[int]:
    """Return the indices of the better half, rounded up; ties go to the first."""
    return sorted(sorted(range(len(quality)), key=lambda i: -quality[i])[: -(-len(quality) // 2)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Agreement of the losses at a share of the steps with full training."""

    share: float
    agreement: Agreement


def matched(budgets: Sequence[Budget]) -> tuple[float, bool]:
    """Return the smallest share that ranks the top half well enough, and True; else the best one, and False."""

    def value(budget: Budget) -> float:
        found = budget.agreement.top_half.value
        return -1.0 if found is None else found

    enough = [budget.share for budget in budgets if value(budget) >= WANTED]
    return (min(enough), True) if enough else (max(budgets, key=value).share, False)


def rungs(first: float) -> tuple[float, ...]:
    """Return the rungs of successive halving from the first one on: each doubles the steps of the survivors."""
    found = []
    while first < 1.0:
        found.append(round(first, 6))
        first /= KEEP
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """Recorded course of one candidate's full training: held-out loss by share, and the final accuracy."""

    loss: Mapping[float, float]
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Where a selection stopped a candidate: the share that it was trained for, and its last values."""

    share: float
    loss: float
    accuracy: float


def ranking(endings: Sequence[Ending]) -> list[float]:
    """Return scores, more is better: accuracy of candidates trained to the end, below them the others by last loss."""
    below = min(e.accuracy for e in endings) - 1.0
    worst = max(e.loss for e in endings)
    return [e.accuracy if e.share == 1.0 else below - e.loss / (worst or 1.0) for e in endings]


def hyperband(courses: Sequence[Course], first: float) -> list[Ending]:
    """Simulate Optuna's HyperbandPruner on these candidates in this order, by the loss at the rungs.

    Nothing is trained: a pruned candidate is one whose recorded course is not read to its end. Optuna cannot prune a
    study with several objectives, so the loss is the only one.
    """
    import optuna

    resources = 1000
    pruner = optuna.pruners.HyperbandPruner(
        min_resource=round(first * resources), max_resource=resources, reduction_factor=round(1 / KEEP)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # A name, because the pruner assigns candidates to its brackets by it.
        study = optuna.create_study(study_name="bench", direction="minimize", pruner=pruner)
        endings = []
        for course in courses:
            trial = study.ask()
            end = 1.0
            for share in rungs(first):
                trial.report(course.loss[share], round(share * resources))
                if trial.should_prune():
                    end = share
                    break
            if end < 1.0:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                study.tell(trial, course.loss[1.0])
            endings.append(Ending(share=end, loss=course.loss[end], accuracy=course.accuracy))
    return endings


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopCosts:
    """Median seconds of the loop: before the first step, of a step, of the scoring at a rung and of the last one."""

    setup_s: float
    step_s: float
    rung_s: float
    validation_s: float

    def seconds(self, steps: int, rungs: int) -> float:
        """Return the seconds of a training."""
        return self.setup_s + steps * self.step_s + rungs * self.rung_s + self.validation_s


def spent_share(endings: Sequence[Ending], full_steps: Sequence[int], costs: LoopCosts, first: float) -> float:
    """Return the seconds of a pruned loop as a share of those of the loop that trains every candidate to its end."""
    from autopeft.evaluators.training.base import steps_at

    pruned = whole = 0.0
    for ending, full in zip(endings, full_steps, strict=True):
        passed = sum(share <= ending.share for share in rungs(first))
        # A pruned candidate's last scoring is that of its rung.
        last = costs.validation_s if ending.share < 1.0 else 0.0
        pruned += costs.seconds(steps_at(ending.share, full), passed) - last
        whole += costs.seconds(full, 0)
    return pruned / whole
