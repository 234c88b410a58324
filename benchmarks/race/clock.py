"""Time of a suggestion after many trials: the searcher's own seconds, several searchers in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from autopeft.benchmarks.race.base import RaceProblem
from autopeft.benchmarks.race.races import ARMS
from autopeft.search_space.problem import SEARCH, Trial
from autopeft.studies.reports import markdown

#: Batches that are timed, each after random trials of its own.
REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocked:
    """Median and extremes of the seconds per suggestion in a batch after `trials` trials."""

    searcher: str
    trials: int
    seconds: float
    low: float
    high: float


def clock(
    problem: RaceProblem,
    searchers: Sequence[str],
    histories: Sequence[int],
    batch: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Clocked]:
    """Time whole batches, filled one by one as in a study, on a history of random candidates."""
    found = []
    for trials in histories:
        seconds: dict[str, list[float]] = {name: [] for name in searchers}
        for seed in range(REPEATS):
            past = _history(problem, trials, seed)
            for name in searchers:
                seconds[name].append(_batch_s(problem, name, past, seed, batch) / batch)
                advance()
        found += [
            Clocked(searcher=n, trials=trials, seconds=statistics.median(s), low=min(s), high=max(s))
            for n, s in seconds.items()
        ]
    return found


def _history(problem: RaceProblem, count: int, seed: int) -> list[Trial]:
    space, rng = problem.problem.space, Random(seed)
    found: dict[str, Trial] = {}
    while len(found) < count:
        genes = space.sample(rng)
        trial = _trial(problem, len(found), genes, {})
        if trial.candidate.architecture and trial.candidate.key not in found:
            measurement = problem.measurement(problem.values(genes), seed, trial.number)
            found[trial.candidate.key] = replace(trial, state="complete", measurement=measurement, violation=-1.0)
    return list(found.values())


def _batch_s(problem: RaceProblem, name: str, past: Sequence[Trial], seed: int, batch: int) -> float:
    searcher = ARMS[name](replace(problem.problem, num_trials=2 * len(past)), seed)
    pending: list[Trial] = []
    begun = time.perf_counter()
    for _ in range(batch):
        searcher.update(past, pending)
        (suggestion,) = searcher.suggest(1)
        pending.append(_trial(problem, len(past) + len(pending), suggestion.genes, suggestion.state))
    return time.perf_counter() - begun


def _trial(problem: RaceProblem, number: int, genes: Mapping[str, object], state: Mapping[str, object]) -> Trial:
    candidate = problem.problem.space.decode(dict(genes))  # type: ignore[arg-type]
    return Trial(number=number, role=SEARCH, candidate=candidate, genes=genes, searcher_state=state)


def to_markdown(problem: str, clocked: Sequence[Clocked]) -> str:
    """Return the times on one problem as a table."""
    rows = [(f"`{c.searcher}`", str(c.trials), f"{c.seconds:.2f} ({c.low:.2f} to {c.high:.2f})") for c in clocked]
    table = markdown.table([("searcher", "trials", "s"), *rows], right=(1, 2))
    return f"`{problem}`: seconds per suggestion, {REPEATS} batches each\n\n{table}\n"
