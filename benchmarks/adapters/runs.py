"""Trainings and costs of the rows, in a file that grows by a line each; what is in it is not measured again.

Each row is tuned over `RATES` on the validation rows with one seed; these trainings go into one pack. The best rate is
trained again with fresh seeds, which are scored on the test rows: nothing was chosen by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopeft.benchmarks.adapters.rows import HEAD, RATES, REFERENCE, Row, settings_of
from autopeft.evaluators.base import Outcome, Request
from autopeft.evaluators.training.base import TrainingEvaluator
from autopeft.search_space.architecture import Architecture, Candidate, digest
from autopeft.search_space.metrics import Metric
from autopeft.studies.config.problem import space_for
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.session import evaluator_for
from autopeft.studies.storage import json_lines

if TYPE_CHECKING:
    from autopeft.evaluators.data.splits import Splits

#: The seed of the trainings that choose the learning rate; no other training has it.
TUNING_SEED = 0
MEASURED = frozenset({"step_s", "peak_memory_bytes"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Of:
    """What a line is of. `inputs`: digest of rows, weights and training settings. `architecture`: its key."""

    study: str
    inputs: str
    kind: str
    size: str
    setting: str
    architecture: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(Of):
    """One training.

    `values`: on the validation rows. `test`: scores of each test row by metric; empty in tuning. `failure`: why it has
    neither.
    """

    learning_rate: float
    seed: int
    values: Mapping[str, float]
    test: Mapping[str, Sequence[float]]
    train_s: float
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCosts(Of):
    """Costs of a row. `lora`: the measured ones of LoRA of the same size class, taken right after those of the row."""

    costs: Mapping[str, float]
    lora: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Results:
    """The contents of a file."""

    runs: tuple[Run, ...] = ()
    costs: tuple[RowCosts, ...] = ()

    def of(self, study: str, inputs: str | None = None) -> Results:
        """Return the results with these inputs of a study; None: with those of its last training."""
        if inputs is None:
            inputs = next((run.inputs for run in reversed(self.runs) if run.study == study), "")
        wanted = study, inputs
        return Results(
            tuple(run for run in self.runs if (run.study, run.inputs) == wanted),
            tuple(found for found in self.costs if (found.study, found.inputs) == wanted),
        )


def read(path: Path) -> Results:
    """Read a file of results; nothing if there is none."""
    entries = json_lines.read(path)
    return Results(
        tuple(Run(**entry["run"]) for entry in entries if "run" in entry),
        tuple(RowCosts(**entry["costs"]) for entry in entries if "costs" in entry),
    )


def metrics_of(settings: StudyFile) -> list[Metric]:
    """Return the qualities among the objectives of a study; the first one decides."""
    return [objective.metric for objective in settings.objectives_list() if objective.is_quality]


def best_rate(runs: Iterable[Run], metric: Metric) -> float | None:
    """Return the best learning rate of the tuning of one row, the lowest of several; None if all trainings failed."""
    sign = 1 if metric.maximise else -1
    tuned = [run for run in runs if run.seed == TUNING_SEED and not run.failure]
    ranked = max(tuned, key=lambda run: (sign * run.values[metric.name], -run.learning_rate), default=None)
    return None if ranked is None else ranked.learning_rate


@dataclass(slots=True, kw_only=True)
class Bench:
    """A study's model and rows, and the file of results.

    `training`: the study's settings but for the learning rate. `problems`: of trainings that failed by an error; they
    are not in the file.
    """

    study: str
    evaluator: TrainingEvaluator
    metrics: list[Metric]
    training: Mapping[str, Any]
    inputs: str
    path: Path
    problems: list[str]

    @classmethod
    def of(cls, settings: StudyFile, splits: Splits, path: Path) -> Bench:
        """Load the model of a study."""
        evaluator = evaluator_for(settings, splits)
        middle = dict(space_for(settings, evaluator.backbone).middle.training)
        middle.pop("learning_rate", None)
        return cls(
            study=settings.study,
            evaluator=evaluator,
            metrics=metrics_of(settings),
            training=middle,
            inputs=digest([evaluator.contents(), middle]),
            path=path,
            problems=[],
        )

    def fits(self, row: Row) -> bool:
        """Return whether the model has something to train for a row."""
        backbone = self.evaluator.backbone
        return bool(row.place(backbone) or (row.kind == HEAD and backbone.head_modules))

    def measure(self, row: Row, seeds: Sequence[int], ended: Callable[[], None] = lambda: None) -> None:
        """Measure what the file lacks of a row. `ended`: called for each training, known ones too."""
        architecture = row.place(self.evaluator.backbone)
        self._train(row, architecture, RATES, [TUNING_SEED], ended)
        known = [
            run for run in read(self.path).of(self.study, self.inputs).runs if run.architecture == architecture.key
        ]
        rate = best_rate(known, self.metrics[0])
        self._train(row, architecture, [] if rate is None else [rate], seeds, ended)
        self._cost(row, architecture)

    def _train(
        self,
        row: Row,
        architecture: Architecture,
        rates: Sequence[float],
        seeds: Sequence[int],
        ended: Callable[[], None],
    ) -> None:
        """Train at all rates with all seeds. Other seeds than that of the tuning are scored on the test rows."""
        of = self._of(row, architecture)
        known = {
            (run.learning_rate, run.seed)
            for run in read(self.path).of(self.study, self.inputs).runs
            if run.architecture == of["architecture"]
        }
        wanted = [(rate, seed) for seed in seeds for rate in rates]
        for key in wanted:
            if key in known:
                ended()
        lacking = [key for key in wanted if key not in known]
        requests = [
            Request(
                candidate=Candidate(architecture=architecture, training={**self.training, "learning_rate": rate}),
                seed=seed,
                test=seed != TUNING_SEED,
            )
            for rate, seed in lacking
        ]

        def record(place: int, outcome: Outcome) -> None:
            rate, seed = lacking[place]
            found = outcome.measurement
            if outcome.error is not None:
                self.problems.append(f"{row.kind} {row.setting} at {rate:g}, seed {seed}: {outcome.reason}")
            else:
                run = Run(
                    **of,
                    learning_rate=rate,
                    seed=seed,
                    values={} if found is None else {m.name: found.values[m.name] for m in self.metrics},
                    test={} if found is None else self._test(found.test_per_example),
                    train_s=0.0 if found is None else round(found.train_s, 2),
                    failure=outcome.reason,
                )
                json_lines.append(self.path, {"run": asdict(run)})
            ended()

        self.evaluator.evaluate(requests, ended=record)

    def _test(self, scores: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
        """Return scores with whole numbers as such: they take half as many bytes."""
        return {
            metric.name: [int(score) if score == int(score) else score for score in scores[metric.name]]
            for metric in self.metrics
            if scores
        }

    def _cost(self, row: Row, architecture: Architecture) -> None:
        of = self._of(row, architecture)
        found = read(self.path).of(self.study, self.inputs).costs
        if any(costs.architecture == of["architecture"] for costs in found):
            return
        reference = Row(kind=REFERENCE, size=row.size, setting=settings_of(REFERENCE)[row.size])
        own, lora = (
            self.evaluator.costs(Candidate(architecture=one, training=self.training), MEASURED).values
            for one in (architecture, reference.place(self.evaluator.backbone))
        )
        costs = RowCosts(**of, costs=dict(own), lora={name: lora[name] for name in sorted(MEASURED)})
        json_lines.append(self.path, {"costs": asdict(costs)})

    def _of(self, row: Row, architecture: Architecture) -> dict[str, str]:
        return {
            "study": self.study,
            "inputs": self.inputs,
            "kind": row.kind,
            "size": row.size,
            "setting": str(row.setting),
            "architecture": architecture.key,
        }
