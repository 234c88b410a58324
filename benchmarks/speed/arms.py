"""The ways to train the same candidates (arms), and their times.

All arms run in one process, which favours the loop: the packed evaluator's settings of the memory allocator hold for it
too. In each round every arm runs once, and each round starts with another one, so that changes of the machine between
them (heat, other work) favour none; a speed-up is a ratio of two times of one round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from autopeft.benchmarks.speed.loop import CandidateRun, Loop
from autopeft.evaluators.backbones import LoadedBackbone
from autopeft.evaluators.base import Outcome, Request, Select
from autopeft.evaluators.costs.timing import Spread, now
from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.training.activations import ActivationCache
from autopeft.evaluators.training.base import TrainingEvaluator
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.session import evaluator_for
from autopeft.studies.errors import UserError

CACHE_BYTES = 2**31
#: Steps whose losses are compared: later, rounding has grown.
COMPARED_STEPS = 20
#: Allowed relative differences from `single`: those of another order of summation.
TOLERANCES = {"loop": 1e-3, "packed": 1e-4, "packed+prefix": 1e-4}
#: The same where the backbone computes in less than float32: the order of summation changes the third digit.
COARSE_TOLERANCE = 5e-2
VALIDATION_TOLERANCE = 2e-2
#: Losses are recorded to five digits after the point.
ROUNDING = 1e-5


class Watch(Protocol):
    """Display of the benchmark's progress, in training steps of a candidate."""

    def plan(self, steps: int) -> None:
        """Set the number of steps."""

    def stage(self, what: str) -> None:
        """Begin a stage."""

    def advance(self, steps: int) -> None:
        """Count steps as done."""


class ParityError(UserError):
    """Arms have not done the same work, so their times cannot be compared."""


@dataclass(slots=True)
class Bench:
    """A study's model and data, ready for every arm."""

    settings: StudyFile
    splits: Splits
    single: TrainEvaluator
    pack: int
    watch: Watch
    loop: Loop

    @classmethod
    def of(cls, settings: StudyFile, splits: Splits, pack: int, watch: Watch) -> Bench:
        """Load the model. Raises ConfigurationError, UnusableEnvironmentError."""
        own = evaluator_for(settings, splits)
        loaded = LoadedBackbone(own.model, own.backbone, own.task.processor, own.pretrained_head)
        single = TrainEvaluator(loaded, settings.task, splits, settings.data.max_length)
        return cls(settings, splits, single, pack, watch, Loop(single, settings))

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.single.device

    def packed(self, share_lower_layers: bool) -> PackedEvaluator:
        """Return a packed evaluator with a cold cache."""
        single = self.single
        return PackedEvaluator(
            LoadedBackbone(single.model, single.backbone, single.task.processor, single.pretrained_head),
            self.settings.task,
            self.splits,
            self.settings.data.max_length,
            pack=self.pack,
            share_lower_layers=share_lower_layers,
            cache=ActivationCache(CACHE_BYTES) if share_lower_layers else None,
        )

    def timed(
        self, evaluator: TrainingEvaluator, requests: Sequence[Request], select: Select | None = None
    ) -> tuple[list[Outcome], float]:
        """Return outcomes and seconds. Raises UserError where a candidate fails: then arms cannot be compared."""
        before = 0

        def progress(done: int, total: int) -> None:
            nonlocal before
            self.watch.advance(done - before)
            before = done

        begin = now(self.device)
        outcomes = evaluator.evaluate(requests, progress, select=select)
        seconds = now(self.device) - begin
        for request, outcome in zip(requests, outcomes, strict=True):
            if outcome.measurement is None:
                raise UserError(f"candidate {request.candidate.key} cannot be trained here: {outcome.reason}")
        return outcomes, seconds


#: Prepares an arm for requests; each run is trained and timed when it is iterated to.
Arm = Callable[[Bench, Sequence[Request]], Iterable[CandidateRun]]


def _loop(bench: Bench, requests: Sequence[Request]) -> Iterator[CandidateRun]:
    for run in bench.loop.prepare(requests):
        bench.watch.advance(len(run.losses))
        yield run


