"""Comparison of the kinds of surrogate: their predictions at unseen points after a number of trials."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr

from autopeft.benchmarks.race.base import RaceProblem
from autopeft.searchers.bo.encoding import Encoding
from autopeft.searchers.bo.surrogate import KERNELS, GaussianProcess
from autopeft.studies.reports import markdown

REPEATS = 5
UNSEEN = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Quality of one kind, as medians over the repeats.

    `seconds` of a fit; `spearman` correlation, `error` (root mean squared) and `surprise` (mean negative log density up
    to a constant) of the first measured objective's standardised true losses at unseen points.
    """

    kind: str
    trials: int
    seconds: float
    spearman: float
    error: float
    surprise: float


def compare(problem: RaceProblem, counts: Sequence[int], advance: Callable[[], None] = lambda: None) -> list[Fitted]:
    """Fit every kind to the same trials."""
    return [_fitted(problem, kind, count, advance) for count in counts for kind in KERNELS]


def _fitted(problem: RaceProblem, kind: str, count: int, advance: Callable[[], None]) -> Fitted:
    rows = []
    for seed in range(REPEATS):
        rows.append(_once(problem, kind, count, seed))
        advance()
    seconds, spearman, error, surprise = (statistics.median(column) for column in zip(*rows, strict=True))
    return Fitted(kind=kind, trials=count, seconds=seconds, spearman=spearman, error=error, surprise=surprise)


def _once(problem: RaceProblem, kind: str, count: int, seed: int) -> tuple[float, float, float, float]:
    encoding, rng = Encoding(problem.problem.space), np.random.default_rng(seed)
    rows = encoding.draw(count + UNSEEN, rng)
    features = torch.as_tensor(encoding.features(rows, encoding.active(rows)))
    name = next(iter(problem.std_err))
    place = next(i for i, objective in enumerate(problem.problem.objectives) if objective.name == name)
    truth = np.array([problem.losses(problem.values(encoding.assignment(row)))[place] for row in rows])
    std_err = problem.std_err[name]
    seen = truth[:count] + std_err * rng.normal(size=count)
    centre, scale = seen.mean(), seen.std()
    noise = np.full(count, (std_err / scale) ** 2)
    begun = time.perf_counter()
    process = GaussianProcess.fit(features[:count], (seen - centre) / scale, noise, features.shape[1], kind)
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        posterior = process.model.posterior(features[count:])
    mean, variance = posterior.mean[:, 0].numpy(), posterior.variance[:, 0].numpy()
    unseen = (truth[count:] - centre) / scale
    squared = (mean - unseen) ** 2
    surprise = float(np.mean(0.5 * np.log(variance) + 0.5 * squared / variance))
    return seconds, float(spearmanr(mean, unseen).statistic), float(squared.mean() ** 0.5), surprise


def to_markdown(problem: str, fitted: Sequence[Fitted]) -> str:
    """Return the qualities on one problem as a table."""
    rows = [
        (str(f.trials), f.kind, f"{f.seconds:.2f}", f"{f.spearman:.3f}", f"{f.error:.3f}", f"{f.surprise:.2f}")
        for f in fitted
    ]
    head = ("trials", "kind", "s", "rank correlation", "error", "surprise")
    table = markdown.table([head, *rows], right=(0, 2, 3, 4, 5))
    return f"`{problem}`: surrogates on {UNSEEN} unseen points, medians of {REPEATS}\n\n{table}\n"
