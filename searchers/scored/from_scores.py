"""Common base of the searchers that start from `Problem.scored`: a queue made of it, then `bo`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

from typing_extensions import override

from autopeft.search_space.problem import Trial
from autopeft.searchers.base import Suggestion
from autopeft.searchers.bo.bayesian import Bayesian


class FromScores(Bayesian):
    """Searcher that proposes a queue, in order, and then hands over to `bo`, which sees all trials.

    Without scores the queue is empty.
    """

    @abstractmethod
    def queue(self) -> Iterator[Suggestion]:
        """Yield the queued suggestions, given the trials so far, including those already evaluated."""

    def annotated(self, suggestion: Suggestion) -> Suggestion:
        """Return a suggestion of `bo` with diagnostics of the queue. Default: unchanged."""
        return suggestion

    @override
    def _next(self, running: Sequence[Trial]) -> Suggestion | None:
        observed = {trial.candidate.key for trial in (*self.completed, *running)}
        for suggestion in self.queue():
            if self.problem.space.decode(suggestion.genes).key not in observed:
                return suggestion
        found = super()._next(running)
        return None if found is None else self.annotated(found)
