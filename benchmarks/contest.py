"""Whole studies of several searchers in the same time: the verified fronts that they end with (command `contest`).

Time is the processor's, of one thread: it does not depend on what else the machine does.
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
from autopeft.studies.analysis.pareto import corner, hypervolume
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.config.fingerprint import key_of
from autopeft.studies.config.settings import SearchSettings
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.session import open_study
from autopeft.studies.errors import NoFeasibleCandidateError
from autopeft.studies.reports.markdown import table
from autopeft.studies.storage import json_lines

if TYPE_CHECKING:
    from autopeft.evaluators.data.splits import Splits

#: Trials that no searcher comes to in its time.
UNLIMITED = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A study that ended. `settings`: their key, but for the searcher and the seed; `allowed_s`: processor seconds for
    its search, None for as long as its trials take; `took_s`: of the whole study. `front`: values by metric of the
    candidates that fresh seeds left on the front.
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
        return self.searcher, self.seed


class Quiet:
    """A `Watcher` for studies that nobody watches."""

    def plan(self, evaluations: int, done: int) -> None: ...

    def begin(self, trials: Sequence[Trial]) -> None: ...

    def step(self, done: int, total: int) -> None: ...

    def stage(self, name: str, done: int, total: int) -> None: ...

    def end(self, trial: Trial, snapshot: Snapshot) -> None: ...


def run(settings: StudyFile, splits: Splits, searcher: str, seed: int, allowed_s: float | None) -> Ended:
    """A study without baselines and tracking, in a folder that does not stay. It starts no batch of trials after
    `allowed_s`; those that are under way and the finalists come on top.
    """
    torch.set_num_threads(1)
    wish = {"searcher": searcher, "timeout_s": allowed_s}
    if allowed_s is not None:
        wish["trials"] = UNLIMITED
    with TemporaryDirectory() as folder:
        own = settings.model_copy(
            update={
                "seed": seed,
                "output": folder,
                "search": settings.search.model_copy(update=wish),
                "baselines": settings.baselines.model_copy(update={"names": ()}),
                "tracking": settings.tracking.model_copy(update={"enabled": False}),
            }
        )
        begin = time.process_time()
        with open_study(own, splits, resume=False) as study:
            study.clock = time.process_time
            study.started = begin
            try:
                snapshot = study.run(Quiet())
            except NoFeasibleCandidateError:  # a front of none, then
                snapshot = study.snapshot()
        took_s = time.process_time() - begin
    names = snapshot.objectives_by_name
    return Ended(
        searcher=searcher,
        seed=seed,
        settings=study_key(settings),
        allowed_s=allowed_s,
        took_s=took_s,
        trials=len(snapshot.search_trials),
        front=tuple({name: row.values[name] for name in names} for row in snapshot.rows() if row.on_front),
    )


def study_key(settings: StudyFile) -> str:
    """Changes with everything in a study that its front depends on, but for the searcher and the seed."""
    search = settings.search.model_copy(update={"searcher": SearchSettings().searcher})
    fields = ("task", "model", "data", "space", "training", "objectives", "constraints", "search", "proxy", "finalists")
    return key_of(settings.model_copy(update={"search": search}), *fields)


def read(path: Path) -> list[Ended]:
    return [Ended(**{**entry, "front": tuple(entry["front"])}) for entry in json_lines.read(path)]


def append(path: Path, ended: Ended) -> None:
    json_lines.append(path, asdict(ended))


# Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """Hypervolume of the first searcher less that of another, as shares of what all fronts together dominate."""

    other: str
    by_seed: Mapping[int, float]
    median: Median


def volumes(ended: Sequence[Ended], objectives: Sequence[Objective]) -> dict[tuple[str, int], float]:
    """Of each study's verified front, as a share of what all of them together dominate, up to one corner."""
    points = {
        entry.key: np.array([[o.loss(values[o.name]) for o in objectives] for values in entry.front])
        for entry in ended
        if entry.front
    }
    every = np.vstack(list(points.values()))
    end = corner(every, objectives)
    best = hypervolume(every[non_dominated(every)], end)
    return {entry.key: hypervolume(points[entry.key], end) / best if entry.front else 0.0 for entry in ended}


def leads(found: Mapping[tuple[str, int], float], searchers: Sequence[str]) -> list[Lead]:
    """Of the first searcher over each other one, on the seeds that both have."""
    first, *others = searchers
    found_leads = []
    for other in others:
        seeds = sorted(seed for name, seed in found if name == first and (other, seed) in found)
        if seeds:
            by_seed = {seed: found[first, seed] - found[other, seed] for seed in seeds}
            found_leads.append(Lead(other=other, by_seed=by_seed, median=median_of(np.array(list(by_seed.values())))))
    return found_leads


def to_dict(ended: Sequence[Ended], objectives: Sequence[Objective], searchers: Sequence[str]) -> dict[str, Any]:
    found = volumes(ended, objectives)
    studies = [{**asdict(entry), "hypervolume": found[entry.key]} for entry in ended]
    return {"studies": studies, "leads": [asdict(lead) for lead in leads(found, searchers)]}


def to_markdown(ended: Sequence[Ended], objectives: Sequence[Objective], searchers: Sequence[str]) -> str:
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
