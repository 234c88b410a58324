"""The `train` evaluator: trains one candidate after the other on the frozen backbone and scores it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.backbones import LoadedBackbone
from autopeft.evaluators.base import Attaching, Costs, Outcome, OutOfMemoryError, Request, memory_errors
from autopeft.evaluators.costs.measurement import measure
from autopeft.evaluators.data.splits import SPLITS, Splits
from autopeft.evaluators.tasks import TASKS, Batch, Example, Scored
from autopeft.evaluators.training import batching
from autopeft.evaluators.training.schedule import rate
from autopeft.search_space.architecture import Candidate
from autopeft.search_space.metrics import ALWAYS, MetricError, Quality
from autopeft.search_space.metrics.base import standard_error
from autopeft.search_space.problem import Measurement, declared_costs
from autopeft.search_space.training import Training

EVALUATION_BATCH_SIZE = 64
#: Validation examples that are scored at a rung, about.
RUNG_EXAMPLES = 256
logger = logging.getLogger(__name__)


class TrainingFailedError(RuntimeError):
    """A candidate whose training went wrong for a reason of its own, as a diverged loss."""


class TrainEvaluator(Attaching):
    """Full or partial training by AdamW; see `Fidelity`.

    The frozen backbone stays in evaluation mode (no dropout of its own); a candidate that trains the backbone itself
    has the backbone's dropout. Minibatches depend on the seed and the batch size alone, so candidates of a seed see
    the same ones. One of which nothing is trained (a router without parameters between LoRAs that are given) makes the
    same steps without effect. `metrics`: the qualities to report. Raises DataError for rows that the model cannot read
    and MetricError for metrics that the task has no columns for.
    """

    name = "train"

    def __init__(
        self, loaded: LoadedBackbone, task: str, splits: Splits, max_length: int, metrics: Sequence[Quality] = ALWAYS
    ) -> None:
        self.model = loaded.model
        self.backbone = loaded.backbone
        self.pretrained_head = loaded.pretrained_head
        kind = TASKS[task].for_rows(splits.train)
        self.task = kind(loaded.processor, max_length, splits.labels, splits.domains)
        self.examples: dict[str, list[Example]] = {split: self.task.encode(getattr(splits, split)) for split in SPLITS}
        self.lengths = {split: list(map(self.task.length, rows)) for split, rows in self.examples.items()}
        self.task.check(self.model, chain.from_iterable(self.examples.values()))
        # Evenly over the file, whatever its order: enough to rank by the loss, few enough to cost little.
        held_out = len(self.examples["validation"])
        self.rung_examples = range(held_out)[:: max(1, held_out // RUNG_EXAMPLES)]
        self.device = next(self.model.parameters()).device
        self.metrics = tuple(metrics)
        for metric in self.metrics:
            if not metric.computable(self.task.columns):
                there = ", ".join(sorted(self.task.columns))
                raise MetricError(f"{metric.name} cannot be computed: the task {task} yields {there} of each example")

    def attach(self, request: Request) -> Attachment:
        return Attachment(
            self.model,
            self.backbone,
            [request.candidate.architecture],
            [request.seed],
            pretrained_head=self.pretrained_head,
        )

    def costs(self, candidate, measured=frozenset()):
        values = declared_costs(candidate.architecture, self.backbone)
        if not measured:
            return Costs(values=values)
        with memory_errors(), self.attach(Request(candidate=candidate)) as attachment:
            found = measure(attachment, self.task, self.typical_batch(candidate), measured)
        return Costs(values={**values, **found.values}, spread=found.spread)

    def typical_batch(self, candidate: Candidate) -> Batch:
        """A training batch of median length: the same one for every candidate of a batch size."""
        size = self.training(candidate).batch_size
        batches = batching.ordered_batches(self.lengths["train"], size)
        return self.batch("train", batches[len(batches) // 2])

    def longest_batch(self, candidate: Candidate) -> Batch:
        """A full training batch of the longest rows."""
        order = sorted(range(len(self.lengths["train"])), key=lambda i: self.lengths["train"][i])
        return self.batch("train", order[-self.training(candidate).batch_size :])

    def is_bare(self, candidate: Candidate) -> bool:
        """Whether it is the frozen model and nothing else."""
        return not candidate.architecture and not self.backbone.head_modules

    @staticmethod
    def training(candidate: Candidate) -> Training:
        return Training(**candidate.training)

    def num_steps(self, request):
        return steps_at(request.fidelity.share, self.full_steps(self.training(request.candidate)))

    def full_steps(self, training: Training) -> int:
        """Steps of a run at full fidelity."""
        return batching.num_steps(len(self.examples["train"]), training.batch_size, training.epochs)

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        batch = self.task.collate([self.examples[split][i] for i in indices])
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def evaluate(self, requests, progress=None, *, ended=None, select=None):
        if select is not None:
            raise ValueError(f"the {self.name!r} evaluator trains one candidate after the other: there is no selection")
        total = sum(self.num_steps(request) for request in requests)
        done = 0
        outcomes = []
        for index, request in enumerate(requests):
            start = done
            report = (lambda step, start=start: progress(start + step, total)) if progress else (lambda step: None)
            outcomes.append(self._evaluate(request, report))
            if ended is not None:
                ended(index, outcomes[-1])
            done += self.num_steps(request)
        return outcomes

    def _evaluate(self, request: Request, report: Callable[[int], None]) -> Outcome:
        try:
            if self.is_bare(request.candidate):
                raise TrainingFailedError("nothing to train: no adapter is on and the model has no task head")
            with memory_errors(), self.attach(request) as attachment:
                return self._train(request, attachment, report)
        except Exception as error:
            return failure(request, error)

    def _train(self, request: Request, attachment: Attachment, report: Callable[[int], None]) -> Outcome:
        begin = time.perf_counter()
        training = self.training(request.candidate)
        full, steps = self.full_steps(training), self.num_steps(request)
        rungs = {steps_at(rung, full): rung for rung in request.fidelity.rungs}
        record = Record(self.metrics)
        for step, seconds, loss in self._steps(request, attachment, training, steps, full):
            record.train_s += seconds
            record.losses.append(loss)
            report(step)
            if step in rungs and step < steps:
                (columns,) = self.columns(attachment, "validation", self.rung_examples)
                record.rung(rungs[step], columns)
        record.end(self.final_scores(attachment, [request.test])[0])
        record.wall_s = time.perf_counter() - begin
        weights = attachment.state() if request.keep_weights else None
        return Outcome(measurement=record.measurement(request, self.name), weights=weights)

    def _steps(
        self, request: Request, attachment: Attachment, training: Training, steps: int, full: int
    ) -> Iterator[tuple[int, float, float]]:
        """The first `steps` of `full` steps; yields step number, seconds and loss.

        Raises TrainingFailedError when the loss is not a number. Leaves the attachment in training mode between steps.
        """
        parameters = list(attachment.trainable())
        groups = decay_groups(parameters, training)
        optimizer = AdamW(groups, lr=training.learning_rate, fused=True) if groups else None
        order = batching.training_batches(self.lengths["train"], training.batch_size, request.seed)
        attachment.train()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(request.seed)  # a backbone that is trained itself draws its dropout here
            for step in range(1, steps + 1):
                start = time.perf_counter()
                loss = self.scores(attachment, "train", next(order))["loss"].mean(1)
                penalised = attachment.routers.penalised(loss).sum()
                if optimizer is not None:
                    penalised.backward()
                    if training.max_grad_norm:
                        clip_grad_norm_([p for p, _ in parameters], training.max_grad_norm)
                    for group in optimizer.param_groups:
                        group["lr"] = training.learning_rate * rate(step - 1, full, training)
                    optimizer.step()
                    optimizer.zero_grad()
                value = loss.item()
                if not math.isfinite(value):
                    raise TrainingFailedError(f"the training loss became {value} at step {step} of {steps}")
                yield step, time.perf_counter() - start, value

    # Not inference_mode: what a model keeps from one call to the next must be fit for the training that goes on.
    @torch.no_grad()
    def columns(self, attachment: Attachment, split: str, examples: Sequence[int] | None = None) -> list[Columns]:
        """For every slot, the task's columns of these examples of a split (default: all of them), in their order; a
        column [K, N, C] becomes lists of C numbers.
        """
        attachment.eval()
        attachment.routers.watch()
        chosen = range(len(self.examples[split])) if examples is None else examples
        lengths = [self.lengths[split][i] for i in chosen]
        widths: dict[str, int | None] = {}
        found = torch.zeros(0)
        for places in batching.ordered_batches(lengths, EVALUATION_BATCH_SIZE):
            scored = self.scores(attachment, split, [chosen[place] for place in places])
            if not widths:
                widths = {name: column.shape[2] if column.dim() == 3 else None for name, column in scored.items()}
                rows = sum(width or 1 for width in widths.values())
                found = torch.zeros(rows, attachment.num_slots, len(chosen))
            # A row [K, N] for each column, and of a column [K, N, C] one for each label.
            parts = [column.movedim(2, 0) if column.dim() == 3 else column[None] for column in scored.values()]
            # All at once: each way from a GPU waits for it. Indices of labels are whole in float32, too.
            found[:, :, places] = torch.cat([part.float() for part in parts]).cpu()
        attachment.train()
        return [_by_name(of_slot, widths) for of_slot in found.unbind(1)]

    def final_scores(self, attachment: Attachment, tested: Sequence[bool]) -> list[Scores]:
        """Of every slot; those that are `tested` on the test split and without routers too."""
        validation = self.columns(attachment, "validation")
        found = [Scores(validation=own, routes=attachment.routers.routes(k)) for k, own in enumerate(validation)]
        if any(tested):
            test, averaged = self.columns(attachment, "test"), self._averaged(attachment)
            for k in (k for k, wanted in enumerate(tested) if wanted):
                found[k].test, found[k].averaged = test[k], averaged[k]
        return found

    def _averaged(self, attachment: Attachment) -> list[Columns]:
        """For every slot, its validation columns without routers; nothing where there are none."""
        if not attachment.routers:
            return [{}] * attachment.num_slots
        with attachment.routers.averaged():
            columns = self.columns(attachment, "validation")
        return [
            own if any(spec.routed_by for _, spec in architecture) else {}
            for own, architecture in zip(columns, attachment.architectures, strict=True)
        ]

    def scores(self, attachment: Attachment, split: str, indices: Sequence[int]) -> Scored:
        """The task's columns of these examples, each [K, N] or [K, N, C]."""
        batch = self.batch(split, indices)
        attachment.routers.tokens.domains = batch.get("domains")
        return {name: column[None] for name, column in self.task.scores(self.model, batch).items()}


