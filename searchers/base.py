"""What every searcher promises."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from autopeft.search_space.problem import Problem, Trial
from autopeft.search_space.spaces.genes import Assignment

#: A suggestion whose state says so is trained to its end, whatever the rungs say.
WHOLE = "whole"


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A point of the space to evaluate. `state` is handed back with the trial; see `Trial.searcher_state`."""

    genes: Assignment
    state: Mapping[str, Any] = field(default_factory=dict)


class Searcher(ABC):
    """Proposes candidates from what was measured. It sees genes and measurements, never models.

    Replayable: what `suggest` returns depends on the problem, the seed and the trials given to `update` alone, so a
    study that was killed goes on as if it had not been.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem = problem
        self.seed = seed
        self.completed: tuple[Trial, ...] = ()
        self.pending: tuple[Trial, ...] = ()

    def update(self, completed: Sequence[Trial], pending: Sequence[Trial] = ()) -> None:
        """All trials so far, in the order in which they were suggested: the ended ones (complete, pruned, failed or
        infeasible) and those still under way. One that says it is running is under way, whichever of the two lists it
        is in. Replaces what was known before.
        """
        self.completed = tuple(trial for trial in completed if trial.state != "running")
        self.pending = (*(trial for trial in completed if trial.state == "running"), *pending)

    @abstractmethod
    def suggest(self, count: int = 1) -> list[Suggestion]:
        """Up to `count` points to evaluate next; fewer (or none) once the space is exhausted."""

    def losses(self, trial: Trial) -> list[float] | None:
        """A trial's objectives, all to be minimised; None for one that lacks a value, or has one that is not finite.

        Those of a pruned trial are worse than its full training would have made them. It was pruned for being worse
        than others at the same rung, and that is what a searcher learns from them.
        """
        if trial.state not in ("complete", "pruned") or trial.measurement is None:
            return None
        values = trial.measurement.values
        losses = [objective.loss(values.get(objective.name, math.nan)) for objective in self.problem.objectives]
        return losses if all(map(math.isfinite, losses)) else None

    @property
    def num_suggested(self) -> int:
        return len(self.completed) + len(self.pending)
