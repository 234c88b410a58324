"""How often a further batch holds what `Searcher.chance_of_cheaper` promises, on problems whose truth is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy.stats import binomtest

from autopeft.benchmarks.race.base import RaceProblem
from autopeft.benchmarks.race.races import Race, RunningRace
from autopeft.studies.reports.markdown import table

#: Upper ends of the groups of chances.
ENDS = (0.05, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A chance, and whether the next batch held what it is about."""

    problem: str
    seed: int
    trials: int
    chance: float
    held: bool


def forecasts(race: Race, problem: RaceProblem) -> Iterator[Forecast]:
    """Run a race, and yield a forecast before each batch that the searcher proposes wholly by its model.

    It is about a candidate that costs less than the cheapest one so far which is truly as good as the best, as the
    finalists of a study would find it.
    """
    course = RunningRace(race, problem)
    while True:
        below = problem.cheapest(course.truth) if course.truth else 0.0
        chance = course.chance_of_cheaper(below) if course.truth else None
        batch = course.fill()
        if not batch:
            return
        course.measure(batch)
        if chance is not None:
            held = problem.cheapest(course.truth) < below
            yield Forecast(problem=race.problem, seed=race.seed, trials=len(course.truth), chance=chance, held=held)


def to_markdown(found: Sequence[Forecast]) -> str:
    """Return a row per group of chances as Markdown."""
    rows = [("chance", "forecasts", "mean chance", "held (95 %)")]
    low = 0.0
    for end in ENDS:
        own = [one for one in found if low <= one.chance < end or (end == 1.0 and one.chance == 1.0)]
        if own:
            share = binomtest(sum(one.held for one in own), len(own))
            interval = share.proportion_ci(method="wilson")
            text = f"{share.statistic:.0%} ({interval.low:.0%} to {interval.high:.0%})"
            rows.append((f"{low:.0%} to {end:.0%}", f"{len(own)}", f"{fmean(one.chance for one in own):.0%}", text))
        low = end
    return table(rows, right=(1, 2)) + "\n"
