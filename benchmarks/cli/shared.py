"""Parts that several of these commands share: the default study, progress, and how results are printed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typing_extensions import override

from autopeft.studies.cli.display import ProgressDisplay
from autopeft.studies.cli.options import print_json
from autopeft.studies.cli.streams import echo

if TYPE_CHECKING:
    from autopeft.studies.config.study_file import StudyFile

STUDY_HELP = "Study file, or a folder with a study.yaml; default: benchmarks/race/table.yaml."


def load_study_or_table(study: Path | None, overrides: Iterable[str]) -> StudyFile:
    """Load a study file, by default `race/table.yaml`, with `--set` overrides."""
    from autopeft.benchmarks.race.table import STUDY
    from autopeft.studies.config.loading import load_study

    return load_study(study or STUDY, overrides)


def print_result(as_json: bool, to_data: Callable[[], Any], to_markdown: Callable[[], str]) -> None:
    """Print a result on stdout, as JSON or as Markdown."""
    if as_json:
        print_json(to_data())
    else:
        echo(to_markdown().rstrip())


class BenchView(ProgressDisplay):
    """A `Watch` for terminals."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        self.task = self.progress.add_task("loading", total=None)
        self.what = ""
        self.begun = time.monotonic()

    @override
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_stage()
        super().__exit__(kind, error, trace)

    def plan(self, steps: int) -> None:
        """Set the number of steps."""
        self.progress.update(self.task, total=steps)

    def stage(self, what: str) -> None:
        """Print the stage that ends, with its seconds, and begin another."""
        self._end_stage()
        self.what, self.begun = what, time.monotonic()
        self.progress.update(self.task, description=what)

    def advance(self, steps: int) -> None:
        """Count steps as done."""
        self.progress.advance(self.task, steps)

    def _end_stage(self) -> None:
        if self.what:
            self.print(f"{self.what}  ({time.monotonic() - self.begun:.1f} s)")
        self.what = ""
