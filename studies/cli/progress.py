"""What a person sees while a study runs: one bar with an ETA, and a line for every evaluation. All on stderr."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from autopeft.search_space.problem import FINALIST, SEARCH, Objective, Trial
from autopeft.studies.analysis.diagnostics import diagnostics
from autopeft.studies.analysis.snapshot import Snapshot, summary


def number(value: float, digits: int = 4) -> str:
    """A value as people read it: 12,345 or 0.7123 or 1.2e-05."""
    if float(value).is_integer() and abs(value) >= 1:
        return f"{value:,.0f}"
    return f"{value:,.{digits}g}"


def measured(objective: Objective, values: Mapping[str, float], std_err: Mapping[str, float]) -> str:
    """A value with its standard error, cut to the digits that the error leaves."""
    value, error = values[objective.name], std_err.get(objective.name)
    if not error:
        return number(value)
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}"


@contextmanager
def stopping_between_steps(*signals: signal.Signals) -> Iterator[Callable[[], None]]:
    """A signal raises KeyboardInterrupt at the next step, a second one at once.

    Yields what has to be called between two steps. Once the first was made, the handler itself raises only when it is
    asked again: where a signal happens to find the program, the exception may be lost (in a destructor) or cut a call
    of the database. For the main thread, to which Python gives signals.
    """
    stepping = asked = False

    def stop(number: int, frame: Any) -> None:
        nonlocal asked
        if asked or not stepping:
            raise KeyboardInterrupt
        asked = True
        # Not through `sys.stderr`, whose buffer may be in the middle of a write.
        os.write(2, b"\nstopping after this step; once more stops at once\n")

    def stop_if_asked() -> None:
        nonlocal stepping
        stepping = True
        if asked:
            raise KeyboardInterrupt

    # SIGINT too: a shell starts what it runs in the background with that signal ignored.
    previous = {number: signal.signal(number, stop) for number in signals}
    try:
        yield stop_if_asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class ProgressView:
    """A `Watcher` for terminals; without a terminal only the lines are printed. Use as a context manager.

    `between` is called between two steps, and may raise to end the study there.
    """

    def __init__(self, console: Console | None = None, between: Callable[[], None] = lambda: None) -> None:
        self.between = between
        self.console = console or Console(stderr=True, highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]:.0f}/{task.total:.0f}{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[front]}"),
            console=self.console,
            disable=not self.console.is_terminal,
            # An ETA over the last evaluations, not over the last seconds: they differ in length.
            speed_estimate_period=600,
        )
        self.task = self.progress.add_task("starting", total=1, done=0, unit=" evaluations", front="")
        self.stage_task = self.progress.add_task("", total=1, done=0, unit="", front="", visible=False)
        #: The stage that is under way, since when, and how far.
        self.ahead, self.since_s, self.reached = "", 0.0, 0
        self.done = 0
        #: The evaluations that are under way, and how many were done before them.
        self.running: Sequence[Trial] = ()
        self.before = 0

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def plan(self, evaluations: int, done: int) -> None:
        self.done = done
        self.progress.update(self.task, total=evaluations, completed=done, done=done)

    def begin(self, trials: Sequence[Trial]) -> None:
        self.between()
        self._leave_stage()
        self.running, self.before = trials, self.done
        names = [_name(trial) for trial in trials]
        words = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
        self.progress.update(self.task, description=words)

    def stage(self, name: str, done: int, total: int) -> None:
        """Work ahead of the evaluations: a bar of its own, and a line when the next stage or an evaluation begins."""
        self.between()
        if name != self.ahead:
            self._leave_stage()
            self.ahead, self.since_s = name, time.monotonic()
            self.progress.update(self.stage_task, description=name, visible=True)
        self.progress.update(self.stage_task, total=total, completed=done, done=done)
        self.reached = done

    def _leave_stage(self) -> None:
        if self.ahead:
            seconds = time.monotonic() - self.since_s
            self.progress.update(self.stage_task, visible=False)
            self.console.print(f"{self.ahead}: {self.reached:,} in {seconds:,.0f} s", soft_wrap=True, markup=False)
            self.ahead = ""

    def step(self, done: int, total: int) -> None:
        self.between()
        # The last tenth of an evaluation is its validation.
        reached = self.before + 0.9 * len(self.running) * done / total
        self.progress.update(self.task, completed=max(self.done, reached))

    def end(self, trial: Trial, snapshot: Snapshot) -> None:
        if trial.state != "infeasible":
            self.done += 1
        members = sum(row.on_front for row in snapshot.rows())
        self.progress.update(
            self.task, completed=self.done, done=self.done, front=f"front of {members}" if members else ""
        )
        self.console.print(self._line(trial, snapshot), soft_wrap=True, markup=False)

    def _line(self, trial: Trial, snapshot: Snapshot) -> str:
        opening = f"{_name(trial):>24}  "
        note = "".join(f"  [{told.note}]" for told in diagnostics([trial]) if told.note)
        if trial.state != "complete" or trial.measurement is None:
            return f"{opening}{trial.state}: {trial.error}{note}"
        values, std_err = trial.measurement.values, trial.measurement.std_err
        figures = "  ".join(f"{o.name} {measured(o, values, std_err)}" for o in snapshot.objectives)
        return f"{opening}{figures}  ({trial.measurement.wall_s:.1f} s)  {summary(trial, snapshot.backbone)}{note}"


def _name(trial: Trial) -> str:
    if trial.role == FINALIST:
        return f"trial {trial.of} again, seed {trial.seed}"
    return f"trial {trial.number}" if trial.role == SEARCH else trial.role.label
