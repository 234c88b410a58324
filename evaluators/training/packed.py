"""The `packed` evaluator: candidates of all types, ranks and sites train side by side on one frozen backbone.

Notation: K slots, one per candidate of a pack; N examples of a minibatch, the same for every slot.

A pack is formed of candidates that stand at the same step of the same order of minibatches and, on a CPU, leave the
same layers free. It trains until the first of them comes to a rung or to its end. Then all are taken off, and the next
packs are formed of those that go on: no slot waits for another candidate. Between two packs a candidate is its
`SlotState`: its own tensors, its moments and its random streams, so the pack it is in changes nothing but the order
of a few sums.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.backbones import LoadedBackbone
from autopeft.evaluators.base import OnOutcome, Outcome, OutOfMemoryError, Progress, Request, Select, memory_errors
from autopeft.evaluators.costs.pack_sizing import fitting_slots, keep_freed_memory
from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.tasks import Batch, Scored, model_inputs
from autopeft.evaluators.training import batching
from autopeft.evaluators.training.base import EVALUATION_BATCH_SIZE, Options, TrainingEvaluator, steps_at
from autopeft.evaluators.training.optimizer import PackedAdamW
from autopeft.evaluators.training.record import Record, Scores, TrainingFailedError, failure
from autopeft.evaluators.training.schedule import rate
from autopeft.evaluators.training.shared_layers import Activations, Prefix, PrefixCache, fingerprint, token_digest
from autopeft.evaluators.training.slot_state import SlotState
from autopeft.evaluators.training.train import train_alone
from autopeft.search_space.architecture import digest
from autopeft.search_space.metrics import ALWAYS, MetricError, Quality
from autopeft.search_space.training import Training

#: On a GPU, losses are looked at once in so many steps: each look waits for the device.
STEPS_BETWEEN_LOOKS = 16


@dataclass(slots=True, eq=False)
class _Run:
    """One candidate on its way.

    `stops`: step and share of each rung and of the end; `depth`: layers below its lowest adapter; `state`: its state
    between two packs, None at its first step.
    """

    index: int
    request: Request
    training: Training
    full: int
    depth: int
    stops: tuple[tuple[int, float], ...]
    record: Record
    #: Stops that lie behind.
    passed: int = 0
    step: int = 0
    state: SlotState | None = None
    outcome: Outcome | None = None

    @property
    def stop(self) -> int:
        """The step of the next stop."""
        return self.stops[self.passed][0]

    @property
    def share(self) -> float:
        """The share of the steps at the next stop."""
        return self.stops[self.passed][1]

    @property
    def num_steps(self) -> int:
        return self.stops[-1][0]

    @property
    def order(self) -> tuple[int, int, int]:
        """Runs with the same one see the same minibatches from here on."""
        return self.request.seed, self.training.batch_size, self.step


class PackedEvaluator(TrainingEvaluator):
    """Trains several candidates at a time; they see what they see in `TrainEvaluator`.

    `pack`: candidates side by side, None for as many as the memory holds. `share_prefix`: the layers below the lowest
    adapter of a pack run once for all its slots. `cache`: keeps their results; None: they are computed at each step.
    Candidates that train the backbone itself are trained alone, and to their end.
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
        share_prefix: bool = True,
        cache: PrefixCache | None = None,
    ) -> None:
        super().__init__(loaded, task, splits, max_length, metrics)
        self.pack = pack
        self.cache = cache
        self.prefix = Prefix(self.model, self.backbone) if share_prefix else None
        self._model_key = fingerprint(self.model, self.backbone) if share_prefix and cache is not None else ""
        self._dtype = next(self.model.parameters()).dtype
        self._token_keys: dict[str, str] = {}
        self._fitting: dict[tuple[int, int, int], int] = {}
        # One candidate keeps a CPU busy: there a pack is worth what it shares, and a full one is no end in itself.
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
        options: Options,
    ) -> Self:
        cache = None
        if options.cache_bytes:
            cache = PrefixCache(options.cache_bytes, options.cache_folder, options.cache_folder_bytes)
        return cls(loaded, task, splits, max_length, metrics, pack=options.pack, cache=cache)

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
            raise ValueError("candidates can be selected at their rungs only if they have the same ones")
        runs = [self._run(index, request) for index, request in enumerate(requests)]
        total = sum(run.num_steps for run in runs)

        def report(steps_ahead: int = 0) -> None:
            if progress is not None:
                done = sum(run.num_steps if run.outcome else run.step for run in runs)
                progress(min(done + steps_ahead, total), total)

        def end(run: _Run, outcome: Outcome) -> None:
            run.outcome = outcome
            run.state = None
            report()
            if ended is not None:
                ended(run.index, outcome)

        for run in runs:
            if "full" in run.request.candidate.architecture.kinds or self.is_bare(run.request.candidate):
                end(run, train_alone(self, run.request, report))
        while alive := [run for run in runs if run.outcome is None]:
            # Those that are behind come first: nobody passes a rung before all have reached it.
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

    def _run(self, index: int, request: Request) -> _Run:
        training = self.training(request.candidate)
        full, end = self.full_steps(training), self.num_steps(request)
        rungs = [(steps_at(rung, full), rung) for rung in request.fidelity.rungs]
        return _Run(
            index=index,
            request=request,
            training=training,
            full=full,
            record=Record(self.metrics),
            depth=request.candidate.architecture.lowest_layer(self.backbone) if self.prefix else 0,
            stops=(*(stop for stop in rungs if stop[0] < end), (end, request.fidelity.share)),
        )

    # Packs

    def _train_to(
        self, share: float, runs: Sequence[_Run], report: Callable[[int], None], end: Callable[[_Run, Outcome], None]
    ) -> None:
        """Train until each of `runs` has passed its stop at `share`, or failed."""
        # Candidates with the same lower layers in common go together: they share the most.
        waiting = sorted(runs, key=lambda run: (-run.depth, run.index))
        while waiting:
            alike = [run for run in waiting if self._fit_together(run, waiting[0])]
            pack = alike[: self._most(alike)]
            self._train_pack(pack, report, end)
            rest = [run for run in waiting if run not in pack]
            # At the front: with others of their kind they fill the next pack.
            waiting = [run for run in pack if run.outcome is None and run.share == share] + rest

    def _fit_together(self, a: _Run, b: _Run) -> bool:
        return a.order == b.order and (a.depth == b.depth or self.mixes_depths)

    def _most(self, runs: Sequence[_Run]) -> int:
        """Return the number of slots of a pack of such candidates."""
        key = _memory_key(runs)
        if key not in self._fitting:
            self._fitting[key] = self.pack or fitting_slots(self, [run.request for run in runs])
        return self._fitting[key]

    def _train_pack(
        self, pack: Sequence[_Run], report: Callable[[int], None], end: Callable[[_Run, Outcome], None]
    ) -> None:
        """Like `_train_slots`, but what goes wrong ends the candidate alone that is the cause."""
        try:
            with memory_errors():
                ended = self._train_slots(pack, report)
        except Exception as error:
            if len(pack) == 1:
                ended = [(pack[0], failure(pack[0].request, error))]
            else:
                # The runs are as they were before. Memory: from now on in smaller packs. Otherwise find the one.
                size = 1
                if isinstance(error, OutOfMemoryError):
                    size = self._fitting[_memory_key(pack)] = len(pack) // 2
                for start in range(0, len(pack), size):
                    self._train_pack(pack[start : start + size], report, end)
                ended = []
        for run, outcome in ended:
            end(run, outcome)

    def _train_slots(self, pack: Sequence[_Run], report: Callable[[int], None]) -> list[tuple[_Run, Outcome]]:
        """Train a pack to the first stop of its runs, or to the step at which the loss of one is not a number.

        Returns the runs that have ended. Nothing is changed in the runs before all has gone well.
        """
        begin = time.perf_counter()
        first, last = pack[0].step, min(run.stop for run in pack)
        architectures = [run.request.candidate.architecture for run in pack]
        seeds = [run.request.seed for run in pack]
        with Attachment(
            self.model, self.backbone, architectures, seeds, pretrained_head=self.pretrained_head
        ) as attachment:
            optimizer = PackedAdamW(attachment, [run.training for run in pack])
            for k, run in enumerate(pack):
                if run.state is not None:
                    run.state.restore(attachment, optimizer, k)
            losses = self._steps_of(pack, attachment, optimizer, last, report)
            train_s = time.perf_counter() - begin
            step = first + len(losses)
            broken = {k: n for n, row in reversed([*enumerate(losses, first + 1)]) for k in _not_finite(row)}
            stopped = [k for k, run in enumerate(pack) if run.stop == step and k not in broken]
            scored = self._score(pack, stopped, attachment)
            going_on = [k for k, run in enumerate(pack) if step < run.num_steps and k not in broken]
            states = {k: SlotState.capture(attachment, optimizer, k) for k in going_on}
            weights = {k: attachment.state(k) for k in stopped if pack[k].request.keep_weights}
        wall_s = time.perf_counter() - begin

        ended: list[tuple[_Run, Outcome]] = []
        for k, run in enumerate(pack):
            run.step, run.state = step, states.get(k)
            run.record.losses += [column[k] for column in losses]
            run.record.train_s += train_s / len(pack)
            run.record.wall_s += wall_s / len(pack)
            try:
                if k in broken:
                    loss, steps = losses[broken[k] - first - 1][k], run.num_steps
                    raise TrainingFailedError(f"the training loss became {loss} at step {broken[k]} of {steps}")
                if k not in scored:
                    continue
                scores = scored[k]
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
        pack: Sequence[_Run],
        attachment: Attachment,
        optimizer: PackedAdamW,
        last: int,
        report: Callable[[int], None],
    ) -> list[list[float]]:
        """Train up to step `last`; return the losses of the slots at each step. Ends early at one that is no number."""
        seed, batch_size, first = pack[0].order
        numbers = range(first + 1, last + 1)
        rates = torch.tensor(
            [[run.training.learning_rate * rate(n - 1, run.full, run.training) for run in pack] for n in numbers],
            device=self.device,
        )
        order = batching.training_batches(self.lengths["train"], batch_size, seed)
        looks = 1 if self.device.type == "cpu" else STEPS_BETWEEN_LOOKS
        losses: list[list[float]] = []
        unseen: list[Tensor] = []
        for number, indices, now in zip(numbers, islice(order, first, None), rates, strict=False):
            loss = self.scores(attachment, "train", indices)["loss"].mean(1)
            penalised = attachment.routers.penalised(loss).sum()
            if not optimizer.idle:
                penalised.backward()
                optimizer.step(number, now)
            unseen.append(loss.detach())
            if len(unseen) == looks or number == last:
                losses += torch.stack(unseen).tolist()
                unseen.clear()
                report((number - first) * len(pack))
                if any(map(_not_finite, losses[-looks:])):
                    break
        return losses

    # Scores

    def _score(self, pack: Sequence[_Run], slots: Sequence[int], attachment: Attachment) -> dict[int, Scores]:
        """Score the slots that have come to a stop."""
        ending = [k for k in slots if pack[k].stop == pack[k].num_steps]
        found: dict[int, Scores] = {}
        if len(ending) < len(slots):
            columns = self.columns(attachment, "validation", self.rung_examples)
            found |= {k: Scores(validation=columns[k]) for k in slots}
        if ending:
            tested = [k in ending and run.request.test for k, run in enumerate(pack)]
            scores = self.final_scores(attachment, tested)
            found |= {k: scores[k] for k in ending}
        return found

    @override
    def scores(self, attachment: Attachment, split: str, indices: Sequence[int]) -> Scored:
        slots, depth = attachment.num_slots, attachment.depth
        batch = self.batch(split, indices)
        attachment.routers.tokens.domains = batch.get("domains")
        lower: AbstractContextManager[None] = nullcontext()
        if self.prefix is not None and depth:
            lower = self.prefix.replaced(repeated(self._hidden(split, indices, batch, depth), slots), depth)
        with lower:
            packed = {name: repeated(tensor, slots) for name, tensor in batch.items()}
            columns = self.task.scores(self.model, packed)
        return {name: column.view(slots, -1, *column.shape[1:]) for name, column in columns.items()}

    def _hidden(self, split: str, indices: Sequence[int], batch: Batch, depth: int) -> Tensor:
        """Return the output of the lowest `depth` layers for these examples: [N, T, D]."""
        lengths = self.lengths[split]
        nbytes = (1 + sum(lengths)) * self.backbone.hidden_size * self._dtype.itemsize
        if self.cache is None or nbytes > self.cache.max_bytes:
            return self._lower_layers(batch, depth)
        key = digest([self._model_key, self._token_key(split), depth])
        rows = self.cache.get(key, lambda: self._all_rows(split, depth), self.device)
        return Activations(rows, lengths).batch(indices)

    def _token_key(self, split: str) -> str:
        if split not in self._token_keys:
            self._token_keys[split] = token_digest(self.examples[split])
        return self._token_keys[split]

    def _lower_layers(self, batch: Batch, depth: int) -> Tensor:
        assert self.prefix is not None
        return self.prefix(model_inputs(batch), depth)

    def _all_rows(self, split: str, depth: int) -> Tensor:
        """Compute the rows of all examples, in batches that do not depend on who asks first."""
        lengths = self.lengths[split]
        rows = torch.zeros(1 + sum(lengths), self.backbone.hidden_size, dtype=self._dtype, device=self.device)
        activations = Activations(rows, lengths)
        for indices in batching.ordered_batches(lengths, EVALUATION_BATCH_SIZE):
            batch = self.batch(split, indices)
            activations.fill(indices, self._lower_layers(batch, depth))
        return rows


def repeated(tensor: Tensor, slots: int) -> Tensor:
    """[N, ...] to [K * N, ...], the examples of a slot next to each other."""
    return tensor.repeat(slots, *[1] * (tensor.dim() - 1))


def _memory_key(runs: Sequence[_Run]) -> tuple[int, int, int]:
    """Return what decides on the memory of a pack: rows per step, layers below all adapters, rows of experts."""
    rows = max((spec.num_experts_total for run in runs for _, spec in run.request.candidate.architecture), default=1)
    return runs[0].training.batch_size, min(run.depth for run in runs), rows


def _not_finite(losses: Sequence[float]) -> list[int]:
    return [k for k, loss in enumerate(losses) if not math.isfinite(loss)]
