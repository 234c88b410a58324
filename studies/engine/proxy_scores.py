"""Scores of candidates before any of them is trained, for the searchers `proxy` and `gates`.

`proxy`: a supernet is trained, or a proxy without training prepared, and a search over thousands of architectures asks
for its scores, batch by batch. `gates`: gates are trained under several penalties, and each proposes an architecture.
An interrupted study can be replayed: the supernet resumes from its checkpoint, a repeated search finds its earlier
scores in `subnets.csv` and its measured costs in `costs.json`, and the proposals of the gates are in `gates.json`.
"""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopeft.evaluators.atomic import atomic_write, atomic_write_text, disk_errors
from autopeft.evaluators.base import OutOfMemoryError, memory_errors
from autopeft.evaluators.costs.predictor import ADDITIVE, CostTable
from autopeft.evaluators.proxies import PROXIES
from autopeft.evaluators.proxies.gates import Gates
from autopeft.evaluators.proxies.supernet import Supernet
from autopeft.evaluators.training.record import TrainingFailedError
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.limits import Limits
from autopeft.search_space.problem import (
    DECLARED,
    SEARCH,
    Measurement,
    Objective,
    Problem,
    ScoredPoint,
    Trial,
    declared_costs,
)
from autopeft.search_space.spaces.genes import Assignment
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.search_space.training import Training
from autopeft.searchers import SEARCHERS
from autopeft.searchers.scored.gated import Gated
from autopeft.searchers.scored.policies import POLICIES, preferred
from autopeft.studies.config.fingerprint import key_of
from autopeft.studies.config.problem import space_for
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.watcher import Stage
from autopeft.studies.tracking.mlflow_sync import SUBNETS

if TYPE_CHECKING:
    from autopeft.evaluators.proxies.base import Proxy
    from autopeft.evaluators.training.packed import PackedEvaluator

LOGGER = logging.getLogger(__name__)

#: The penalty of gates that score architectures, on the share of the largest architecture's parameters that is on.
PENALTY = 0.1
#: The penalties of gates that propose architectures: from almost none to one that switches most adapters off.
PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
#: The supernet's checkpoint, in the study's folder.
CHECKPOINT = "supernet.pt"
#: The proposals of the gates and the measured costs, in the same folder.
PROPOSALS, COSTS = "gates.json", "costs.json"
#: Candidates per batch of the search over scores.
BATCH = 64
#: Metrics of an architecture that need no training.
UNTRAINED_METRICS = (*DECLARED, *ADDITIVE)
#: The objective that replaces quality in the search over scores.
SCORE = Objective.of("loss")
COLUMNS = ("key", "score", *DECLARED, "genes")


class NoScoresError(RuntimeError):
    """The proxy cannot score the architectures of this space."""


@dataclass(frozen=True, slots=True)
class Point:
    """An architecture to score. `state`: data that its searcher needs back with the score."""

    genes: Assignment
    candidate: Candidate
    costs: Mapping[str, float]
    state: Mapping[str, Any]

    @property
    def architecture(self) -> Architecture:
        """The architecture of the candidate."""
        return self.candidate.architecture

    @property
    def key(self) -> str:
        """The architecture's key."""
        return self.architecture.key


def score_candidates(
    settings: StudyFile, problem: Problem, evaluator: PackedEvaluator, stage: Stage
) -> tuple[ScoredPoint, ...]:
    """Return candidates and their scores (lower is better) for a searcher that starts from them.

    Empty if scoring fails, because the study can continue without scores.
    """
    find = _proposed if settings.search.searcher == Gated.name else _scored
    try:
        return tuple(find(settings, problem, evaluator, stage))
    except (TrainingFailedError, OutOfMemoryError, NoScoresError) as error:
        LOGGER.warning("the candidates could not be scored, so the search continues without scores: %s", error)
        return ()


def _proposed(settings: StudyFile, problem: Problem, evaluator: PackedEvaluator, stage: Stage) -> Iterator[ScoredPoint]:
    """Yield the distinct choices of gates over `PENALTIES`; the score of each is its position in this order."""
    space, saved = problem.space, SavedResult(settings.output_folder / PROPOSALS, key=score_key(settings))
    proposals: list[Assignment] | None = saved.read()
    if proposals is None:
        training = middle_training(settings, space)
        with memory_errors(), _refusals():
            gates = Gates(evaluator, space, training, settings.seed, PENALTY)
            proposals = gates.sweep(
                PENALTIES,
                evaluator.full_steps(training),
                lambda done, total: stage(f"training gates with {len(PENALTIES)} penalties", done, total),
            )
        saved.write(proposals)
    for place, genes in enumerate(proposals):
        costs = declared_costs(space.decode(genes).architecture, space.backbone)
        yield ScoredPoint(genes=genes, score=float(place), costs=costs)


