"""Audit of proxies: rank correlation of their scores with finished trainings (command `audit`, docs/proxies.md).

The references are a table of trainings (see `race/table.py`). An arm is a proxy with its settings; each is prepared and
scores the references once per seed. The scores are appended to a file, a line of JSON each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autopeft.benchmarks.race.table import QUALITY, TableRow, by_candidate
from autopeft.evaluators.base import Request, memory_errors
from autopeft.evaluators.proxies import PROXIES, TRAINED
from autopeft.evaluators.proxies.gates import Gates
from autopeft.evaluators.proxies.supernet import Supernet
from autopeft.search_space.architecture import Candidate
from autopeft.search_space.problem import Objective
from autopeft.searchers.scored.policies import POLICIES
from autopeft.searchers.scored.ranking import LEAST_RANKED, PICKED, RankCorrelation, rank_correlation
from autopeft.studies.config.problem import problem_for
from autopeft.studies.config.sections.search import ProxySettings
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.proxy_scores import architectures_only, build_proxy, score_key
from autopeft.studies.reports.markdown import table
from autopeft.studies.storage import json_lines

if TYPE_CHECKING:
    from autopeft.evaluators.training.packed import PackedEvaluator

#: Settings of each arm, by its name; the number of epochs is the command's.
ARMS: dict[str, Mapping[str, Any]] = {
    **{name: {"score": name} for name in PROXIES},
    Gates.name: {"score": Gates.name},
    **{name: {"score": Supernet.name, "policy": name} for name in POLICIES},
    "sandwich-distilled": {"score": Supernet.name, "policy": "sandwich", "distil": True},
    "sandwich-filtered": {"score": Supernet.name, "policy": "sandwich", "filter": "grad_norm"},
}
#: References that are trained again, to measure the time of a training on this machine.
TIMED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A candidate and the results of its trainings.

    `values`: means over the seeds. `std_err`: that of one training, over the examples. `seeds`: their number.
    """

    candidate: Candidate
    values: Mapping[str, float]
    std_err: Mapping[str, float]
    seeds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmScores:
    """Scores of an arm, by the key of each architecture.

    `reference_s`: seconds of one training, packed, on the same machine. `settings`: the key of the settings that the
    scores depend on.
    """

    arm: str
    settings: str
    epochs: float
    seed: int
    prepare_s: float
    score_s: float
    reference_s: float
    scores: Mapping[str, float]


def references(rows: Sequence[TableRow], decode: Callable[[Any], Candidate]) -> list[Reference]:
    """Return one reference per candidate of a table, in its order."""
    found = []
    for own in by_candidate(rows).values():
        values = {name: [row.measurement.values[name] for row in own] for name in own[0].measurement.values}
        found.append(
            Reference(
                candidate=decode(own[0].genes),
                values={name: float(np.mean(column)) for name, column in values.items()},
                std_err=own[0].measurement.std_err,
                seeds=len(own),
            )
        )
    return found


def epochs_of(arm: str, epochs: float) -> float:
    """Return the epochs of an arm's training; 0 for an arm without training."""
    return epochs if ARMS[arm]["score"] in TRAINED else 0.0


def settings_of(settings: StudyFile, arm: str, epochs: float, seed: int) -> StudyFile:
    """Return a study's settings with an arm in the place of its own proxy."""
    proxy = ProxySettings(**ARMS[arm], epochs=epochs if ARMS[arm]["score"] in TRAINED else None)
    return settings.model_copy(update={"proxy": proxy, "seed": seed})


def matching(entries: Sequence[ArmScores], settings: StudyFile, found: Sequence[Reference]) -> list[ArmScores]:
    """Return the entries with these settings that have scores of all these references."""
    architectures = {reference.candidate.architecture.key for reference in found}
    return [
        entry
        for entry in entries
        if entry.arm in ARMS
        and entry.settings == score_key(settings_of(settings, entry.arm, entry.epochs, entry.seed))
        and architectures <= entry.scores.keys()
    ]


def score(
    settings: StudyFile,
    arm: str,
    epochs: float,
    seed: int,
    evaluator: PackedEvaluator,
    found: Sequence[Reference],
    reference_s: float,
) -> ArmScores:
    """Prepare an arm and let it score the references.

    Raises NoScoresError, TrainingFailedError and OutOfMemoryError for an arm that cannot.
    """
    settings = settings_of(settings, arm, epochs, seed)
    inner = architectures_only(problem_for(settings, evaluator.backbone), len(found))
    architectures = list(dict.fromkeys(reference.candidate.architecture for reference in found))
    begin = time.perf_counter()
    with memory_errors():
        proxy = build_proxy(settings, inner, evaluator, None, lambda name, done, total: None)
        ready = time.perf_counter()
        scores = proxy.scores(architectures)
    return ArmScores(
        arm=arm,
        settings=score_key(settings),
        epochs=epochs_of(arm, epochs),
        seed=seed,
        prepare_s=ready - begin,
        score_s=time.perf_counter() - ready,
        reference_s=reference_s,
        scores={architecture.key: score for architecture, score in zip(architectures, scores, strict=True)},
    )


def training_s(evaluator: PackedEvaluator, found: Sequence[Reference]) -> float:
    """Return the seconds of one training in a pack."""
    begin = time.perf_counter()
    evaluator.evaluate([Request(candidate=reference.candidate) for reference in found[:TIMED]])
    return (time.perf_counter() - begin) / len(found[:TIMED])


