"""Progress of a running study, on stderr: a bar with an ETA, and a line for every evaluation."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from autopeft.search_space.problem import FINALIST, SEARCH, Objective, Trial
from autopeft.studies.analysis.diagnostics import diagnostics
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.analysis.summary import summary
from autopeft.studies.cli.display import ProgressDisplay
from autopeft.studies.errors import cause


def number(value: float, digits: int = 4) -> str:
    """Format a value for readers: 12,345 or 0.7123 or 1.2e-05."""
    if float(value).is_integer() and abs(value) >= 1:
        return f"{value:,.0f}"
    return f"{value:,.{digits}g}"


def measured(objective: Objective, values: Mapping[str, float], std_err: Mapping[str, float]) -> str:
    """Format a value with its standard error, rounded to two digits of the error."""
    value, error = values[objective.name], std_err.get(objective.name)
    if not error:
        return number(value)
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}"


@contextmanager
def stopping_between_steps(*signals: signal.Signals) -> Iterator[Callable[[], None]]:
    """Turn the first signal into a KeyboardInterrupt between two steps, and a second signal into one at once.

    Yields a function to call between two steps. After its first call, the first signal no longer raises where it
    happens to arrive: there the exception may be lost (in a destructor) or interrupt a call of the database. Works in
    the main thread alone, where Python handles signals.
    """
    stepping = asked = False

    def stop(number: int, frame: Any) -> None:
        nonlocal asked
        if asked or not stepping:
            raise KeyboardInterrupt
        asked = True
        # Not `sys.stderr`: the signal may have interrupted a write to its buffer.
        with suppress(OSError):  # a closed pipe
            os.write(2, b"\nstopping after this step; interrupt again to stop at once\n")

    def stop_if_asked() -> None:
        nonlocal stepping
        stepping = True
        if asked:
            raise KeyboardInterrupt

    # SIGINT too: a shell starts background processes with that signal ignored.
    previous = {number: signal.signal(number, stop) for number in signals}
    try:
        yield stop_if_asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class ProgressView(ProgressDisplay):
    """A `Watcher` for terminals. `between` is called between two steps, and may raise to end the study there."""

    def __init__(self, console: Console | None = None, between: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]:.0f}/{task.total:.0f}{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[front]}"),
            console=console,
        )
        self.between = between
        self.task = self.progress.add_task("starting", total=1, done=0, unit=" evaluations", front="")
        self.stage_task = self.progress.add_task("", total=1, done=0, unit="", front="", visible=False)
        #: Name of the current stage ahead of the evaluations, its start, and its completed steps.
        self.stage_name, self.stage_start_s, self.stage_done = "", 0.0, 0
        self.done = 0
        #: The running evaluations, and the number of those that ended before them.
        self.running: Sequence[Trial] = ()
        self.done_before = 0

    def plan(self, evaluations: int, done: int) -> None:
        """Set the planned number of evaluations and the number of those that are done."""
        self.done = done
        self.progress.update(self.task, total=evaluations, completed=done, done=done)

    def begin(self, trials: Sequence[Trial]) -> None:
        """Show the trials that start."""
        self.between()
        self._leave_stage()
        self.running, self.done_before = trials, self.done
        names = [_name(trial) for trial in trials]
        words = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
        self.progress.update(self.task, description=words)

    def stage(self, name: str, done: int, total: int) -> None:
        """Show work ahead of the evaluations in a bar of its own, and print a line when the stage has ended."""
        self.between()
        if name != self.stage_name:
            self._leave_stage()
            self.stage_name, self.stage_start_s = name, time.monotonic()
            self.progress.update(self.stage_task, description=name, visible=True)
        self.progress.update(self.stage_task, total=total, completed=done, done=done)
        self.stage_done = done

    def _leave_stage(self) -> None:
        if self.stage_name:
            seconds = time.monotonic() - self.stage_start_s
            self.progress.update(self.stage_task, visible=False)
            self.print(f"{self.stage_name}: {self.stage_done:,} in {seconds:,.0f} s")
            self.stage_name = ""

    def step(self, done: int, total: int) -> None:
        """Show the training steps of the running evaluations."""
        self.between()
        # The last tenth of an evaluation is its validation.
        reached = self.done_before + 0.9 * len(self.running) * done / total
        self.progress.update(self.task, completed=max(self.done, reached))

    def end(self, trial: Trial, snapshot: Snapshot) -> None:
        """Print the line of a trial that has ended."""
        if trial.state != "infeasible":
            self.done += 1
        try:
            line, members = self._line(trial, snapshot), sum(row.on_front for row in snapshot.rows())
        except Exception as error:  # the trial is in the ledger, whatever its line lacks
            line, members = f"{_name(trial):>24}  {trial.state} (its line cannot be shown: {cause(error)})", 0
        self.progress.update(
            self.task, completed=self.done, done=self.done, front=f"front of {members}" if members else ""
        )
        self.print(line)

    def _line(self, trial: Trial, snapshot: Snapshot) -> str:
        opening = f"{_name(trial):>24}  "
        note = "".join(f"  [{found.note}]" for found in diagnostics([trial]) if found.note)
        if trial.state != "complete" or trial.measurement is None:
            return f"{opening}{trial.state}: {trial.error}{note}"
        values, std_err = trial.measurement.values, trial.measurement.std_err
        figures = "  ".join(f"{o.name} {measured(o, values, std_err)}" for o in snapshot.objectives)
        return f"{opening}{figures}  ({trial.measurement.wall_s:.1f} s)  {summary(trial, snapshot.backbone)}{note}"


def _name(trial: Trial) -> str:
    if trial.role == FINALIST:
        return f"trial {trial.of} again, seed {trial.seed}"
    return f"trial {trial.number}" if trial.role == SEARCH else trial.role.label
