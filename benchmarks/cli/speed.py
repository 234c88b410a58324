"""`speed`: what autopeft saves against a loop over peft and Trainer, measured on this machine."""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from autopeft.studies.cli.options import JsonOption, SetOption, print_json

if TYPE_CHECKING:
    from autopeft.evaluators.data.splits import Splits
    from autopeft.studies.config.study_file import StudyFile


def speed(
    study: Annotated[
        Path | None, typer.Argument(metavar="STUDY", help="Study file, or its folder; default: the demo's.")
    ] = None,
    set_: SetOption = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda; default: the study's.")] = None,
    candidates: Annotated[int, typer.Option("--candidates", min=2, help="Candidates that every arm trains.")] = 8,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Times that every arm runs.")] = 3,
    ranking: Annotated[int, typer.Option("--ranking", min=0, help="Candidates to rank early; 0: none.")] = 24,
    seed: Annotated[int | None, typer.Option("--seed", help="Default: the study's.")] = None,
    experts: Annotated[bool, typer.Option("--experts", help="Instead: what routing between experts costs.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure autopeft against a loop over peft and Trainer. Exit 1, without figures, if they do other work."""
    from autopeft.benchmarks.speed.benchmark import run_bench
    from autopeft.benchmarks.speed.report import to_markdown
    from autopeft.studies.config.loading import load_study
    from autopeft.studies.engine.check import check

    changes = {"device": device, "seed": seed}
    own = [f"{key}={value}" for key, value in changes.items() if value is not None]
    path = study or Path(str(files("autopeft.studies.examples") / "demo.yaml"))
    settings = load_study(path, [*(set_ or ()), *own])
    splits, _, _ = check(settings)
    if experts:
        _experts(settings, splits, as_json)
        return
    with BenchView() as view:
        result = run_bench(settings, splits, candidates=candidates, rounds=rounds, ranked=ranking, watch=view)
    if as_json:
        print_json(result.to_dict())
    else:
        typer.echo(to_markdown(result), nl=False)


def _experts(settings: StudyFile, splits: Splits, as_json: bool) -> None:
    from autopeft.benchmarks.speed.experts import PLACES, SLOTS, measure_experts, to_markdown
    from autopeft.search_space.training import Training
    from autopeft.studies.config.problem import space_for
    from autopeft.studies.engine.proxy_scores import middle_training
    from autopeft.studies.engine.session import packed_evaluator_for

    with BenchView() as view:
        view.stage("loading")
        evaluator = packed_evaluator_for(settings, splits)
        view.plan(2 * len(PLACES) * len(SLOTS))
        view.stage("steps with experts")
        training: Training = middle_training(settings, space_for(settings, evaluator.backbone))
        rows = measure_experts(evaluator, training, lambda: view.advance(1))
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        typer.echo(to_markdown(rows), nl=False)


class BenchView:
    """A `Watch` for terminals; without a terminal only the lines are printed. All on stderr."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            # Over the last arms, not over the last seconds: arms differ in speed.
            speed_estimate_period=600,
        )
        self.task = self.progress.add_task("loading", total=None)
        self.what = ""
        self.begun = time.monotonic()

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line()
        self.progress.stop()

    def plan(self, steps: int) -> None:
        self.progress.update(self.task, total=steps)

    def stage(self, what: str) -> None:
        self._line()
        self.what, self.begun = what, time.monotonic()
        self.progress.update(self.task, description=what)

    def advance(self, steps: int) -> None:
        self.progress.advance(self.task, steps)

    def _line(self) -> None:
        if self.what:
            self.console.print(f"{self.what}  ({time.monotonic() - self.begun:.1f} s)", markup=False, soft_wrap=True)
        self.what = ""
