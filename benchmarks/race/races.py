"""Run races: one searcher on one problem with one seed, called as a study calls it, with synthetic measurements.

Each result is a line of JSON in a file, so that a benchmark that was killed resumes with the missing races.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from autopeft.benchmarks.race.base import RaceProblem
from autopeft.benchmarks.race.bo_front import BoFront
from autopeft.benchmarks.race.gpsampler import GpSampler
from autopeft.benchmarks.race.problems import PROBLEMS
from autopeft.search_space.problem import COPY, SEARCH, Goal, Trial
from autopeft.searchers import SEARCHERS, Searcher
from autopeft.studies.engine.scheduled_trials import ended_as
from autopeft.studies.engine.study_loop import MOST_REJECTIONS
from autopeft.studies.storage import json_lines

#: Every searcher that can race.
ARMS: dict[str, type[Searcher]] = {**SEARCHERS, **{arm.name: arm for arm in (BoFront, GpSampler)}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """Settings of a race.

    `problem`, `searcher`: names. `trials`: evaluations. `batch`: candidates that are measured at once. `goal`: see
    `Problem`; it decides what the race is scored by.
    """

    problem: str
    searcher: str
    seed: int
    trials: int
    batch: int
    goal: Goal = "front"


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceResult:
    """Result of a race.

    `curve`: the score after each evaluation, see `RaceProblem.shares` and `RaceProblem.savings`; shorter than
    `race.trials` where the searcher ran out of candidates. `own_s`: seconds of each suggestion, also of those without
    an evaluation. `problem_key`: see `RaceProblem.key`.
    """

    race: Race
    problem_key: str
    curve: tuple[float, ...]
    own_s: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of a results file."""
        return {**asdict(self.race), **{name: getattr(self, name) for name in ("problem_key", "curve", "own_s")}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RaceResult:
        """Read an entry of a results file."""
        data = dict(data)
        curve, own_s, key = tuple(data.pop("curve")), tuple(data.pop("own_s")), data.pop("problem_key")
        return cls(race=Race(**data), problem_key=key, curve=curve, own_s=own_s)


def run(race: Race, problem: RaceProblem) -> RaceResult:
    """Run a race with the loop of `Study`, without rungs."""
    course = RunningRace(race, problem)
    while batch := course.fill():
        course.measure(batch)
    scores = problem.shares if race.goal == "front" else problem.savings
    curve = [round(score, 5) for score in scores(course.truth)]
    own_s = [round(seconds, 5) for seconds in course.own_s]
    return RaceResult(race=race, problem_key=problem.key, curve=tuple(curve), own_s=tuple(own_s))


class RunningRace:
    """A race in progress. `truth`: the noise-free values of the evaluated trials, in their order."""

    def __init__(self, race: Race, problem: RaceProblem) -> None:
        self.race = race
        self.problem = problem
        self.searcher = ARMS[race.searcher](replace(problem.problem, num_trials=race.trials, goal=race.goal), race.seed)
        self.ended: dict[int, Trial] = {}
        self.by_key: dict[str, Trial] = {}
        self.truth: list[Mapping[str, float]] = []
        self.own_s: list[float] = []
        self.number = 0

    def fill(self) -> list[Trial]:
        """Return the next batch: new candidates until it is full, and duplicates of those in it.

        Duplicates of earlier trials and the empty candidate end at once.
        """
        batch: list[Trial] = []
        rejected = accepted = 0
        size = min(self.race.batch, self.race.trials - len(self.truth))
        while accepted < size and rejected < MOST_REJECTIONS:
            trial = self._suggested(batch)
            if trial is None:
                break
            first = self.by_key.setdefault(trial.candidate.key, trial)
            if first is trial and trial.candidate.architecture:
                batch.append(trial)
                accepted, rejected = accepted + 1, 0
                continue
            rejected += 1
            if first is trial:
                self.ended[trial.number] = replace(trial, state="infeasible", violation=1.0)
            elif first.number in self.ended:
                copy = replace(trial, role=COPY, of=first.number)
                self.ended[trial.number] = ended_as(copy, self.ended[first.number])
            else:
                batch.append(replace(trial, role=COPY, of=first.number))
        return batch

    def measure(self, batch: Sequence[Trial]) -> None:
        """End the trials of a batch with their noisy measurements."""
        for trial in batch:
            if trial.of is None:
                values = self.problem.values(dict(trial.genes))
                self.truth.append(values)
                found = self.problem.measurement(values, self.race.seed, trial.number)
                self.ended[trial.number] = replace(trial, state="complete", measurement=found, violation=-1.0)
        for trial in batch:
            if trial.of is not None:
                self.ended[trial.number] = ended_as(trial, self.ended[trial.of])

    def chance_of_cheaper(self, cost: float) -> float | None:
        """Return what the searcher says of its next batch; see `Searcher.chance_of_cheaper`."""
        self.searcher.update([self.ended[number] for number in sorted(self.ended)])
        found = self.searcher.chance_of_cheaper(self.race.batch, cost)
        return None if found is None else found[1]

    def _suggested(self, batch: Sequence[Trial]) -> Trial | None:
        begun = time.perf_counter()
        self.searcher.update([self.ended[number] for number in sorted(self.ended)], batch)
        suggestions = self.searcher.suggest(1)
        self.own_s.append(time.perf_counter() - begun)
        if not suggestions:
            return None
        genes = suggestions[0].genes
        trial = Trial(
            number=self.number,
            role=SEARCH,
            candidate=self.problem.problem.space.decode(genes),
            genes=genes,
            seed=self.race.seed,
            searcher_state=suggestions[0].state,
        )
        self.number += 1
        return trial


# Many races


def read(path: Path) -> list[RaceResult]:
    """Read the results of a file; a line that a kill has cut short does not count."""
    return [RaceResult.from_dict(entry) for entry in json_lines.read(path)]


def append(path: Path, result: RaceResult) -> None:
    """Append a result to a file."""
    json_lines.append(path, result.to_dict())


def planned(
    problems: Sequence[str], searchers: Sequence[str], seeds: int, trials: int, batch: int, goal: Goal = "front"
) -> list[Race]:
    """Return the races seed by seed, so that a benchmark that ends early has equally many of every searcher."""
    return [
        Race(problem=problem, searcher=searcher, seed=seed, trials=trials, batch=batch, goal=goal)
        for seed in range(seeds)
        for problem in problems
        for searcher in searchers
    ]


def run_all(
    races: Sequence[Race], path: Path, workers: int, ended: Callable[[RaceResult], None] = lambda _: None
) -> None:
    """Run `races` and append each to the file as it ends; then call `ended`.

    One process per worker with one thread each, so that a searcher's seconds are its own; a single worker is this
    process.
    """
    for result in _results(races, workers):
        append(path, result)
        ended(result)


def missing(races: Sequence[Race], results: Sequence[RaceResult]) -> list[Race]:
    """Return the races without a result on the problem as it is now."""
    keys = {name: PROBLEMS[name]().key for name in {race.problem for race in races}}
    done = {entry.race for entry in results if entry.problem_key == keys.get(entry.race.problem)}
    return [race for race in races if race not in done]


def _results(races: Sequence[Race], workers: int) -> Iterator[RaceResult]:
    if workers == 1 or len(races) < 2:
        with _one_thread():
            yield from map(_run, races)
        return
    with multiprocessing.get_context("spawn").Pool(min(workers, len(races)), _start) as pool:
        yield from pool.imap_unordered(_run, races)


def _run(race: Race) -> RaceResult:
    return run(race, PROBLEMS[race.problem]())


def _start() -> None:
    """Initialise a worker. Ctrl-C is for the process that started it, which then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threadpool_limits(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