def _evaluated(make: Callable[[Bench], TrainingEvaluator]) -> Arm:
    def arm(bench: Bench, requests: Sequence[Request]) -> Iterator[CandidateRun]:
        outcomes, seconds = bench.timed(make(bench), requests)
        for outcome in outcomes:
            found = outcome.measurement
            assert found is not None
            yield CandidateRun(
                losses=found.losses,
                loss=found.values["loss"],
                accuracy=found.values["accuracy"],
                seconds=seconds / len(outcomes),
            )

    return arm


REFERENCE = "single"
ARMS: dict[str, Arm] = {
    "loop": _loop,
    REFERENCE: _evaluated(lambda bench: bench.single),
    "packed": _evaluated(lambda bench: bench.packed(share_lower_layers=False)),
    "packed+prefix": _evaluated(lambda bench: bench.packed(share_lower_layers=True)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRow:
    """Times of an arm. `speedup`: time of the loop over that of the arm. `seconds`: median, per candidate."""

    arm: str
    speedup: Spread
    seconds: float
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualWork:
    """Times of the arms at equal work. `lowest_layer`: the first adapted one, None where candidates differ in it."""

    title: str
    candidates: int
    steps: int
    lowest_layer: int | None
    rows: tuple[ArmRow, ...]


def compare(
    bench: Bench, title: str, requests: Sequence[Request], rounds: int
) -> tuple[EqualWork, dict[str, list[list[CandidateRun]]]]:
    """Run every arm; return the table, and the runs of each round by arm. Raises ParityError, UserError."""
    names = list(ARMS)
    runs: dict[str, list[list[CandidateRun]]] = {name: [] for name in names}
    peaks: dict[str, int] = {}
    bench.packed(share_lower_layers=False)  # so that its settings of the process hold from the first arm on
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            bench.watch.stage(f"{title}: {name}, round {number + 1} of {rounds}")
            with _Peak(bench.device) as peak:
                runs[name].append(list(ARMS[name](bench, requests)))
            peaks[name] = max(peaks.get(name, 0), peak.nbytes)
        check_parity({name: runs[name][-1] for name in names}, bench.settings.model.dtype)
    times = {name: [sum(run.seconds for run in found) for found in runs[name]] for name in names}
    rows = tuple(
        ArmRow(
            arm=name,
            speedup=Spread.of([loop / own for loop, own in zip(times["loop"], times[name], strict=True)]),
            seconds=statistics.median(times[name]) / len(requests),
            peak_memory_bytes=peaks[name] or None,
        )
        for name in names
    )
    depths = {request.candidate.architecture.lowest_layer(bench.single.backbone) for request in requests}
    table = EqualWork(
        title=title,
        candidates=len(requests),
        steps=max(map(bench.single.num_steps, requests)),
        lowest_layer=depths.pop() if len(depths) == 1 else None,
        rows=rows,
    )
    return table, runs


def check_parity(runs: Mapping[str, Sequence[CandidateRun]], dtype: str = "float32") -> None:
    """Compare losses with `single`. Raises ParityError, which names every candidate, arm and step that differs."""
    problems = []
    for arm in (arm for arm in runs if arm != REFERENCE):
        tolerance = TOLERANCES[arm] if dtype == "float32" else COARSE_TOLERANCE
        for number, (own, reference) in enumerate(zip(runs[arm], runs[REFERENCE], strict=True)):
            where = f"{arm}, candidate {number}"
            if len(own.losses) != len(reference.losses):
                problems.append(f"{where}: took {len(own.losses)} steps, expected {len(reference.losses)}")
                continue
            pairs = list(zip(own.losses, reference.losses, strict=True))[:COMPARED_STEPS]
            step = next((n for n, (a, b) in enumerate(pairs, 1) if not _close(a, b, tolerance)), None)
            if step is not None:
                a, b = pairs[step - 1]
                problems.append(f"{where}: the loss of step {step} is {a:.6f}, expected {b:.6f}")
            elif not _close(own.loss, reference.loss, VALIDATION_TOLERANCE):
                problems.append(f"{where}: the validation loss is {own.loss:.5f}, expected {reference.loss:.5f}")
    if problems:
        raise ParityError(
            f"the arms differ from {REFERENCE!r}, so their times are not compared:\n  " + "\n  ".join(problems)
        )


def _close(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * abs(b) + ROUNDING


class _Peak:
    """The high-water mark of a GPU's memory within a block; 0 on other devices."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.nbytes = 0

    def __enter__(self) -> _Peak:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.nbytes = torch.cuda.max_memory_allocated(self.device)
