"""The `packed` evaluator: candidates of all types, ranks and sites train side by side on one frozen backbone.

Notation: K slots, one per candidate of a pack; N examples of a minibatch, the same for every slot.

A pack consists of candidates at the same step of the same order of minibatches and, on a CPU, with the same number of
layers below their lowest adapters. It trains until the first of them reaches a rung or its end. Then all candidates are
detached, and the others form the next packs: no slot waits for another candidate. Between two packs, `SlotState`
holds a candidate's tensors, moments and random streams, so packs change results only by the order of a few sums.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import compress, islice
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.checkpointing import saving_memory
from autopeft.evaluators.attachment.layout import repeated
from autopeft.evaluators.attachment.moves import Moves
from autopeft.evaluators.backbones import LoadedBackbone
from autopeft.evaluators.base import OnOutcome, Outcome, OutOfMemoryError, Progress, Request, Select, memory_errors
from autopeft.evaluators.costs.pack_plans import PackPlans
from autopeft.evaluators.costs.pack_sizing import Levers, PackPlan, keep_freed_memory
from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.tasks import Batch, Scored, model_inputs
from autopeft.evaluators.texts import Generation
from autopeft.evaluators.training import activations, batching
from autopeft.evaluators.training.activations import ActivationCache, Activations
from autopeft.evaluators.training.base import (
    EVALUATION_BATCH_SIZE,
    GREEDY,
    WHOLE,
    EvaluatorOptions,
    TrainingEvaluator,
    steps_at,
)
from autopeft.evaluators.training.lower_layers import LowerLayers
from autopeft.evaluators.training.optimizer import PackedAdamW
from autopeft.evaluators.training.record import Record, Scores, TrainingFailedError, failure
from autopeft.evaluators.training.schedule import rate
from autopeft.evaluators.training.slot_state import Run, SlotState
from autopeft.evaluators.training.train import train_alone
from autopeft.search_space.architecture import Candidate, digest
from autopeft.search_space.metrics import ALWAYS, MetricError, Quality

logger = logging.getLogger(__name__)

#: Steps between checks of the losses on a GPU, because each check waits for the device.
STEPS_BETWEEN_CHECKS = 16


class PackedEvaluator(TrainingEvaluator):
    """Trains several candidates at a time, on the same minibatches as `TrainEvaluator`.

    `pack`: candidates per pack, None for as many as fit into the memory. `micro_batch`: rows at a time, and
    `checkpointing` of the layers, each None for as needed to fit. `share_lower_layers`: run the layers below the lowest
    adapter of a pack once for all slots, if the model permits it (`notes` says if not). `cache`: cache of their
    outputs; None: they are computed at each step. Candidates that train the backbone itself are trained alone, without
    stops at rungs.
    """

    name = "packed"

    def __init__(
        self,
        loaded: LoadedBackbone,
        task: str,
        splits: Splits,
        max_length: int,
        metrics: Sequence[Quality] = ALWAYS,
        *,
        pack: int | None = None,
        share_lower_layers: bool = True,
        cache: ActivationCache | None = None,
        micro_batch: int | None = None,
        checkpointing: bool | None = None,
        generation: Generation = GREEDY,
    ) -> None:
        levers = Levers(micro_batch, bool(checkpointing))
        super().__init__(loaded, task, splits, max_length, metrics, levers=levers, generation=generation)
        self.pack = pack
        self.cache = cache
        if self.unpackable:
            roles = ", ".join(dict.fromkeys(s.role for s in self.backbone.sites if s.name in self.unpackable))
            self.notes += (
                f"candidates with adapters at {roles} are trained one after the other, because these modules read more"
                " than the examples: trainings take longer, with the same results",
            )
        self.lower_layers: LowerLayers | None = None
        if share_lower_layers:
            self.lower_layers, notes = LowerLayers.of(self, *self.small_batch())
            self.notes += notes
        caches = self.lower_layers is not None and cache is not None
        self._model_key = activations.fingerprint(self.model, self.backbone) if caches else ""
        self._dtype = next(self.model.parameters()).dtype
        self._token_keys: dict[str, str] = {}
        self.plans = PackPlans(self, max(self.lengths["train"]), self.unpackable, pack, micro_batch, checkpointing)
        # One candidate keeps a CPU busy, so on a CPU only the shared layers make a pack worthwhile.
        self.mixes_depths = self.device.type != "cpu"
        if self.device.type == "cpu":
            keep_freed_memory()

    @classmethod
    @override
    def of(
        cls,
        loaded: LoadedBackbone,
        task: str,
        splits: Splits,
        max_length: int,
        metrics: Sequence[Quality],
        options: EvaluatorOptions,
    ) -> Self:
        cache = None
        if options.cache_bytes:
            cache = ActivationCache(options.cache_bytes, options.cache_folder, options.cache_folder_bytes)
        own: dict[str, Any] = {name: getattr(options, name) for name in ("micro_batch", "checkpointing", "generation")}
        return cls(loaded, task, splits, max_length, metrics, pack=options.pack, cache=cache, **own)

    @override
    def evaluate(
        self,
        requests: Sequence[Request],
        progress: Progress | None = None,
        *,
        ended: OnOutcome | None = None,
        select: Select | None = None,
    ) -> list[Outcome]:
        if select is not None and len({request.fidelity for request in requests}) > 1:
            raise ValueError("selection at rungs requires that all candidates have the same fidelity")
        self.prepare(requests)
        all_columns = self.generation.at_rungs or select is not None
        runs = [self._run(index, request, all_columns) for index, request in enumerate(requests)]
        total = sum(run.num_steps for run in runs)

        def report(steps_ahead: int = 0) -> None:
            if progress is not None:
                done = sum(run.num_steps if run.outcome else run.step for run in runs)
                progress(min(done + steps_ahead, total), total)

        def end(run: Run, outcome: Outcome) -> None:
            run.outcome = outcome
            run.state = None
            report()
            if ended is not None:
                ended(run.index, outcome)

        for run in runs:
            if not self.is_packable(run.request.candidate):
                end(run, train_alone(self, run.request, report))
        while alive := [run for run in runs if run.outcome is None]:
            # The least trained come first: no candidate passes a rung before all have reached it.
            share = min(run.share for run in alive)
            here = [run for run in alive if run.share == share]
            self._train_to(share, here, report, end)
            if select is None:
                continue
            reached = [run for run in here if run.outcome is None]
            going_on = set(select(share, [(run.index, run.record.rungs[-1][1]) for run in reached])) if reached else ()
            for run in reached:
                if run.index not in going_on:
                    end(run, Outcome(measurement=run.record.measurement(run.request, self.name)))
        return [run.outcome for run in runs if run.outcome is not None]

    def _run(self, index: int, request: Request, all_columns: bool) -> Run:
        training = self.training(request.candidate)
        full, end = self.full_steps(training), self.num_steps(request)
        rungs = [(steps_at(rung, full), rung) for rung in request.fidelity.rungs]
        return Run(
            index=index,
            request=request,
            training=training,
            full=full,
            record=Record(self.metrics),
            depth=request.candidate.architecture.lowest_layer(self.backbone) if self.lower_layers else 0,
            alone=any(site in self.unpackable for site, _ in request.candidate.architecture),
            stops=(*(stop for stop in rungs if stop[0] < end), (end, request.fidelity.share)),
            all_columns=all_columns,
        )

    # Packs

    def _train_to(
        self, share: float, runs: Sequence[Run], report: Callable[[int], None], end: Callable[[Run, Outcome], None]
    ) -> None:
        """Train until each of `runs` has passed its stop at `share` or has failed."""
        # Candidates with the same depth go together, because they share the most layers.
        waiting = sorted(runs, key=lambda run: (-run.depth, run.index))
        while waiting:
            alike = [run for run in waiting if self._fit_together(run, waiting[0])]
            plan, able = self.plans.choose(*_of(alike))
            pack = [*compress(alike, able)][: plan.slots]
            self._train_pack(pack, plan.levers, report, end)
            rest = [run for run in waiting if run not in pack]
            # They go to the front, to fill the next pack with similar candidates.
            waiting = [run for run in pack if run.outcome is None and run.share == share] + rest

    def _fit_together(self, a: Run, b: Run) -> bool:
        alike = a.order == b.order and (a.depth == b.depth or self.mixes_depths)
        return a is b or (alike and not a.alone and not b.alone)

    @override
    def notes_on(self, largest: Candidate) -> tuple[str, ...]:
        note = self.plans.note(Request(candidate=largest)) if self.is_packable(largest) else None
        return (*self.notes, note) if note else self.notes

    @override
    def levers_of(self, candidate: Candidate) -> Levers:
        own = super().levers_of(candidate)
        return self.plans.levers_of(Request(candidate=candidate)) if self.is_packable(candidate) else own

    def _train_pack(
        self, pack: Sequence[Run], levers: Levers, report: Callable[[int], None], end: Callable[[Run, Outcome], None]
    ) -> None:
        """Like `_train_slots`, but an error ends only the candidate that causes it."""
        try:
            with memory_errors():
                ended = self._train_slots(pack, levers, report)
        except Exception as error:
            # The runs are unchanged: they train in other ways, or one by one.
            plan = PackPlan(1, levers) if len(pack) > 1 else None
            if isinstance(error, OutOfMemoryError):
                plan = self.plans.after_lack(*_of(pack), levers)
            if plan is None:
                ended = [(pack[0], failure(pack[0].request, error))]
            else:
                if plan.levers != levers:
                    logger.warning("%s: going on with %s", error, plan.levers)
                for start in range(0, len(pack), plan.slots):
                    self._train_pack(pack[start : start + plan.slots], plan.levers, report, end)
                return
        for run, outcome in ended:
            end(run, outcome)

    def _train_slots(
        self, pack: Sequence[Run], levers: Levers, report: Callable[[int], None]
    ) -> list[tuple[Run, Outcome]]:
        """Train a pack to the first stop of its runs, or to the step at which a loss is not finite.

        Return the runs that ended. An exception leaves the runs unchanged.
        """
        begin = time.perf_counter()
        first, last = pack[0].step, min(run.stop for run in pack)
        architectures = [run.request.candidate.architecture for run in pack]
        seeds = [run.request.seed for run in pack]
        with (
            self.attached(architectures, seeds) as attachment,
            saving_memory(attachment, levers.checkpointing),
        ):
            optimizer = PackedAdamW(attachment, [run.training for run in pack])
            for k, run in enumerate(pack):
                if run.state is not None:
                    run.state.restore(attachment, optimizer, k)
            losses = self._steps_of(pack, attachment, optimizer, last, report, levers.rows)
            train_s = time.perf_counter() - begin
            step = first + len(losses)
            broken = {k: n for n, row in reversed([*enumerate(losses, first + 1)]) for k in _not_finite(row)}
            stopped = [k for k, run in enumerate(pack) if run.stop == step and k not in broken]
            at_a_time = self.evaluation_batch_size(levers, pack[0].training.batch_size)
            scored = self._score(pack, stopped, attachment, at_a_time)
            going_on = [k for k, run in enumerate(pack) if step < run.num_steps and k not in broken]
            states = {k: SlotState.capture(attachment, optimizer, k) for k in going_on}
            weights = {k: attachment.state(k) for k in stopped if pack[k].request.keep_weights}
        wall_s = time.perf_counter() - begin

        ended: list[tuple[Run, Outcome]] = []
        for k, run in enumerate(pack):
            run.step, run.state = step, states.get(k)
            run.record.losses += [column[k] for column in losses]
            run.record.train_s += train_s / len(pack)
            run.record.wall_s += wall_s / len(pack)
            try:
                if k in broken:
                    loss, steps = losses[broken[k] - first - 1][k], run.num_steps
                    raise TrainingFailedError(f"the training loss became {loss} at step {broken[k]} of {steps}")
                if (scores := scored.get(k)) is None:
                    continue
                if step < run.num_steps:
                    run.record.rung(run.share, scores.validation)
                    run.passed += 1
                    continue
                run.record.end(scores)
                measurement = run.record.measurement(run.request, self.name)
                ended.append((run, Outcome(measurement=measurement, weights=weights.get(k))))
            except (TrainingFailedError, MetricError) as error:
                ended.append((run, failure(run.request, error)))
        return ended

    def _steps_of(
        self,
        pack: Sequence[Run],
        attachment: Attachment,
        optimizer: PackedAdamW,
        last: int,
        report: Callable[[int], None],
        rows: int | None = None,
    ) -> list[list[float]]:
        """Train up to step `last` or to a loss that is not finite; return the losses of the slots at each step.

        `rows`: see `add_gradients`.
        """
        seed, batch_size, first = pack[0].order
        numbers = range(first + 1, last + 1)
        rates = torch.tensor(
            [[run.training.learning_rate * rate(n - 1, run.full, run.training) for run in pack] for n in numbers],
            device=self.device,
        )
        order = batching.training_batches(self.lengths["train"], batch_size, seed)
        interval = 1 if self.device.type == "cpu" else STEPS_BETWEEN_CHECKS
        moves = Moves(attachment, [run.full for run in pack], optimizer.moments)
        losses: list[list[float]] = []
        unchecked: list[Tensor] = []
        for number, indices, now in zip(moves.watching(numbers), islice(order, first, None), rates, strict=False):
            unchecked.append(self.step_gradients(attachment, indices, rows, backward=not optimizer.idle))
            if not optimizer.idle:
                optimizer.step(number, now)
                moves.make(number)
            if len(unchecked) == interval or number == last:
                losses += torch.stack(unchecked).tolist()
                unchecked.clear()
                report((number - first) * len(pack))
                if any(map(_not_finite, losses[-interval:])):
                    break
        return losses

    # Scores

    def _score(
        self, pack: Sequence[Run], slots: Sequence[int], attachment: Attachment, batch_size: int
    ) -> dict[int, Scores]:
        """Return the scores of the slots that reached a stop, from `batch_size` examples at a time."""
        ending = [k for k in slots if pack[k].stop == pack[k].num_steps]
        found: dict[int, Scores] = {}
        if len(ending) < len(slots):
            score = self.all_columns if pack[0].all_columns else self.columns
            columns = score(attachment, "validation", self.rung_examples, batch_size)
            found |= {k: Scores(validation=columns[k]) for k in slots}
        if ending:
            tested = [k in ending and run.request.test for k, run in enumerate(pack)]
            scores = self.final_scores(attachment, tested, batch_size)
            found |= {k: scores[k] for k in ending}
        return found

    @override
    def scores(self, attachment: Attachment, split: str, indices: Sequence[int], part: slice = WHOLE) -> Scored:
        slots, depth = attachment.num_slots, attachment.depth
        batch = self.batch(split, indices, part)
        attachment.routers.tokens.domains = batch.get("domains")
        lower: AbstractContextManager[None] = nullcontext()
        if self.lower_layers is not None and depth:
            hidden = self._hidden(self.lower_layers, split, indices, part, batch, depth)
            lower = self.lower_layers.replaced(repeated(hidden, slots), depth)
        with lower:
            packed = {name: repeated(tensor, slots) for name, tensor in batch.items()}
            columns = self.task.scores(self.model, packed)
        return {name: column.view(slots, -1, *column.shape[1:]) for name, column in columns.items()}

    def _hidden(
        self, lower: LowerLayers, split: str, indices: Sequence[int], part: slice, batch: Batch, depth: int
    ) -> Tensor:
        """Return the output of the lowest `depth` layers for a part of these examples, `batch`: [N, T, D]."""
        lengths = self.lengths[split]
        nbytes = (1 + sum(lengths)) * self.backbone.hidden_size * self._dtype.itemsize
        if self.cache is None or nbytes > self.cache.max_bytes:
            return lower(model_inputs(batch), depth)
        key = digest([self._model_key, self._token_key(split), depth])
        rows = self.cache.get(key, lambda: self._all_rows(lower, split, depth), self.device)
        return Activations(rows, lengths).batch(indices)[part]  # padded as all of them

    def _token_key(self, split: str) -> str:
        if split not in self._token_keys:
            self._token_keys[split] = activations.token_digest(self.examples[split])
        return self._token_keys[split]

    def _all_rows(self, lower: LowerLayers, split: str, depth: int) -> Tensor:
        """Compute the rows of all examples, in batches that do not depend on the first request."""
        lengths = self.lengths[split]
        rows = torch.zeros(1 + sum(lengths), self.backbone.hidden_size, dtype=self._dtype, device=self.device)
        stored = Activations(rows, lengths)
        for indices in batching.ordered_batches(lengths, EVALUATION_BATCH_SIZE):
            stored.fill(indices, lower(model_inputs(self.batch(split, indices)), depth))
        return rows


def _of(runs: Sequence[Run]) -> tuple[list[Request], int]:
    """Return the requests of runs, and the number of layers below all their adapters."""
    return [run.request for run in runs], min(run.depth for run in runs)


def _not_finite(losses: Sequence[float]) -> list[int]:
    return [k for k, loss in enumerate(losses) if not math.isfinite(loss)]