Columns = dict[str, list[Any]]


def _by_name(rows: Tensor, widths: Mapping[str, int | None]) -> Columns:
    """The columns of a slot by name: a row of [rows, N] each, or with a width so many rows as lists per example."""
    found: Columns = {}
    start = 0
    for name, width in widths.items():
        found[name] = rows[start].tolist() if width is None else rows[start : start + width].T.tolist()
        start += width or 1
    return found


@dataclass(slots=True)
class Scores:
    """Of a slot after its training: its columns, and what there is to say of mixtures (see `Measurement`)."""

    validation: Columns = field(default_factory=dict)
    test: Columns = field(default_factory=dict)
    routes: dict[str, Any] = field(default_factory=dict)
    averaged: Columns = field(default_factory=dict)


@dataclass(slots=True)
class Record:
    """What has been seen of a candidate's training; `metrics`: the qualities to find."""

    metrics: tuple[Quality, ...] = ALWAYS
    losses: list[float] = field(default_factory=list)
    rungs: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    scores: Scores = field(default_factory=Scores)
    train_s: float = 0.0
    wall_s: float = 0.0

    def rung(self, share: float, columns: Columns) -> None:
        """Raises TrainingFailedError for a loss that is not a number, and MetricError."""
        self.rungs.append((share, self._values(finite(columns))))

    def end(self, scores: Scores) -> None:
        """Raises TrainingFailedError for a loss that is not a number."""
        for columns in (scores.validation, scores.test):
            if columns:
                finite(columns)
        self.scores = scores

    def measurement(self, request: Request, evaluator: str) -> Measurement:
        """Raises IndexError for a training that ended before its first rung, and MetricError."""
        scores = self.scores
        # One that ended at a rung has that rung's values.
        share, values = self.rungs[-1] if not scores.validation else (request.fidelity.share, {})
        contributions = self._contributions(scores.validation)
        return Measurement(
            values=values or self._values(scores.validation),
            std_err={metric.name: standard_error(column) for metric, column in contributions},
            seed=request.seed,
            share=share,
            evaluator=evaluator,
            wall_s=self.wall_s,
            train_s=self.train_s,
            losses=tuple(round(loss, 5) for loss in self.losses),
            rungs=tuple(self.rungs),
            per_example={metric.name: _rounded(column, metric.digits) for metric, column in contributions},
            routes=scores.routes,
            averaged=self._values(scores.averaged),
            test=self._values(scores.test),
            test_per_example={
                metric.name: _rounded(column, metric.digits) for metric, column in self._contributions(scores.test)
            },
        )

    def _values(self, columns: Columns) -> dict[str, float]:
        return {metric.name: metric.value(columns) for metric in self.metrics} if columns else {}

    def _contributions(self, columns: Columns) -> list[tuple[Quality, Sequence[float]]]:
        return [(metric, metric.contributions(columns)) for metric in self.metrics] if columns else []


