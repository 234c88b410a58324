"""The `train` evaluator: it trains and scores one candidate after the other on the frozen backbone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from typing_extensions import override

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.checkpointing import saving_memory
from autopeft.evaluators.attachment.learning_rates import rate_factors
from autopeft.evaluators.attachment.moves import Moves
from autopeft.evaluators.base import OnOutcome, Outcome, Progress, Request, Select, memory_errors
from autopeft.evaluators.costs.pack_sizing import Levers
from autopeft.evaluators.tasks import Scored
from autopeft.evaluators.training import batching
from autopeft.evaluators.training.base import WHOLE, TrainingEvaluator, steps_at
from autopeft.evaluators.training.optimizer import moments, parameter_groups, set_rate
from autopeft.evaluators.training.record import Record, TrainingFailedError, failure
from autopeft.evaluators.training.schedule import rate
from autopeft.search_space.training import Training


class TrainEvaluator(TrainingEvaluator):
    """Trains one candidate after the other by torch's AdamW; the reference for faster evaluators."""

    name = "train"

    @override
    def evaluate(
        self,
        requests: Sequence[Request],
        progress: Progress | None = None,
        *,
        ended: OnOutcome | None = None,
        select: Select | None = None,
    ) -> list[Outcome]:
        if select is not None:
            raise ValueError(
                f"the {self.name!r} evaluator cannot select at rungs: it trains one candidate after the other"
            )
        self.prepare(requests)
        total = sum(self.num_steps(request) for request in requests)
        done = 0
        outcomes: list[Outcome] = []
        for index, request in enumerate(requests):

            def report(step: int, start: int = done) -> None:
                if progress is not None:
                    progress(start + step, total)

            outcomes.append(train_alone(self, request, report))
            if ended is not None:
                ended(index, outcomes[-1])
            done += self.num_steps(request)
        return outcomes

    @override
    def scores(self, attachment: Attachment, split: str, indices: Sequence[int], part: slice = WHOLE) -> Scored:
        batch = self.batch(split, indices, part)
        attachment.routers.tokens.domains = batch.get("domains")
        return {name: column[None] for name, column in self.task.scores(self.model, batch).items()}


def train_alone(evaluator: TrainingEvaluator, request: Request, report: Callable[[int], None]) -> Outcome:
    """Train and score one candidate; a failure becomes its outcome. `report` is called with each step number."""
    try:
        if evaluator.is_bare(request.candidate):
            raise TrainingFailedError("nothing to train: no adapter is on and the model has no task head")
        levers = evaluator.levers_of(request.candidate)  # it may run the bare model, so no adapter is attached yet
        with (
            memory_errors(),
            evaluator.attach(request) as attachment,
            saving_memory(attachment, levers.checkpointing),
        ):
            return _trained(evaluator, request, attachment, levers, report)
    except Exception as error:
        return failure(request, error)


def _trained(
    evaluator: TrainingEvaluator,
    request: Request,
    attachment: Attachment,
    levers: Levers,
    report: Callable[[int], None],
) -> Outcome:
    begin = time.perf_counter()
    training = evaluator.training(request.candidate)
    full, steps = evaluator.full_steps(training), evaluator.num_steps(request)
    rungs = {steps_at(rung, full): rung for rung in request.fidelity.rungs}
    record = Record(evaluator.metrics)
    at_a_time = evaluator.evaluation_batch_size(evaluator.levers, training.batch_size)
    for step, seconds, loss in _steps(evaluator, request, attachment, levers.rows, training, steps, full):
        record.train_s += seconds
        record.losses.append(loss)
        report(step)
        if step in rungs and step < steps:
            scored = evaluator.all_columns if evaluator.generation.at_rungs else evaluator.columns
            (columns,) = scored(attachment, "validation", evaluator.rung_examples, at_a_time)
            record.rung(rungs[step], columns)
    record.end(evaluator.final_scores(attachment, [request.test], at_a_time)[0])
    record.wall_s = time.perf_counter() - begin
    weights = attachment.state() if request.keep_weights else None
    return Outcome(measurement=record.measurement(request, evaluator.name), weights=weights)


def _steps(
    evaluator: TrainingEvaluator,
    request: Request,
    attachment: Attachment,
    rows: int | None,
    training: Training,
    steps: int,
    full: int,
) -> Iterator[tuple[int, float, float]]:
    """Train the first `steps` of `full` steps; yield step number, seconds and loss. `rows`: of a micro-batch.

    The attachment is in training mode between steps. Raises TrainingFailedError if a loss is not finite.
    """
    parameters = list(attachment.trainable())
    groups = parameter_groups(parameters, training, rate_factors(attachment))
    optimizer = AdamW(groups, lr=training.learning_rate, fused=True) if groups else None
    order = batching.training_batches(evaluator.lengths["train"], training.batch_size, request.seed)
    moves = Moves(attachment, [full], lambda parameter: moments(optimizer, parameter))
    attachment.train()
    with torch.random.fork_rng(devices=[evaluator.device] if evaluator.device.type == "cuda" else []):
        torch.manual_seed(request.seed)  # the dropout of a backbone that is trained itself
        for step in moves.watching(range(1, steps + 1)):
            start = time.perf_counter()
            loss = evaluator.step_gradients(attachment, next(order), rows, backward=optimizer is not None)
            if optimizer is not None:
                if training.max_grad_norm:
                    clip_grad_norm_([p for p, _ in parameters], training.max_grad_norm)
                set_rate(optimizer, training.learning_rate * rate(step - 1, full, training))
                optimizer.step()
                moves.make(step)
                optimizer.zero_grad()
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingFailedError(f"the training loss became {value} at step {step} of {steps}")
            yield step, time.perf_counter() - start, value
