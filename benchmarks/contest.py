"""Whole studies of several searchers in the same time, compared by their verified fronts (command `contest`).

Time is processor time of one thread: it does not depend on other work of the machine.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from autopeft.search_space.dominance import non_dominated
from autopeft.search_space.problem import Objective, Trial
from autopeft.studies.analysis.medians import LEAST_SEEDS, Median, median_of
from autopeft.studies.analysis.pareto import corner, hypervolume, scaled
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.config.fingerprint import key_of
from autopeft.studies.config.sections.search import SearchSettings
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.session import open_study
from autopeft.studies.errors import NoFeasibleCandidateError
from autopeft.studies.reports.markdown import table
from autopeft.studies.storage import json_lines

if TYPE_CHECKING:
    from autopeft.evaluators.data.splits import Splits

#: More trials than any searcher can evaluate in its time.
UNLIMITED = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOutcome:
    """Result of a study.

    `settings`: their key without the searcher and the seed; `allowed_s`: processor seconds for its search, None for no
    limit; `took_s`: of the whole study. `front`: values by metric of the candidates that are on the front after
    training with fresh seeds.
    """

    searcher: str
    seed: int
    settings: str
    allowed_s: float | None
    took_s: float
    trials: int
    front: tuple[Mapping[str, float], ...]

    @property
    def key(self) -> tuple[str, int]:
        """Searcher and seed."""
        return self.searcher, self.seed


class SilentWatcher:
    """A `Watcher` that shows nothing."""

    def plan(self, evaluations: int, done: int) -> None:
        """Ignore the number of evaluations."""

    def begin(self, trials: Sequence[Trial]) -> None:
        """Ignore the start of an evaluation."""

    def step(self, done: int, total: int) -> None:
        """Ignore a training step."""

    def stage(self, name: str, done: int, total: int) -> None:
        """Ignore work ahead of the evaluations."""

    def end(self, trial: Trial, snapshot: Snapshot) -> None:
        """Ignore the end of an evaluation."""


def run(settings: StudyFile, splits: Splits, searcher: str, seed: int, allowed_s: float | None) -> StudyOutcome:
    """Run a study without baselines and tracking, in a temporary folder.

    `allowed_s` limits the search; the finalists come on top.
    """
    torch.set_num_threads(1)
    search = {"searcher": searcher, "timeout_s": allowed_s}
    if allowed_s is not None:
        search["trials"] = UNLIMITED
    with TemporaryDirectory() as folder:
        own = settings.model_copy(
            update={
                "seed": seed,
                "output": folder,
                "search": settings.search.model_copy(update=search),
                "baselines": settings.baselines.model_copy(update={"names": ()}),
                "tracking": settings.tracking.model_copy(update={"enabled": False}),
            }
        )
        begin = time.process_time()
        with open_study(own, splits, resume=False) as study:
            study.time.clock = time.process_time
            try:
                snapshot = study.run(SilentWatcher())
            except NoFeasibleCandidateError:  # the front is empty
                snapshot = study.snapshot()
        took_s = time.process_time() - begin
    names = snapshot.objectives_by_name
    return StudyOutcome(
        searcher=searcher,
        seed=seed,
        settings=study_key(settings),
        allowed_s=allowed_s,
        took_s=took_s,
        trials=len(snapshot.search_trials),
        front=tuple({name: row.values[name] for name in names} for row in snapshot.rows() if row.on_front),
    )


def study_key(settings: StudyFile) -> str:
    """Return a key of everything that a study's front depends on, except for the searcher and the seed."""
    search = settings.search.model_copy(update={"searcher": SearchSettings().searcher})
    fields = ("task", "model", "data", "space", "training", "objectives", "constraints", "search", "proxy", "finalists")
    return key_of(settings.model_copy(update={"search": search}), *fields)


def read(path: Path) -> list[StudyOutcome]:
    """Read the results of a file."""
    return [StudyOutcome(**{**entry, "front": tuple(entry["front"])}) for entry in json_lines.read(path)]


def append(path: Path, outcome: StudyOutcome) -> None:
    """Append a result to a file."""
    json_lines.append(path, asdict(outcome))


# Report


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeLead:
    """Hypervolume of the first searcher minus that of another, as shares of the hypervolume of all fronts together."""

    other: str
    by_seed: Mapping[int, float]
    median: Median


def volumes(ended: Sequence[StudyOutcome], objectives: Sequence[Objective]) -> dict[tuple[str, int], float]:
    """Return each verified front's hypervolume as a share of that of all fronts together, with one reference point."""
    points = {
        entry.key: scaled([[o.loss(values[o.name]) for o in objectives] for values in entry.front], objectives)
        for entry in ended
        if entry.front
    }
    every = np.vstack(list(points.values()))
    end = corner(every, objectives)
    best = hypervolume(every[non_dominated(every)], end)
    return {entry.key: hypervolume(points[entry.key], end) / best if entry.front else 0.0 for entry in ended}


def leads(found: Mapping[tuple[str, int], float], searchers: Sequence[str]) -> list[VolumeLead]:
    """Return the leads of the first searcher over each other one, on the seeds that both have."""
    first, *others = searchers
    found_leads = []
    for other in others:
        seeds = sorted(seed for name, seed in found if name == first and (other, seed) in found)
        if seeds:
            by_seed = {seed: found[first, seed] - found[other, seed] for seed in seeds}
            found_leads.append(
                VolumeLead(other=other, by_seed=by_seed, median=median_of(np.array(list(by_seed.values()))))
            )
    return found_leads


def to_dict(ended: Sequence[StudyOutcome], objectives: Sequence[Objective], searchers: Sequence[str]) -> dict[str, Any]:
    """Return studies and leads as data."""
    found = volumes(ended, objectives)
    studies = [{**asdict(entry), "hypervolume": found[entry.key]} for entry in ended]
    return {"studies": studies, "leads": [asdict(lead) for lead in leads(found, searchers)]}


def to_markdown(ended: Sequence[StudyOutcome], objectives: Sequence[Objective], searchers: Sequence[str]) -> str:
    """Return studies as a table, and a sentence for each lead."""
    found = volumes(ended, objectives)
    quality = objectives[0]
    rows = [["searcher", "seed", "processor s", "trials", "front", f"best {quality.name}", "hypervolume"]]
    for entry in sorted(ended, key=lambda e: (e.seed, searchers.index(e.searcher))):
        best = min((values[quality.name] for values in entry.front), key=quality.loss, default=float("nan"))
        rows.append(
            [
                entry.searcher,
                str(entry.seed),
                f"{entry.took_s:,.0f}",
                str(entry.trials),
                str(len(entry.front)),
                f"{best:.4g}",
                f"{found[entry.key]:.3f}",
            ]
        )
    lines = [table(rows, right=range(1, len(rows[0]))), ""]
    for lead in leads(found, searchers):
        won = sum(value > 0 for value in lead.by_seed.values())
        lines.append(
            f"{searchers[0]} less {lead.other}: median {lead.median}, ahead on {won} of {len(lead.by_seed)} seeds."
            + (f" Fewer than {LEAST_SEEDS}: no interval." if lead.median.low is None else "")
        )
    return "\n".join(lines) + "\n"