def failure(request: Request, error: Exception) -> Outcome:
    """The outcome of a candidate that broke: it must not take the others along."""
    if isinstance(error, OutOfMemoryError):
        return Outcome(failure="infeasible", reason=str(error))
    if isinstance(error, TrainingFailedError | MetricError):
        return Outcome(failure="failed", reason=str(error))
    logger.debug("candidate %s", request.candidate.key, exc_info=error)
    return Outcome(failure="failed", reason=f"{type(error).__name__}: {error}")


def finite(columns: Columns) -> Columns:
    """Raises TrainingFailedError for a loss that is not a number."""
    if not all(map(math.isfinite, columns["loss"])):
        raise TrainingFailedError("the held-out loss is not a number")
    return columns


def steps_at(share: float, full: int) -> int:
    """Steps that are a share of the full run: rounded up, at least one."""
    return max(1, math.ceil(round(share * full, 6)))  # 0.07 x 100 is a little more than 7 in binary


def decay_groups(parameters: Sequence[tuple[nn.Parameter, bool]], training: Training) -> list[dict[str, Any]]:
    """AdamW's groups of parameters: those with weight decay and those without, as far as there are any."""
    groups = [
        {"params": [p for p, decay in parameters if decay], "weight_decay": training.weight_decay},
        {"params": [p for p, decay in parameters if not decay], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _rounded(column: Sequence[float], digits: int) -> tuple[float, ...]:
    return tuple(round(x, digits) for x in column)
