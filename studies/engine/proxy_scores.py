"""Scores candidates before any of them is trained: what the searchers `proxy` and `gates` start from.

`proxy`: a supernet is trained, or a proxy without training prepared, and a search over thousands of architectures asks
for its scores, batch by batch. `gates`: gates are trained under several penalties, and each proposes an architecture.
All of it is replayable: the supernet goes on from its checkpoint, a search that is run again finds the scores that it
had in `subnets.csv`, costs that were measured for it stand in `costs.json`, and what the gates have proposed in
`gates.json`.
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

from autopeft.evaluators.atomic import atomic_write, atomic_write_text
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

#: Of the gates, on the share of the largest architecture's parameters that is on.
PENALTY = 0.1
#: Of those that propose: from next to none to one that leaves little on.
PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
#: The supernet's checkpoint, in the study's folder.
CHECKPOINT = "supernet.pt"
#: What the gates have proposed, and costs that were measured, there as well.
PROPOSALS, COSTS = "gates.json", "costs.json"
#: Candidates that the search over scores asks for at once.
BATCH = 64
#: Metrics that are known of an architecture without training it.
FORESEEN = (*DECLARED, *ADDITIVE)
#: What stands for quality in that search.
SCORE = Objective.of("loss")
COLUMNS = ("key", "score", *DECLARED, "genes")


class NoScoresError(RuntimeError):
    """A proxy that cannot score the architectures of a space."""


@dataclass(frozen=True, slots=True)
class Point:
    """An architecture on its way to a score. `state`: what the search wants back with it."""

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


def scored(settings: StudyFile, problem: Problem, evaluator: PackedEvaluator, stage: Stage) -> tuple[ScoredPoint, ...]:
    """Return candidates and their scores, less is better, for a searcher that starts from them.

    Empty if there can be no scores: a failure here does not end the study.
    """
    find = _proposed if settings.search.searcher == Gated.name else _scored
    try:
        return tuple(find(settings, problem, evaluator, stage))
    except (TrainingFailedError, OutOfMemoryError, NoScoresError) as error:
        LOGGER.warning("no candidate has a score, so the search goes without: %s", error)
        return ()


def _proposed(settings: StudyFile, problem: Problem, evaluator: PackedEvaluator, stage: Stage) -> Iterator[ScoredPoint]:
    """Yield the choices of gates with each of `PENALTIES`, each once; its place in that order is its score."""
    space, kept = problem.space, Kept(settings.output_folder / PROPOSALS, key=score_key(settings))
    proposals: list[Assignment] | None = kept.read()
    if proposals is None:
        training = middle_training(settings, space)
        with memory_errors(), _refusals():
            gates = Gates(evaluator, space, training, settings.seed, PENALTY)
            proposals = gates.sweep(
                PENALTIES,
                evaluator.full_steps(training),
                lambda done, total: stage(f"training gates with {len(PENALTIES)} penalties", done, total),
            )
        kept.write(proposals)
    for place, genes in enumerate(proposals):
        costs = declared_costs(space.decode(genes).architecture, space.backbone)
        yield ScoredPoint(genes=genes, score=float(place), costs=costs)


def _scored(settings: StudyFile, problem: Problem, evaluator: PackedEvaluator, stage: Stage) -> Iterator[ScoredPoint]:
    inner = architectures_only(problem, settings.proxy.subnets)
    folder = settings.output_folder
    table = Table(folder / SUBNETS, key=score_key(settings))
    proxy: Proxy | None = None
    words, met = f"scoring by {settings.proxy.score}", 0

    def score(points: Sequence[Point]) -> list[float]:
        nonlocal proxy
        lacking = [point for point in points if point.key not in table.scores]
        if lacking:
            with memory_errors():
                proxy = proxy or prepared(settings, inner, evaluator, folder, stage)
                values = proxy.scores(
                    [point.architecture for point in lacking],
                    lambda done, total: stage(words, met + done * len(lacking) // total, inner.num_trials),
                )
            table.append(lacking, values)
        return [table.scores[point.key] for point in points]

    costs = _costs(settings, inner, evaluator, stage)
    for met, (point, value) in enumerate(_searched(settings, inner, score, costs), 1):
        stage(words, met, inner.num_trials)
        yield ScoredPoint(genes=problem.space.completed(point.genes), score=value, costs=point.costs)


def architectures_only(problem: Problem, num_trials: int) -> Problem:
    """Return the problem without the training and without costs that do not add up over sites."""
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
        objectives=(SCORE, *(o for o in problem.objectives if o.name in FORESEEN)),
        num_trials=num_trials,
        limits=Limits({name: most for name, most in problem.limits.maxima.items() if name in FORESEEN}),
    )


def _costs(
    settings: StudyFile, inner: Problem, evaluator: PackedEvaluator, stage: Stage
) -> Callable[[Architecture], dict[str, float]]:
    """Return the function of an architecture's costs, with a table of measurements if declared costs are not enough."""
    backbone = inner.space.backbone
    wanted = {o.name for o in inner.objectives} | inner.limits.maxima.keys()
    if not (measured := wanted & set(ADDITIVE)):
        return lambda architecture: declared_costs(architecture, backbone)
    space = space_for(settings, backbone)
    training = space.middle.training
    # A study that goes on has to find the costs that it had: by others, other candidates would have been scored.
    kept = Kept(settings.output_folder / COSTS, key=score_key(settings))

    def keep(known: Mapping[str, Mapping[str, float]]) -> None:
        kept.write(known)
        stage("measuring what adapters add to the costs", len(known), len(known))

    table = CostTable(evaluator, inner.space, measured, training, measured=kept.read() or {}, save=keep)
    return lambda architecture: {**declared_costs(architecture, backbone), **table.costs(architecture)}


