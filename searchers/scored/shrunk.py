"""The searcher `shrink`: from the largest architecture down along the best scores, until quality breaks; then `bo`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from autopeft.search_space.problem import Problem, ScoredPoint, Trial
from autopeft.searchers.base import WHOLE, Suggestion
from autopeft.searchers.scored.from_scores import FromScores

#: Sizes that are tried at once, and how often. Each ladder divides the range of the one before by five.
LADDER, ROUNDS = 4, 3
#: The descent ends where the smallest size that is as good is within this factor of the next smaller one.
CLOSE = 1.2
PHASE = "shrink"


class Shrunk(FromScores):
    """Search that starts from `Problem.scored`: what can be left out of the largest architecture.

    Scores are those of a supernet, whose weights all architectures share, so that they compare what is left when parts
    of the largest one are taken away. The largest scored architecture is trained first, together with a ladder of
    smaller ones: of each size the one with the best score. The next ladder lies between the smallest one that is
    within the margin of the best and the next smaller one, and so on, which bisects on the logarithm of the size. Every
    member is trained from scratch and to its end, as its recipe will be; a training from shared weights would promise
    what the recipe cannot keep. `bo` proposes beside the ladders, and goes on after them from all trials.
    """

    name = "shrink"
    summary = "from the largest architecture down by scores of a supernet, until quality breaks; then bo"

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem, seed)
        usable = [e for e in problem.scored if np.isfinite(e.score) and problem.violation(e.costs) <= 0]
        self._scored = sorted(usable, key=lambda entry: entry.score)
        costs = [objective.name for objective in problem.objectives if not objective.is_quality]
        declared = (name for name in costs if usable and name in usable[0].costs)
        self._cost = next(declared, "num_params")

    @override
    def queue(self) -> Iterator[Suggestion]:
        own = [trial for trial in (*self.completed, *self.pending) if _round(trial) is not None]
        for number in range(ROUNDS):
            before = [trial for trial in own if (_round(trial) or 0) < number]
            if any(trial.state == "running" for trial in before):
                return  # this ladder depends on how these end; `bo` proposes meanwhile
            targets = self._targets(before)
            for entry in map(self._best_within, targets):
                if entry is not None:
                    state = {"diagnostics": {"phase": PHASE, "round": number}, WHOLE: True}
                    yield Suggestion(genes=entry.genes, state=state)

    def _targets(self, before: list[Trial]) -> NDArray[np.float64]:
        """Return the largest costs of the next ladder, the largest first; none where the descent has ended."""
        if not self._scored:
            return np.zeros(0)
        sizes = [entry.costs[self._cost] for entry in self._scored]
        if not before:
            return np.geomspace(max(sizes), max(min(sizes), 1.0), LADDER + 1)
        ended = [(trial.values[self._cost], losses) for trial in before if (losses := self.losses(trial)) is not None]
        if not ended:
            return np.zeros(0)
        place = self.problem.first(quality=True)
        objective = self.problem.objectives[place]
        best = min(losses[place] for _, losses in ended)
        worst = best + self.problem.margin(objective.value(best))
        high = min(size for size, losses in ended if losses[place] <= worst)
        low = max((size for size, _ in ended if size < high), default=high)
        if high <= CLOSE * max(low, 1.0):
            return np.zeros(0)
        return np.geomspace(high, max(low, 1.0), LADDER + 2)[1:-1]

    def _best_within(self, cost: float) -> ScoredPoint | None:
        """Return the scored architecture with the best score among those that cost no more."""
        return next((entry for entry in self._scored if entry.costs[self._cost] <= cost * (1 + 1e-9)), None)


def _round(trial: Trial) -> int | None:
    found = trial.searcher_state.get("diagnostics", {})
    return int(found["round"]) if found.get("phase") == PHASE else None
