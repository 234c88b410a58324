"""Costs measured on this machine: memory and time of a training step, and latency.

**Time.** Candidates are measured minutes apart on a machine whose speed drifts. So each repeat of a candidate
has a control beside it, a forward pass of the bare backbone (hooks off) over the same batch. Reported is

    median over repeats of (candidate / control)  x  reference,

where the reference is the control's median time, taken once per model and shape of batch and kept for the
process. What slows the machine down slows both halves of a pair. The spread is the interquartile range of the
ratios, times the reference. An error of the reference is common to all candidates of a process, so it does not
change their order; between processes, compare what is divided by the same baseline's value.

**Memory.** On CUDA: the allocator's high-water mark of one training step, with the optimiser's state in place
and all else that the process keeps on the device. Elsewhere the resident size of a process is too noisy to rank
by. There the bytes that a step must hold are counted, the same number for the same candidate every time: the
parameters of backbone and adapters, each once, as they are stored, with the scales of quantised ones, and what
`step_memory.py` counts. Both are of whole minibatches, without micro-batches and checkpointing: candidates compare,
whatever memory a machine has.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from math import sqrt
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.base import Costs
from autopeft.evaluators.costs.step_memory import step_bytes
from autopeft.evaluators.costs.timing import now
from autopeft.evaluators.tasks import Batch, Task, model_inputs
from autopeft.search_space.backbones.quantized import state_tensors

#: Target for the standard error of the median, relative to the median; the bounds below limit the repeats.
PRECISION = 0.01
#: Not fewer: five repeats can all fall into one burst of other load and agree on a wrong value.
MIN_REPEATS = 8
MAX_REPEATS = 40
MAX_SECONDS = 2.0

#: Seconds of the bare backbone's forward pass, by model and by the shapes of the batch.
_references: WeakKeyDictionary[nn.Module, dict[tuple[tuple[object, ...], ...], float]] = WeakKeyDictionary()


def measure(attachment: Attachment, task: Task, batch: Batch, metrics: frozenset[str]) -> Costs:
    """Return the named metrics and their spread, and restore the state of the attachment; gradients become None.

    A step is forward, backward and AdamW, without clipping. With several slots, `batch` holds the examples of all
    of them, and adapters cannot be merged. Raises ValueError for a metric that is not measured.
    """
    unknown = sorted(name for name in metrics if name not in _METHODS)
    if unknown:
        raise ValueError(f"unknown measured cost: {', '.join(unknown)}; known: {', '.join(_METHODS)}")
    bench = _Bench(attachment, task, batch)
    with _restored(attachment):
        found = {name: method(bench) for name, method in _METHODS.items() if name in metrics}
    return Costs(
        values={name: value for name, (value, _) in found.items()},
        spread={name: spread for name, (_, spread) in found.items()},
    )


@contextmanager
def _restored(attachment: Attachment) -> Iterator[None]:
    """Restore values, random streams and modes on exit, and set gradients to None."""
    model = attachment.model[0]
    trained = [parameter for parameter, _ in attachment.trainable()]
    tensors = list(dict.fromkeys([*attachment.parameters(), *attachment.buffers(), *trained]))
    streams = [stream for bank in attachment.banks for stream in bank.dropout_streams]
    # On the CPU, so that the copies are not part of the measured memory.
    values = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    states = [stream.get_state() for stream in streams]
    modes = attachment.training, model.training
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        for parameter in trained:
            parameter.grad = None
        for stream, state in zip(streams, states, strict=True):
            stream.set_state(state)
        attachment.train(modes[0])
        model.train(modes[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Seconds of a training step on one batch, of the scores of its rows, and of a generated text if metrics read some.

    `answer_s`: of a text that a task of lm-eval asks for, by metric. `spread`: interquartile range of the step's times,
    relative to their median. `share`: share of the rows at a time that were measured; the seconds are those of all
    rows, by proportion.
    """

    step_s: float
    scores_s: float
    spread: float
    share: float
    text_s: float = 0.0
    answer_s: Mapping[str, float] = field(default_factory=dict)


def step_times(
    attachment: Attachment, task: Task, batch: Batch, within_s: float, at_a_time: int | None = None
) -> StepTimes:
    """Measure a training step and scores within about `within_s` seconds, or a few steps of one row if longer.

    `at_a_time`: rows that fit into the memory, None for all. Other than `measure`, it needs no control: it says how
    long trainings take now, also beside other work.
    """
    begun, rows = time.perf_counter(), len(batch["targets"])
    most = min(rows, at_a_time or rows)
    with _restored(attachment):
        attachment.train()
        one = _Bench(attachment, task, {name: tensor[:1] for name, tensor in batch.items()})
        step = one.training_step()
        one.timed(step)
        # Room for a first step, two repeats, and as many scores, which take a third of a step.
        fitting = int(within_s / (3 * 4 / 3 * one.timed(step)))
        measured = max(1, min(most, fitting))
        bench = _Bench(attachment, task, {name: tensor[:measured] for name, tensor in batch.items()})
        step = bench.training_step()
        left_s = within_s - (time.perf_counter() - begun)
        step_s, spread_s = _sample(lambda: bench.timed(step), least=2, within_s=0.6 * left_s)
        attachment.eval()
        left_s = within_s - (time.perf_counter() - begun)
        scores_s, _ = _sample(lambda: bench.timed(bench.scores), least=2, within_s=left_s)
    scale = rows / measured
    return StepTimes(step_s=scale * step_s, scores_s=scale * scores_s, spread=spread_s / step_s, share=measured / rows)


