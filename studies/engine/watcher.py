"""What shows the progress of a study: the calls that it gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from autopeft.search_space.problem import Trial
from autopeft.studies.analysis.snapshot import Snapshot

#: Called with a sentence, the number of steps done and their total.
Stage = Callable[[str, int, int], None]


class Watcher(Protocol):
    """Whoever shows the progress of a study."""

    def plan(self, evaluations: int, done: int) -> None:
        """Take the number of evaluations at most, and how many are done."""

    def begin(self, trials: Sequence[Trial]) -> None:
        """Take the trials that are under way now."""

    def step(self, done: int, total: int) -> None:
        """Take the training steps done and in total, summed over the trials under way."""

    def stage(self, name: str, done: int, total: int) -> None:
        """Take the progress of work that is no trial."""

    def end(self, trial: Trial, snapshot: Snapshot) -> None:
        """Take a trial that ended, and the study with it."""