def read(path: Path) -> list[ArmScores]:
    """Read a results file; nothing if there is none."""
    return [ArmScores(**entry) for entry in json_lines.read(path)]


def append(path: Path, entry: ArmScores) -> None:
    """Append the scores of an arm to a results file."""
    json_lines.append(path, asdict(entry))


# Report


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmSummary:
    """Means of an arm over its seeds.

    `ranking`: of the first seed, for its intervals. `regret`: in standard errors of the metric. `cost_share`: seconds
    over those of one training of each candidate.
    """

    arm: str
    epochs: float
    seeds: int
    ranking: RankCorrelation
    tau: float
    top_tau: float
    regret: Mapping[int, float]
    cost_share: float

    @property
    def name(self) -> str:
        """The arm, with its epochs if it trains."""
        return f"{self.arm}, {self.epochs:g} epochs" if self.epochs else self.arm

    def cells(self) -> list[str]:
        """Return the row of a table."""
        return [
            self.name,
            f"{self.tau:.2f} ({_interval(self.ranking.tau_interval)})",
            f"{self.top_tau:.2f} ({_interval(self.ranking.top_interval)})",
            *(f"{value:.1f}" for value in self.regret.values()),
            f"{self.cost_share:.1%}",
            str(self.seeds),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The arms by one metric, and the ceiling (see `ceiling`)."""

    metric: str
    num: int
    lines: tuple[ArmSummary, ...]
    ceiling: RankCorrelation | None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as data."""
        return asdict(self)

    def to_markdown(self) -> str:
        """Return the report as a table."""
        head = ["proxy", "tau", "tau, better half", *(f"regret@{k}" for k in PICKED), "cost", "seeds"]
        rows = [line.cells() for line in self.lines]
        if self.ceiling is not None:
            own = f"{self.ceiling.tau:.2f} ({_interval(self.ceiling.tau_interval)})"
            top = f"{self.ceiling.top_tau:.2f} ({_interval(self.ceiling.top_interval)})"
            rows.append(["*another training of the candidate*", own, top, *[""] * (len(PICKED) + 2)])
        return f"**{self.metric}**, {self.num} candidates\n\n{table([head, *rows], right=range(3, len(head)))}\n"


def reports(entries: Sequence[ArmScores], rows: Sequence[TableRow], found: Sequence[Reference]) -> list[Report]:
    """Return a report for each quality metric, at one learning rate."""
    return [
        Report(
            metric=metric,
            num=len(found),
            lines=tuple(_summaries(entries, found, metric)),
            ceiling=ceiling(rows, found, metric),
        )
        for metric in QUALITY
    ]


def _summaries(entries: Sequence[ArmScores], found: Sequence[Reference], metric: str) -> list[ArmSummary]:
    losses = at_one_rate(found, [_loss(metric, reference.values[metric]) for reference in found])
    error = float(np.median([reference.std_err[metric] for reference in found]))
    by_arm: dict[tuple[str, float], list[ArmScores]] = {}
    for entry in entries:
        by_arm.setdefault((entry.arm, entry.epochs), []).append(entry)
    lines = []
    for (arm, epochs), own in by_arm.items():
        ranked = [
            rank_correlation([e.scores.get(r.candidate.architecture.key, np.nan) for r in found], losses) for e in own
        ]
        trained_s = [entry.reference_s * len(found) for entry in own]
        scored_s = [entry.prepare_s + entry.score_s * len(found) / len(entry.scores) for entry in own]
        lines.append(
            ArmSummary(
                arm=arm,
                epochs=epochs,
                seeds=len(own),
                ranking=ranked[0],
                tau=float(np.mean([r.tau for r in ranked])),
                top_tau=float(np.mean([r.top_tau for r in ranked])),
                regret={k: float(np.mean([r.regret[k] for r in ranked])) / error for k in PICKED},
                cost_share=float(np.mean(np.array(scored_s) / trained_s)),
            )
        )
    return lines


def at_one_rate(found: Sequence[Reference], losses: Sequence[float]) -> list[float]:
    """Return the residuals of losses [n] after a linear regression on the logarithm of the learning rate.

    The score of an architecture does not depend on the learning rate of its training, which may matter as much as the
    architecture.
    """
    rates = np.log([reference.candidate.training["learning_rate"] for reference in found])
    centred, column = rates - rates.mean(), np.asarray(losses)
    slope = centred @ (column - column.mean()) / max(float(centred @ centred), 1e-12)
    return list(column - slope * centred)


def ceiling(rows: Sequence[TableRow], found: Sequence[Reference], metric: str) -> RankCorrelation | None:
    """Return how well one training of a candidate ranks its others: no proxy can be expected to do better.

    Returns None where fewer than three candidates have several seeds.
    """
    several = [reference for reference in found if reference.seeds > 1]
    if len(several) < LEAST_RANKED:
        return None
    grouped = by_candidate(sorted(rows, key=lambda row: row.seed))
    losses = [
        [_loss(metric, row.measurement.values[metric]) for row in grouped[reference.candidate.key]]
        for reference in several
    ]
    first = at_one_rate(several, [own[0] for own in losses])
    return rank_correlation(first, at_one_rate(several, [float(np.mean(own[1:])) for own in losses]))


def _loss(metric: str, value: float) -> float:
    return Objective.of(metric).loss(value)


def _interval(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}"