def _scored(settings: StudyFile, problem: Problem, evaluator: PackedEvaluator, stage: Stage) -> Iterator[ScoredPoint]:
    inner = architectures_only(problem, settings.proxy.subnets)
    folder = settings.output_folder
    table = ScoreTable(folder / SUBNETS, key=score_key(settings))
    proxy: Proxy | None = None
    words, met = f"scoring by {settings.proxy.score}", 0

    def score(points: Sequence[Point]) -> list[float]:
        nonlocal proxy
        missing = [point for point in points if point.key not in table.scores]
        if missing:
            with memory_errors():
                proxy = proxy or build_proxy(settings, inner, evaluator, folder, stage)
                values = proxy.scores(
                    [point.architecture for point in missing],
                    lambda done, total: stage(words, met + done * len(missing) // total, inner.num_trials),
                )
            table.append(missing, values)
        return [table.scores[point.key] for point in points]

    costs = _costs(settings, inner, evaluator, stage)
    for met, (point, value) in enumerate(_searched(settings, inner, score, costs), 1):
        stage(words, met, inner.num_trials)
        yield ScoredPoint(genes=problem.space.completed(point.genes), score=value, costs=point.costs)


def architectures_only(problem: Problem, num_trials: int) -> Problem:
    """Return the problem without training settings and without costs that are not sums over sites."""
    space = problem.space
    bare = SearchSpace(
        backbone=space.backbone,
        adapters=space.adapters,
        one_of=space.one_of,
        layer_gate=space.layer_gate,
        stages=space.stages,
    )
    return Problem(
        space=bare,
        objectives=(SCORE, *(o for o in problem.objectives if o.name in UNTRAINED_METRICS)),
        reported=tuple(o for o in problem.reported if o.name in UNTRAINED_METRICS and o.bound is not None),
        num_trials=num_trials,
        limits=Limits({name: limit for name, limit in problem.limits.maxima.items() if name in UNTRAINED_METRICS}),
    )


def _costs(
    settings: StudyFile, inner: Problem, evaluator: PackedEvaluator, stage: Stage
) -> Callable[[Architecture], dict[str, float]]:
    """Return a function of an architecture's costs, with a table of measurements if measured costs count."""
    backbone = inner.space.backbone
    wanted = {o.name for o in inner.measures} | inner.limits.maxima.keys()
    if not (measured := wanted & set(ADDITIVE)):
        return lambda architecture: declared_costs(architecture, backbone)
    space = space_for(settings, backbone)
    training = space.middle.training
    # A resumed study needs its earlier costs: with other costs, other candidates would be scored.
    saved = SavedResult(settings.output_folder / COSTS, key=score_key(settings))

    def save(measurements: Mapping[str, Mapping[str, float]]) -> None:
        saved.write(measurements)
        stage("measuring the costs of adapters", len(measurements), len(measurements))

    table = CostTable(evaluator, inner.space, measured, training, measured=saved.read() or {}, save=save)
    return lambda architecture: {**declared_costs(architecture, backbone), **table.costs(architecture)}


def middle_training(settings: StudyFile, space: SearchSpace) -> Training:
    """Return the training settings of a supernet: ranges at their middle, and its own number of epochs."""
    own = space.middle.training
    epochs = settings.proxy.epochs
    return Training(**own if epochs is None else {**own, "epochs": epochs})


def build_proxy(
    settings: StudyFile, inner: Problem, evaluator: PackedEvaluator, folder: Path | None, stage: Stage
) -> Proxy:
    """Build and train the study's proxy. Raises NoScoresError for a space that it cannot score."""
    score = settings.proxy.score
    if score in PROXIES:
        return PROXIES[score](evaluator, settings.seed)
    training = middle_training(settings, space_for(settings, evaluator.backbone))
    with _refusals():
        if score == Gates.name:
            gates = Gates(evaluator, inner.space, training, settings.seed, PENALTY)
            gates.train(evaluator.full_steps(training), lambda done, total: stage("training the gates", done, total))
            return gates
        return _supernet(settings, inner, evaluator, training, folder, stage)


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn the errors of shared weights and gates about an unsuitable space into NoScoresError."""
    try:
        yield
    except ValueError as error:
        raise NoScoresError(str(error)) from error


def _supernet(
    settings: StudyFile,
    inner: Problem,
    evaluator: PackedEvaluator,
    training: Training,
    folder: Path | None,
    stage: Stage,
) -> Supernet:
    own, pool = settings.proxy, None
    if own.filter is not None:
        words, chooser = f"selecting subnets by {own.filter}", PROXIES[own.filter](evaluator, settings.seed)
        pool = preferred(
            inner.space,
            settings.seed,
            lambda drawn: chooser.scores(drawn, lambda done, total: stage(words, done, total)),
        )
    policy = POLICIES[own.policy](inner.space, settings.seed, pool)
    supernet = Supernet(
        evaluator,
        inner.space,
        training,
        settings.seed,
        num_banks=policy.num_banks,
        bank_of=policy.bank_of,
        distil=own.distil,
    )
    supernet.train(
        policy.subnets,
        evaluator.full_steps(training),
        checkpoint=None if folder is None else folder / CHECKPOINT,
        key=score_key(settings),
        progress=lambda done, total: stage(f"training the supernet ({policy.name})", done, total),
    )
    return supernet


def _searched(
    settings: StudyFile,
    inner: Problem,
    score: Callable[[Sequence[Point]], list[float]],
    costs: Callable[[Architecture], dict[str, float]],
) -> Iterator[tuple[Point, float]]:
    """Yield the distinct points of the search over scores with their scores, in its order."""
    space = inner.space
    searcher = SEARCHERS[settings.proxy.search](inner, settings.seed)
    trials: list[Trial] = []
    seen: set[str] = set()
    while len(seen) < inner.num_trials:
        searcher.update(trials)
        fresh: dict[str, Point] = {}
        for suggestion in searcher.suggest(min(BATCH, inner.num_trials - len(seen))):
            candidate = space.decode(suggestion.genes)
            point = Point(suggestion.genes, candidate, costs(candidate.architecture), suggestion.state)
            if candidate.architecture and point.key not in seen:
                fresh[point.key] = point
        if not fresh:
            return  # the space is exhausted
        seen |= fresh.keys()
        for point, value in zip(fresh.values(), score(list(fresh.values())), strict=True):
            ok = math.isfinite(value)
            trials.append(
                Trial(
                    number=len(trials),
                    role=SEARCH,
                    candidate=point.candidate,
                    genes=point.genes,
                    state="complete" if ok else "failed",
                    measurement=Measurement(values={SCORE.name: value, **point.costs}) if ok else None,
                    violation=inner.violation({SCORE.name: value, **point.costs}),
                    searcher_state=point.state,
                )
            )
            yield point, value


@dataclass(frozen=True, slots=True)
class SavedResult:
    """A result from before the trials, as a JSON file; results of other settings (`key`) are ignored."""

    path: Path
    key: str

    def read(self) -> Any:
        """Return the result of the same settings, None if there is none."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return content["found"] if content["settings"] == self.key else None
        return None

    def write(self, found: Any) -> None:
        """Write the result atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.path, json.dumps({"settings": self.key, "found": found}) + "\n")


class ScoreTable:
    """Scores by the keys of architectures, in a growing CSV file; scores of other settings (`key`) are dropped."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        beside = SavedResult(path.with_suffix(".json"), key)
        rows: list[dict[str, str]] = []
        if beside.read() is not None:
            with suppress(OSError, ValueError), path.open(encoding="utf-8", newline="") as file:
                # A killed study, or a full disk, may have left an incomplete line.
                whole = [line for line in file if line.endswith("\n")]
                rows = [row for row in csv.DictReader(whole) if all(row.get(name) for name in COLUMNS)]
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        beside.write(path.name)
        self.scores = {row["key"]: float(row["score"]) for row in rows}

    def append(self, points: Sequence[Point], values: Sequence[float]) -> None:
        """Add points and their scores."""
        with disk_errors(self.path), self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            for point, value in zip(points, values, strict=True):
                costs = {name: point.costs[name] for name in DECLARED}
                writer.writerow({"key": point.key, "score": value, **costs, "genes": json.dumps(point.genes)})
                self.scores[point.key] = value


def score_key(settings: StudyFile) -> str:
    """Return a key of all settings that scores depend on."""
    return key_of(settings, "seed", "task", "model", "data", "space", "training", "proxy")
