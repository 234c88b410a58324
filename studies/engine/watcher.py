"""The interface of progress displays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from autopeft.search_space.problem import Trial
from autopeft.studies.analysis.snapshot import Snapshot

#: Called with a description of the work, the number of completed steps and their total.
Stage = Callable[[str, int, int], None]


class Watcher(Protocol):
    """An observer that shows the progress of a study."""

    def plan(self, evaluations: int, done: int) -> None:
        """Receive the largest number of evaluations, and the number of completed ones."""

    def begin(self, trials: Sequence[Trial]) -> None:
        """Receive the trials that are running now."""

    def step(self, done: int, total: int) -> None:
        """Receive the completed and the total training steps, summed over the running trials."""

    def stage(self, name: str, done: int, total: int) -> None:
        """Receive the progress of work besides trials."""

    def end(self, trial: Trial, snapshot: Snapshot) -> None:
        """Receive a trial that ended, and the study including it."""