def middle_training(settings: StudyFile, space: SearchSpace) -> Training:
    """Return the training of a supernet: searched settings at their middle, and its own number of epochs."""
    own = space.middle.training
    epochs = settings.proxy.epochs
    return Training(**own if epochs is None else {**own, "epochs": epochs})


def prepared(
    settings: StudyFile, inner: Problem, evaluator: PackedEvaluator, folder: Path | None, stage: Stage
) -> Proxy:
    """Prepare the study's proxy. Raises NoScoresError for a space that it cannot score."""
    wish = settings.proxy
    if wish.score in PROXIES:
        return PROXIES[wish.score](evaluator, settings.seed)
    training = middle_training(settings, space_for(settings, evaluator.backbone))
    with _refusals():
        if wish.score == Gates.name:
            gates = Gates(evaluator, inner.space, training, settings.seed, PENALTY)
            gates.train(evaluator.full_steps(training), lambda done, total: stage("training the gates", done, total))
            return gates
        return _supernet(settings, inner, evaluator, training, folder, stage)


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn the refusal of a space by shared weights or gates into NoScoresError."""
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
    wish, pool = settings.proxy, None
    if wish.filter is not None:
        words, chooser = f"choosing what to train by {wish.filter}", PROXIES[wish.filter](evaluator, settings.seed)
        pool = preferred(
            inner.space,
            settings.seed,
            lambda drawn: chooser.scores(drawn, lambda done, total: stage(words, done, total)),
        )
    policy = POLICIES[wish.policy](inner.space, settings.seed, pool)
    supernet = Supernet(
        evaluator,
        inner.space,
        training,
        settings.seed,
        num_banks=policy.num_banks,
        bank_of=policy.bank_of,
        distil=wish.distil,
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
    """Yield the points of the search over scores in its order, none twice."""
    space = inner.space
    searcher = SEARCHERS[settings.proxy.search](inner, settings.seed)
    trials: list[Trial] = []
    known: set[str] = set()
    while len(known) < inner.num_trials:
        searcher.update(trials)
        fresh: dict[str, Point] = {}
        for suggestion in searcher.suggest(min(BATCH, inner.num_trials - len(known))):
            candidate = space.decode(suggestion.genes)
            point = Point(suggestion.genes, candidate, costs(candidate.architecture), suggestion.state)
            if candidate.architecture and point.key not in known:
                fresh[point.key] = point
        if not fresh:
            return  # the space is exhausted
        known |= fresh.keys()
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
class Kept:
    """What a study has found ahead of its trials, as JSON. That of other settings (`key`) does not count."""

    path: Path
    key: str

    def read(self) -> Any:
        """Return what was written under the same settings, None if there is nothing."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(self.path.read_text(encoding="utf-8"))
            return told["found"] if told["settings"] == self.key else None
        return None

    def write(self, found: Any) -> None:
        """Write all of it or nothing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.path, json.dumps({"settings": self.key, "found": found}) + "\n")


class Table:
    """Scores by the keys of architectures, as a CSV that grows. Those of other settings (`key`) are dropped."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        beside = Kept(path.with_suffix(".json"), key)
        rows: list[dict[str, str]] = []
        if beside.read() is not None:
            with suppress(OSError, ValueError), path.open(encoding="utf-8", newline="") as file:
                # A study that was killed may have left half a line.
                rows = [row for row in csv.DictReader(file) if all(row.get(name) for name in COLUMNS)]
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        beside.write(path.name)
        self.scores = {row["key"]: float(row["score"]) for row in rows}

    def append(self, points: Sequence[Point], values: Sequence[float]) -> None:
        """Add points and their scores."""
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            for point, value in zip(points, values, strict=True):
                costs = {name: point.costs[name] for name in DECLARED}
                writer.writerow({"key": point.key, "score": value, **costs, "genes": json.dumps(point.genes)})
                self.scores[point.key] = value


def score_key(settings: StudyFile) -> str:
    """Return a key that changes with everything that a score depends on."""
    return key_of(settings, "seed", "task", "model", "data", "space", "training", "proxy")