class _Bench:
    """One attachment with one batch, and the measurements on them. Each metric returns value and spread."""

    def __init__(self, attachment: Attachment, task: Task, batch: Batch) -> None:
        self.attachment = attachment
        attachment.routers.tokens.domains = batch.get("domains")
        self.model = attachment.model[0]
        self.task = task
        self.inputs = model_inputs(batch)
        #: Of a decoder the last token's logits alone, as at the start of a generation: those of all tokens may be the
        #: largest tensor of the pass.
        reads = inspect.signature(type(self.model).forward).parameters
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in reads else {}
        self.batch = batch
        self.trained = [parameter for parameter, _ in attachment.trainable()]
        self.device = batch["targets"].device

    # Operations to measure

    @torch.inference_mode()
    def forward(self) -> None:
        self.model(**self.inputs, **self.options)

    @torch.no_grad()
    def scores(self) -> None:
        self.task.scores(self.model, self.batch)

    def loss(self) -> Tensor:
        return self.attachment.routers.penalised(self.task.scores(self.model, self.batch)["loss"].mean()[None])[0]

    def training_step(self) -> Callable[[], None]:
        """Return a training step with a new optimiser; the forward pass alone if nothing is trainable."""
        # A learning rate of zero: every step does the same work, and no values diverge, which would change the time.
        optimizer = AdamW(self.trained, lr=0.0, fused=True) if self.trained else None

        def step() -> None:
            loss = self.loss()
            if optimizer is not None:
                torch.autograd.backward(loss)
                optimizer.step()
                optimizer.zero_grad()

        return step

    # Memory

    def peak_memory(self) -> tuple[float, float]:
        self.attachment.train()
        if self.device.type == "cuda":
            return float(self.high_water_mark()), 0.0
        indices = [tensor for bank in self.attachment.banks for tensor in bank.tensors().values()]
        scales = state_tensors(self.model).values()
        parameters = dict.fromkeys([*self.model.parameters(), *scales, *self.attachment.parameters(), *indices])
        return float(sum(p.nbytes for p in parameters) + step_bytes(self.attachment, self.task, self.batch)), 0.0

    def high_water_mark(self) -> int:
        step = self.training_step()
        step()  # the first step allocates the optimiser's state, after its own high-water mark
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    # Time

    def step_seconds(self) -> tuple[float, float]:
        return self.seconds(self.training_step(), training=True)

    def latency(self) -> tuple[float, float]:
        return self.seconds(self.forward)

    def merged_latency(self) -> tuple[float, float]:
        parameters = len(list(self.model.parameters()))
        with self.attachment.merged():
            # No hook left and no bias added: the operations are those of the bare backbone, with other values. Timing
            # them would order equal candidates by noise.
            if not self.attachment.banks and len(list(self.model.parameters())) == parameters:
                return self.reference(), 0.0
            # The control runs on the merged weights too: their values do not change its time, and one merge is enough.
            return self.latency()

    def seconds(self, run: Callable[[], None], training: bool = False) -> tuple[float, float]:
        """Return the time of `run` in seconds, normalised by the control, and its spread."""

        def candidate() -> float:
            self.attachment.train(training)
            return self.timed(run)

        # In alternating order: effects of the first on the second (caches, heat) cancel in the median.
        orders = cycle([(self.control, candidate), (candidate, self.control)])

        def ratio() -> float:
            taken = {arm: arm() for arm in next(orders)}
            return taken[candidate] / taken[self.control]

        reference = self.reference()
        median, spread = _sample(ratio)
        return median * reference, spread * reference

    def reference(self) -> float:
        shapes = tuple(sorted((name, *tensor.shape) for name, tensor in self.inputs.items()))
        references = _references.setdefault(self.model, {})
        if shapes not in references:
            references[shapes], _ = _sample(self.control)
        return references[shapes]

    def control(self) -> float:
        self.attachment.eval()
        with self.attachment.bare():
            return self.timed(self.forward)

    def timed(self, run: Callable[[], None]) -> float:
        begin = now(self.device)
        run()
        return now(self.device) - begin


_METHODS: dict[str, Callable[[_Bench], tuple[float, float]]] = {
    "peak_memory_bytes": _Bench.peak_memory,
    "step_s": _Bench.step_seconds,
    "latency_s": _Bench.latency,
    "merged_latency_s": _Bench.merged_latency,
}


def _sample(
    draw: Callable[[], float], *, least: int = MIN_REPEATS, within_s: float | None = None
) -> tuple[float, float]:
    """Return median and interquartile range of `draw()`, repeated after a warm-up until the median is precise.

    `within_s`: default `MAX_SECONDS`. `least`: repeats, at least two, that it makes even if they take longer.
    """
    draw()
    end = time.perf_counter() + (MAX_SECONDS if within_s is None else within_s)
    drawn: list[float] = []
    while True:
        drawn.append(draw())
        if len(drawn) < least:
            continue
        low, median, high = statistics.quantiles(drawn, n=4, method="inclusive")
        # For normal values, the standard error of the median is 1.25 sigma / sqrt(n) and the range is 1.35 sigma.
        precise = (high - low) / sqrt(len(drawn)) < PRECISION * median
        if precise or len(drawn) >= MAX_REPEATS or time.perf_counter() > end:
            return median, high - low
