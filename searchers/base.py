"""The interface of searchers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from autopeft.search_space.problem import Problem, Trial
from autopeft.search_space.spaces.genes import Assignment
from autopeft.searchers.rounding import rounded

#: Key of `Suggestion.state`: where it is true, the trial is trained to its end, whatever the rungs say.
WHOLE = "whole"


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A point of the space to evaluate. `state` is handed back with the trial; see `Trial.searcher_state`."""

    genes: Assignment
    state: Mapping[str, Any] = field(default_factory=dict)


class Searcher(ABC):
    """Proposer of candidates: it sees genes and measurements, never models.

    Replayable: the suggestions depend on the problem, the seed and the trials given to `update` alone, so a study that
    was killed resumes as if it had not been. All measurements it sees are `rounded`: those of `completed`, and those of
    the trials in its `problem`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem = replace(problem, observed=rounded(problem.observed), prior=rounded(problem.prior))
        self.seed = seed
        self.completed: tuple[Trial, ...] = ()
        self.pending: tuple[Trial, ...] = ()

    def update(self, completed: Sequence[Trial], pending: Sequence[Trial] = ()) -> None:
        """Replace the observed trials by all trials so far, in the order in which they were suggested.

        `completed` have ended (complete, pruned, failed or infeasible), `pending` are running. A trial whose state is
        "running" counts as pending, whichever of the two lists it is in.
        """
        self.completed = rounded(trial for trial in completed if trial.state != "running")
        self.pending = (*(trial for trial in completed if trial.state == "running"), *pending)

    @abstractmethod
    def suggest(self, count: int = 1) -> list[Suggestion]:
        """Return up to `count` points to evaluate next; fewer (or none) once the space is exhausted."""

    def chance_of_cheaper(self, count: int, cost: float) -> tuple[int, float] | None:
        """Return the number of the next points, at most `count`, and the probability that one of them is worth it.

        That is: it is as good as the best of the trials and these points, and costs less than `cost`, the loss of the
        first cost to minimise. None where the searcher has no model that can tell.
        """
        return None

    def losses(self, trial: Trial) -> list[float] | None:
        """Return a trial's objectives, all to be minimised; None if a value is missing or not finite.

        The losses of a pruned trial are worse than its full training would have made them. It was pruned for being
        worse than others at the same rung, and that is what a searcher learns from them.
        """
        if trial.state not in ("complete", "pruned") or trial.measurement is None:
            return None
        values = trial.measurement.values
        losses = [objective.loss(values.get(objective.name, math.nan)) for objective in self.problem.objectives]
        return losses if all(map(math.isfinite, losses)) else None

    @property
    def num_suggested(self) -> int:
        """Number of trials so far, completed and pending."""
        return len(self.completed) + len(self.pending)
