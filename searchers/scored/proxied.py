"""The searcher `proxy`: the best of many candidates that were scored without training, once the scores are audited."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from autopeft.search_space.problem import Problem, ScoredPoint, Trial
from autopeft.search_space.spaces.genes import Assignment
from autopeft.searchers.base import WHOLE, Suggestion
from autopeft.searchers.genetic import ranks, spread_first
from autopeft.searchers.scored.from_scores import FromScores
from autopeft.searchers.scored.ranking import LEAST_RANKED, Ranking, ranking, strata

#: Candidates that are trained to see whether the scores rank: a quarter of the trials, within these.
LEAST_AUDITED, MOST_AUDITED = 8, 16
#: Kendall's tau below which the scores are not followed.
LEAST_TAU = 0.3
#: Share of the trials after the audit that the scores decide about. Scores know nothing of learning rates, and of
#: quality only how it ranks; the rest goes to a searcher that has seen what the trainings came to.
PICKED_SHARE = 0.5
AUDIT, PICK = "audit", "proxy"


class Proxied(FromScores):
    """`Problem.scored` has candidates and their scores, less is better, from a supernet or a proxy without training.

    First a stratified handful of them is trained: one drawn from each of as many groups of neighbouring scores. If
    Kendall's tau of scores and losses is at least `LEAST_TAU`, the front of the scored candidates (score against costs)
    is trained next, spread over its length, and `bo` goes on from all trials. Else `bo` takes over at once, and the
    diagnostics say so. Whatever the scores, what enters the study's front has been trained alone. Candidates whose
    costs are known to be beyond the limits or bounds take no part.
    """

    name = "proxy"
    summary = "the best of thousands of candidates scored by a supernet or another proxy, audited first"

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem, seed)
        self._scored = [entry for entry in problem.scored if problem.violation(entry.costs) <= 0]
        count = max(LEAST_AUDITED, min(MOST_AUDITED, problem.num_trials // 4))
        places = strata([entry.score for entry in self._scored], count, np.random.default_rng(seed))
        #: What is trained for the audit, by the keys of the candidates.
        self._audited = {problem.space.decode(e.genes).key: e for e in (self._scored[place] for place in places)}
        self._picked = self._picks(round(PICKED_SHARE * max(0, problem.num_trials - len(self._audited))))
        self._audit: Ranking | None = None
        self._audit_over = False

    def update(self, completed: Sequence[Trial], pending: Sequence[Trial] = ()) -> None:
        super().update(completed, pending)
        begun = {
            trial.candidate.key: entry
            for trial in (*completed, *pending)
            if _phase(trial) == AUDIT and (entry := self._entry(trial))
        }
        if not begun.keys() <= self._audited.keys():
            # Drawn when the study was to have another number of trials: what has been trained then is the audit.
            most = max(LEAST_AUDITED, len(begun))
            self._audited = dict(islice((begun | self._audited).items(), most))
        self._audit_over = self._audited.keys() <= {trial.candidate.key for trial in completed}
        self._audit = self.audit()

    def _entry(self, trial: Trial) -> ScoredPoint | None:
        known = self._audited.get(trial.candidate.key)
        return known or next((entry for entry in self._scored if entry.genes == trial.genes), None)

    def planned(self) -> Iterator[Suggestion]:
        for entry in self._audited.values():
            # To its end: what a rung takes off says less than the whole training that is to be foretold.
            yield Suggestion(genes=entry.genes, state={"diagnostics": {"phase": AUDIT}, WHOLE: True})
        if self._audit is not None and self._audit.tau >= LEAST_TAU:
            for genes in self._picked:
                yield Suggestion(genes=genes, state={"diagnostics": {"phase": PICK, "audit": self._audit.to_dict()}})

    def told(self, suggestion: Suggestion) -> Suggestion:
        own = dict(suggestion.state.get("diagnostics", {}))
        if self._audit is not None:
            own["audit"] = self._audit.to_dict()
            if self._audit.tau < LEAST_TAU:
                own["note"] = f"the scores rank no better than tau {self._audit.tau:.2f}: bo proposes without them"
        elif self._audited and self._audit_over:
            own["note"] = "too few trainings of the audit have come to their end: bo proposes without the scores"
        return Suggestion(genes=suggestion.genes, state={**suggestion.state, "diagnostics": own})

    def audit(self) -> Ranking | None:
        """Scores against the first objective that is measured, over the audited trials; None while too few ended, or if
        too few are left of them all.
        """
        measured = [i for i, o in enumerate(self.problem.objectives) if o.is_quality]
        ended = [(trial.candidate.key, trial) for trial in self.completed if trial.state == "complete"]
        pairs = [
            (self._audited[key].score, losses[measured[0]])
            for key, trial in ended
            if measured and key in self._audited and (losses := self.losses(trial)) is not None
        ]
        enough = 0 if self._audit_over else min(LEAST_AUDITED, len(self._audited))
        if len(pairs) < max(LEAST_RANKED, enough):
            return None
        return ranking([score for score, _ in pairs], [loss for _, loss in pairs], seed=self.seed)

    def _picks(self, count: int) -> list[Assignment]:
        """The front of the scored candidates, the best score first and then always the one farthest from those before
        it; then what is the front without them, and so on.
        """
        finite = sorted((e for e in self._scored if np.isfinite(e.score)), key=lambda entry: entry.score)
        if not finite:
            return []
        priced = [o for o in self.problem.objectives if o.name in finite[0].costs]
        points = np.array([[entry.score, *(o.loss(entry.costs[o.name]) for o in priced)] for entry in finite])
        rank = ranks(points, np.zeros(len(points)))
        order = spread_first(points, rank, np.zeros(len(points), dtype=bool))
        return [finite[place].genes for place in order[:count]]


def _phase(trial: Trial) -> str | None:
    return trial.searcher_state.get("diagnostics", {}).get("phase")
