"""What the searchers share that start from `Problem.scored`: a plan made of it, then `bo`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

from autopeft.search_space.problem import Trial
from autopeft.searchers.base import Suggestion
from autopeft.searchers.bo.bayesian import Bayesian


class FromScores(Bayesian):
    """Proposes what is planned, in its order, and then what `bo` does, which has seen all trials. Without scores there
    is no plan.
    """

    @abstractmethod
    def planned(self) -> Iterator[Suggestion]:
        """What is to be trained before `bo` takes over, as far as the trials so far tell; also what has been."""

    def told(self, suggestion: Suggestion) -> Suggestion:
        """A suggestion of `bo`, with what there is to say of the plan."""
        return suggestion

    def _next(self, under_way: Sequence[Trial]) -> Suggestion | None:
        known = {trial.candidate.key for trial in (*self.completed, *under_way)}
        for suggestion in self.planned():
            if self.problem.space.decode(suggestion.genes).key not in known:
                return suggestion
        found = super()._next(under_way)
        return None if found is None else self.told(found)
