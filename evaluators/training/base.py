"""The common base of the evaluators that train: the model with its rows, batches, costs and scores."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from autopeft.evaluators import contents
from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.checkpointing import saving_memory
from autopeft.evaluators.attachment.layout import unpackable_sites
from autopeft.evaluators.backbones import LoadedBackbone
from autopeft.evaluators.base import AttachingEvaluator, Costs, Request, memory_errors
from autopeft.evaluators.costs.measurement import StepTimes, measure, step_times
from autopeft.evaluators.costs.pack_plans import divisible
from autopeft.evaluators.costs.pack_sizing import WITHOUT_LEVERS, Levers
from autopeft.evaluators.data.encoding import encode_splits
from autopeft.evaluators.data.splits import RETAINED, Splits
from autopeft.evaluators.forgetting import Forgetting
from autopeft.evaluators.harness.requests import requests_of
from autopeft.evaluators.site_statistics import SiteStatistics, batches_of
from autopeft.evaluators.tasks import TASKS, Batch, Example, Scored, model_inputs
from autopeft.evaluators.texts import Generation, Texts
from autopeft.evaluators.training import batching
from autopeft.evaluators.training.micro_batches import add_gradients
from autopeft.evaluators.training.record import Scores
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.metrics import ALWAYS, FORGETTING, ByDomain, Columns, MetricError, OfTexts, Quality
from autopeft.search_space.metrics.base import DOMAIN, OnOwnRows
from autopeft.search_space.problem import declared_costs
from autopeft.search_space.runtime.factors import Starts
from autopeft.search_space.training import Training

EVALUATION_BATCH_SIZE = 64
#: Positions of the two rows of a small batch, at most. The second one is the longer one, if there are such rows, and
#: rows of different lengths stay so.
SMALL_LENGTHS = (12, 16)
#: Share of the time for measuring a pace that goes to generated texts, if there are any.
TEXTS_SHARE = 0.4
#: All examples.
WHOLE = slice(None)
GREEDY = Generation()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatorOptions:
    """Settings of evaluators that change their speed and, except for `generation`, not their results.

    `pack`: candidates per pack, None for as many as fit into the memory. `cache_bytes`: memory for cached outputs of
    the layers below all adapters, 0 for no cache. `cache_folder`: folder for the same on disk, limited to
    `cache_folder_bytes`. `micro_batch`: rows at a time, None for as many as fit. `checkpointing`: of the layers, None
    for where a step does not fit without. `generation`: of the texts that metrics read.
    """

    pack: int | None = None
    cache_bytes: int = 0
    cache_folder: Path | None = None
    cache_folder_bytes: int = 0
    micro_batch: int | None = None
    checkpointing: bool | None = None
    generation: Generation = GREEDY

    @property
    def levers(self) -> Levers:
        """The levers that are set."""
        return Levers(self.micro_batch, bool(self.checkpointing))


class TrainingEvaluator(AttachingEvaluator):
    """Full or partial training by AdamW; see `Fidelity`.

    The frozen backbone stays in evaluation mode, without its own dropout; a candidate that trains the backbone itself
    uses the backbone's dropout. Minibatches depend only on the seed and the batch size, so candidates with the same
    seed and batch size see the same ones. A candidate without trained tensors (a router without parameters over
    pretrained LoRAs) makes the same steps without effect.

    `metrics`: the qualities to report. `levers`: how candidates that are trained alone save memory; those whose
    minibatches cannot be divided see them whole. `generation`: of the texts that metrics read. Raises DataError for
    rows that the model cannot read, MetricError for metrics whose columns the task does not compute, and
    MissingPackageError for metrics.
    """

    def __init__(
        self,
        loaded: LoadedBackbone,
        task: str,
        splits: Splits,
        max_length: int,
        metrics: Sequence[Quality] = ALWAYS,
        *,
        levers: Levers = WITHOUT_LEVERS,
        generation: Generation = GREEDY,
    ) -> None:
        self.loaded = loaded
        self.levers = levers
        self.model = loaded.model
        self.backbone = loaded.backbone
        self.pretrained_head = loaded.pretrained_head
        kind = TASKS[task].for_rows(splits.train)
        self.task = kind(loaded.processor, max_length, splits.labels, splits.domains)
        self.examples: dict[str, list[Example]] = {**encode_splits(self.task, splits, self.model).examples}
        #: What metrics ask of the model that are tasks of lm-eval.
        self.requests = requests_of(splits, metrics, self.task, self.model)
        for requests in self.requests:
            self.examples |= requests.examples
        self.lengths = {split: list(map(self.task.length, rows)) for split, rows in self.examples.items()}
        self.rung_examples: Sequence[int] = batching.rung_examples(len(self.examples["validation"]))
        self.device = next(self.model.parameters()).device
        batches = batches_of(len(self.examples["train"]))
        #: Initial values of factors that follow from the frozen weights and from training rows.
        self.starts = Starts(
            SiteStatistics(
                self.model,
                self.backbone,
                self.task,
                lambda: (self.batch("train", rows) for rows in batches),
                lambda architecture, seed: self.attached([architecture], [str(seed)]),
            )
        )
        self.metrics = tuple(metrics)
        if any(isinstance(metric, ByDomain) for metric in self.metrics):
            domains = [example.get("domain", 0) for example in self.examples["validation"]]
            self.rung_examples = batching.rung_examples_of_domains(domains)
        #: The losses that `forgetting` compares with; None without this metric.
        wanted = FORGETTING in self.metrics
        self.forgetting = Forgetting(loaded, self.task, self.lengths, self.batch) if wanted else None
        readable = self.task.readable() | ({DOMAIN} if self.task.domains else set())
        for metric in self.metrics:
            if not isinstance(metric, OnOwnRows) and not metric.computable(readable):
                there = ", ".join(sorted(readable))
                raise MetricError(f"{metric.name} cannot be computed: the task {task} only has the columns {there}")
        of_texts = [metric for metric in dict.fromkeys(m.whole for m in self.metrics) if isinstance(metric, OfTexts)]
        self.generation = generation
        #: The texts that metrics read; None without such a metric.
        self.texts = Texts(self.model, self.task, splits, self.examples, of_texts, generation) if of_texts else None

    @classmethod
    def of(
        cls,
        loaded: LoadedBackbone,
        task: str,
        splits: Splits,
        max_length: int,
        metrics: Sequence[Quality],
        options: EvaluatorOptions,
    ) -> Self:
        """Build the evaluator with the options that it supports. Raises DataError and MetricError."""
        return cls(loaded, task, splits, max_length, metrics, levers=options.levers, generation=options.generation)

    @override
    def attach(self, request: Request) -> Attachment:
        return self.attached([request.candidate.architecture], [request.seed])

    def attached(self, architectures: Sequence[Architecture], seeds: Sequence[int] | Sequence[str]) -> Attachment:
        """Return a context manager that attaches adapters side by side, a slot for each architecture."""
        head, starts = self.pretrained_head, self.starts
        return Attachment(self.model, self.backbone, architectures, seeds, pretrained_head=head, starts=starts)

    @override
    def costs(self, candidate: Candidate, measured: frozenset[str] = frozenset()) -> Costs:
        values = declared_costs(candidate.architecture, self.backbone)
        if not measured:
            return Costs(values=values)
        with memory_errors(), self.attach(Request(candidate=candidate)) as attachment:
            found = measure(attachment, self.task, self.typical_batch(candidate), measured)
        return Costs(values={**values, **found.values}, spread=found.spread)

    def pace(self, candidate: Candidate, within_s: float) -> StepTimes:
        """Measure a training step, as the candidate's trainings make it, scores and texts; see `step_times`."""
        levers = self.levers_of(candidate)
        asking = [requests for requests in self.requests if requests.generates]
        generating = (self.texts is not None) + len(asking)
        steps_s = (1 - TEXTS_SHARE) * within_s if generating else within_s
        batch = self.typical_batch(candidate)
        with (
            memory_errors(),
            self.attach(Request(candidate=candidate)) as attachment,
            saving_memory(attachment, levers.checkpointing),
        ):
            found = step_times(attachment, self.task, batch, steps_s, levers.rows)
            if not generating:
                return found
            rest = self.evaluation_batch_size(levers, len(batch["targets"])), (within_s - steps_s) / generating
            text_s = 0.0 if self.texts is None else self.texts.seconds(attachment, *rest)
            answer_s = {each.name: each.seconds(attachment, *rest) for each in asking}
            return replace(found, text_s=text_s, answer_s=answer_s)

    def levers_of(self, candidate: Candidate) -> Levers:
        """Return how the trainings of a candidate save memory."""
        if self.levers.rows is None or divisible(candidate.architecture, self.unpackable):
            return self.levers
        return replace(self.levers, rows=None)

    @cached_property
    def unpackable(self) -> frozenset[str]:
        """Names of the sites whose modules read more than the examples; see `unpackable_sites`."""
        return unpackable_sites(self.model, self.backbone, model_inputs(self.small_batch()[0]))

    def typical_batch(self, candidate: Candidate) -> Batch:
        """Return a training batch of median length; it depends only on the candidate's batch size."""
        size = self.training(candidate).batch_size
        batches = batching.ordered_batches(self.lengths["train"], size)
        return self.batch("train", batches[len(batches) // 2])

    def small_batch(self) -> tuple[Batch, list[int]]:
        """Return a batch of two short training rows of different lengths, if there are any, and their lengths.

        Long rows are cut: what it tests of a model does not depend on them, but takes a pass for each of its layers.
        """
        rows = batching.short_rows(self.lengths["train"])
        examples = [self.examples["train"][row] for row in rows]
        short = [self.task.shortened(one, most) for one, most in zip(examples, SMALL_LENGTHS, strict=False)]
        return self._collated(short), list(map(self.task.length, short))

    @override
    def longest_batch(self, candidate: Candidate) -> Batch:
        order = sorted(range(len(self.lengths["train"])), key=lambda i: self.lengths["train"][i])
        return self.batch("train", order[-self.training(candidate).batch_size :])

    def contents(self) -> dict[str, str]:
        """Return digests of the encoded rows and of the weights, before any training."""
        return {"encoding": contents.of_examples(self.task, self.examples), "weights": self.loaded.weights()}

    def is_bare(self, candidate: Candidate) -> bool:
        """Return whether the candidate is the frozen model without adapters and without a task head."""
        return not candidate.architecture and not self.backbone.head_modules

    def is_packable(self, candidate: Candidate) -> bool:
        """Return whether the candidate trains something, and not the backbone itself, which others share."""
        return not self.is_bare(candidate) and "full" not in candidate.architecture.kinds

    @staticmethod
    def training(candidate: Candidate) -> Training:
        """Return the training settings of a candidate."""
        return Training(**candidate.training)

    def prepare(self, requests: Sequence[Request]) -> None:
        """Measure what trainings are compared with, while the model has no adapters."""
        if self.forgetting is not None:
            self.forgetting.measure(tested=any(request.test for request in requests))

    @override
    def num_steps(self, request: Request) -> int:
        return steps_at(request.fidelity.share, self.full_steps(self.training(request.candidate)))

    def full_steps(self, training: Training) -> int:
        """Return the number of steps of a run at full fidelity."""
        return batching.num_steps(len(self.examples["train"]), training.batch_size, training.epochs)

    def batch(self, split: str, indices: Sequence[int], part: slice = WHOLE) -> Batch:
        """Return these examples of a split, or a part of them, as one batch on the device."""
        return self._collated([self.examples[split][i] for i in indices], part)

    def _collated(self, examples: Sequence[Example], part: slice = WHOLE) -> Batch:
        return {name: tensor[part].to(self.device) for name, tensor in self.task.collate(examples).items()}

    @staticmethod
    def evaluation_batch_size(levers: Levers, batch_size: int) -> int:
        """Return the examples that are scored at a time: with levers, no more than a step has at a time.

        An example takes less memory then than in training, where a layer keeps activations for the backward pass.
        """
        if levers == WITHOUT_LEVERS:
            return EVALUATION_BATCH_SIZE
        return min(EVALUATION_BATCH_SIZE, levers.rows or batch_size)

    # Not inference_mode: tensors that a model caches between calls must work in the training that follows.
    @torch.no_grad()
    def columns(
        self,
        attachment: Attachment,
        split: str,
        examples: Sequence[int] | None = None,
        batch_size: int = EVALUATION_BATCH_SIZE,
    ) -> list[Columns]:
        """Return, for every slot, the task's columns over these examples of a split (default: all), in their order.

        An entry of a column [K, N, C] is a list of C numbers.
        """
        attachment.eval()
        attachment.routers.watch()
        chosen = range(len(self.examples[split])) if examples is None else examples
        lengths = [self.lengths[split][i] for i in chosen]
        widths: dict[str, int | None] = {}
        found = torch.zeros(0)
        for places in batching.ordered_batches(lengths, batch_size):
            scored = self.scores(attachment, split, [chosen[place] for place in places])
            if not widths:
                widths = {name: column.shape[2] if column.dim() == 3 else None for name, column in scored.items()}
                rows = sum(width or 1 for width in widths.values())
                found = torch.zeros(rows, attachment.num_slots, len(chosen))
            # One row [K, N] per column, or one per label for a column [K, N, C].
            parts = [column.movedim(2, 0) if column.dim() == 3 else column[None] for column in scored.values()]
            # One transfer, because each transfer from a GPU waits for it. Label indices are exact in float32.
            found[:, :, places] = torch.cat([part.float() for part in parts]).cpu()
        attachment.train()
        domains = self._domains(split, chosen)
        return [{**_by_name(of_slot, widths), **domains} for of_slot in found.unbind(1)]

    def _domains(self, split: str, examples: Sequence[int]) -> Columns:
        """Return the column of the domains of examples by name; nothing where rows have none."""
        if not self.task.domains:
            return {}
        return {DOMAIN: [self.task.domains[self.examples[split][i]["domain"]] for i in examples]}

    def all_columns(
        self,
        attachment: Attachment,
        split: str,
        examples: Sequence[int] | None = None,
        batch_size: int = EVALUATION_BATCH_SIZE,
    ) -> list[Columns]:
        """Return the columns with those of the texts that every slot generates, of what it forgets and of documents.

        They are there where a metric reads them. With `examples`, as at a rung, what it forgets is of a part of the
        retained rows, too, and other tasks are of a part of their documents.
        """
        more: list[list[Columns]] = []
        if self.forgetting is not None:  # first: what routers did last is reported, on the task's own rows
            retained = RETAINED[split]
            rows = None if examples is None else batching.rung_examples(len(self.examples[retained]))
            trained = self.columns(attachment, retained, rows, batch_size)
            more.append([self.forgetting.column(retained, after, rows) for after in trained])
        for requests in self.requests:
            count = len(requests.parts[split])
            chosen = range(count) if examples is None else batching.rung_examples(count)
            more.append(requests.columns(self.columns, attachment, split, chosen, batch_size))
        columns = self.columns(attachment, split, examples, batch_size)
        if self.texts is not None:
            more.append(self.texts.columns(attachment, split, examples, batch_size))
        slots = zip(columns, *more, strict=True)
        return [{name: column for part in parts for name, column in part.items()} for parts in slots]

    def final_scores(
        self, attachment: Attachment, tested: Sequence[bool], batch_size: int = EVALUATION_BATCH_SIZE
    ) -> list[Scores]:
        """Return the scores of every slot; `tested` slots also on the test split and with averaged experts."""
        validation = self.all_columns(attachment, "validation", batch_size=batch_size)
        found = [Scores(validation=own, routes=attachment.routers.routes(k)) for k, own in enumerate(validation)]
        if any(tested):
            test = self.all_columns(attachment, "test", batch_size=batch_size)
            averaged = self._averaged(attachment, batch_size)
            for k in (k for k, wanted in enumerate(tested) if wanted):
                found[k].test, found[k].averaged = test[k], averaged[k]
        return found

    def _averaged(self, attachment: Attachment, batch_size: int) -> list[Columns]:
        """Return every slot's validation columns with equally weighted experts; empty for slots without routers."""
        if not attachment.routers:
            return [{}] * attachment.num_slots
        with attachment.routers.averaged():
            columns = self.all_columns(attachment, "validation", batch_size=batch_size)
        return [
            own if any(spec.routed_by for _, spec in architecture) else {}
            for own, architecture in zip(columns, attachment.architectures, strict=True)
        ]

    @abstractmethod
    def scores(self, attachment: Attachment, split: str, indices: Sequence[int], part: slice = WHOLE) -> Scored:
        """Return the task's columns over these examples of a split, each [K, N] or [K, N, C].

        K slots, N examples, C labels. With `part`, only over that part of the examples, padded as the whole of them.
        """

    def step_gradients(
        self, attachment: Attachment, indices: Sequence[int], rows: int | None, backward: bool = True
    ) -> Tensor:
        """Add the gradients of the slots' losses on a minibatch; return the losses [K]; see `add_gradients`."""

        def losses(part: slice) -> Tensor:
            return self.scores(attachment, "train", indices, part)["loss"]

        return add_gradients(losses, attachment, len(indices), rows, backward)


def _by_name(rows: Tensor, widths: Mapping[str, int | None]) -> Columns:
    """Return a slot's columns by name from [rows, N]: one row per column, or C rows for a column of width C."""
    columns: dict[str, list[Any]] = {}
    start = 0
    for name, width in widths.items():
        columns[name] = rows[start].tolist() if width is None else rows[start : start + width].T.tolist()
        start += width or 1
    return columns


def steps_at(share: float, full: int) -> int:
    """Return the number of steps in a share of the full run, rounded up and at least 1."""
    return max(1, math.ceil(round(share * full, 6)))  # 0.07 x 100 is a little more than 7 in binary
