"""Runs races: one searcher on one problem with one seed, the way a study asks it, with made-up measurements.

A race that has ended is a line of JSON in a file, so that a benchmark can be killed and goes on with what is missing.
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
from autopeft.benchmarks.race.gpsampler import GpSampler
from autopeft.benchmarks.race.problems import PROBLEMS
from autopeft.search_space.problem import COPY, SEARCH, Trial
from autopeft.searchers import SEARCHERS, Searcher
from autopeft.studies.engine.study_loop import MOST_REJECTIONS, ended_as
from autopeft.studies.storage import json_lines

#: Every searcher that can race.
ARMS: dict[str, type[Searcher]] = {**SEARCHERS, GpSampler.name: GpSampler}


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """`problem`, `searcher`: names. `trials`: evaluations. `batch`: candidates that are measured at once."""

    problem: str
    searcher: str
    seed: int
    trials: int
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """`curve`: after each evaluation, the share of the known front's hypervolume; shorter than `race.trials` where the
    searcher had no more to offer. `own_s`: seconds of each suggestion, those without an evaluation too.
    `problem_key`: see `RaceProblem.key`.
    """

    race: Race
    problem_key: str
    curve: tuple[float, ...]
    own_s: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self.race), **{name: getattr(self, name) for name in ("problem_key", "curve", "own_s")}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Ended:
        data = dict(data)
        curve, own_s, key = tuple(data.pop("curve")), tuple(data.pop("own_s")), data.pop("problem_key")
        return cls(race=Race(**data), problem_key=key, curve=curve, own_s=own_s)


def run(race: Race, problem: RaceProblem) -> Ended:
    """The loop of `Study`, without rungs."""
    course = _Course(race, problem)
    while batch := course.fill():
        course.measure(batch)
    curve = [round(share, 5) for share in problem.shares(course.truth)]
    own_s = [round(seconds, 5) for seconds in course.own_s]
    return Ended(race=race, problem_key=problem.key, curve=tuple(curve), own_s=tuple(own_s))


class _Course:
    """One race under way. `truth`: the noise-free values of the evaluated trials, in their order."""

    def __init__(self, race: Race, problem: RaceProblem) -> None:
        self.race = race
        self.problem = problem
        self.searcher = ARMS[race.searcher](replace(problem.problem, num_trials=race.trials), race.seed)
        self.ended: dict[int, Trial] = {}
        self.by_key: dict[str, Trial] = {}
        self.truth: list[Mapping[str, float]] = []
        self.own_s: list[float] = []
        self.number = 0

    def fill(self) -> list[Trial]:
        """The next batch: new candidates until it is full, and copies of those in it. Copies of what is known and the
        empty candidate end at once.
        """
        batch: list[Trial] = []
        rejected = admitted = 0
        size = min(self.race.batch, self.race.trials - len(self.truth))
        while admitted < size and rejected < MOST_REJECTIONS:
            trial = self._suggested(batch)
            if trial is None:
                break
            twin = self.by_key.setdefault(trial.candidate.key, trial)
            if twin is trial and trial.candidate.architecture:
                batch.append(trial)
                admitted, rejected = admitted + 1, 0
                continue
            rejected += 1
            if twin is trial:
                self.ended[trial.number] = replace(trial, state="infeasible", violation=1.0)
            elif twin.number in self.ended:
                copy = replace(trial, role=COPY, of=twin.number)
                self.ended[trial.number] = ended_as(copy, self.ended[twin.number])
            else:
                batch.append(replace(trial, role=COPY, of=twin.number))
        return batch

    def measure(self, batch: Sequence[Trial]) -> None:
        for trial in batch:
            if trial.of is None:
                values = self.problem.values(dict(trial.genes))
                self.truth.append(values)
                found = self.problem.measurement(values, self.race.seed, trial.number)
                self.ended[trial.number] = replace(trial, state="complete", measurement=found, violation=-1.0)
        for trial in batch:
            if trial.of is not None:
                self.ended[trial.number] = ended_as(trial, self.ended[trial.of])

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


# Many of them


def read(path: Path) -> list[Ended]:
    """The races of a file; a line that a kill has cut short does not count."""
    return [Ended.from_dict(entry) for entry in json_lines.read(path)]


def append(path: Path, ended: Ended) -> None:
    json_lines.append(path, ended.to_dict())


def planned(problems: Sequence[str], searchers: Sequence[str], seeds: int, trials: int, batch: int) -> list[Race]:
    """Seed by seed, so that a benchmark that ends early has as many of every searcher."""
    return [
        Race(problem=problem, searcher=searcher, seed=seed, trials=trials, batch=batch)
        for seed in range(seeds)
        for problem in problems
        for searcher in searchers
    ]


def run_all(races: Sequence[Race], path: Path, workers: int, ended: Callable[[Ended], None] = lambda _: None) -> None:
    """Run `races` and append each to the file as it ends; `ended` hears of it.

    One process per worker with one thread each, so that a searcher's seconds are its own; a single worker is this
    process.
    """
    for result in _results(races, workers):
        append(path, result)
        ended(result)


def missing(races: Sequence[Race], known: Sequence[Ended]) -> list[Race]:
    """Those that have not been run, or on what is another problem now."""
    keys = {name: PROBLEMS[name]().key for name in {race.problem for race in races}}
    there = {entry.race for entry in known if entry.problem_key == keys.get(entry.race.problem)}
    return [race for race in races if race not in there]


def _results(races: Sequence[Race], workers: int) -> Iterator[Ended]:
    if workers == 1 or len(races) < 2:
        with _one_thread():
            yield from map(_run, races)
        return
    with multiprocessing.get_context("spawn").Pool(min(workers, len(races)), _start) as pool:
        yield from pool.imap_unordered(_run, races)


def _run(race: Race) -> Ended:
    return run(race, PROBLEMS[race.problem]())


def _start() -> None:
    """Of a worker. Ctrl-C is for the process that started it, which then ends its workers."""
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
