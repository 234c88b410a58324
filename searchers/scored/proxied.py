"""The searcher `proxy`: the best of many candidates that were scored without training, once the scores are audited."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from typing_extensions import override

from autopeft.search_space.problem import Problem, ScoredPoint, Trial
from autopeft.search_space.spaces.genes import Assignment
from autopeft.searchers.base import WHOLE, Suggestion
from autopeft.searchers.genetic import ranks, spread_first
from autopeft.searchers.scored.from_scores import FromScores
from autopeft.searchers.scored.ranking import LEAST_RANKED, RankCorrelation, rank_correlation, strata

#: Bounds on the number of candidates that are trained to audit the scores: a quarter of the trials, within these.
LEAST_AUDITED, MOST_AUDITED = 8, 16
#: Kendall's tau below which the scores are not followed.
LEAST_TAU = 0.3
#: Share of the trials after the audit that the scores choose. Scores do not depend on learning rates, and only rank
#: quality; the rest goes to a searcher that has seen the results of the trainings.
PICKED_SHARE = 0.5
AUDIT, PICK = "audit", "proxy"


class Proxied(FromScores):
    """Search that starts from `Problem.scored`: candidates and their scores, less is better.

    The scores come from a supernet or a proxy without training. First a stratified sample is trained, one candidate
    drawn from each group of neighbouring scores. If Kendall's tau of scores and losses is at least `LEAST_TAU`, the
    front of the scored candidates (score against costs) is trained next, spread over its length, and `bo` continues
    from all trials. Otherwise `bo` takes over at once, and the diagnostics say so. Whatever the scores, every member
    of the study's front has been trained alone. Candidates whose declared costs are beyond the limits or bounds are
    left out.
    """

    name = "proxy"
    summary = "the best of thousands of candidates scored by a supernet or another proxy, audited first"

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem, seed)
        self._scored = [entry for entry in problem.scored if problem.violation(entry.costs) <= 0]
        count = max(LEAST_AUDITED, min(MOST_AUDITED, problem.num_trials // 4))
        places = strata([entry.score for entry in self._scored], count, np.random.default_rng(seed))
        #: The candidates of the audit, by their keys.
        self._audited = {problem.space.decode(e.genes).key: e for e in (self._scored[place] for place in places)}
        self._picked = self._picks(round(PICKED_SHARE * max(0, problem.num_trials - len(self._audited))))
        self._audit: RankCorrelation | None = None
        self._audit_over = False

    @override
    def update(self, completed: Sequence[Trial], pending: Sequence[Trial] = ()) -> None:
        super().update(completed, pending)
        begun = {
            trial.candidate.key: entry
            for trial in (*completed, *pending)
            if _phase(trial) == AUDIT and (entry := self._entry(trial))
        }
        if not begun.keys() <= self._audited.keys():
            # These were drawn when the study had another number of trials: they are the audit.
            most = max(LEAST_AUDITED, len(begun))
            self._audited = dict(islice((begun | self._audited).items(), most))
        self._audit_over = self._audited.keys() <= {trial.candidate.key for trial in completed}
        self._audit = self.audit()

    def _entry(self, trial: Trial) -> ScoredPoint | None:
        audited = self._audited.get(trial.candidate.key)
        return audited or next((entry for entry in self._scored if entry.genes == trial.genes), None)

    @override
    def queue(self) -> Iterator[Suggestion]:
        for entry in self._audited.values():
            # Trained to its end: the loss at a rung says less than the full training that scores are to predict.
            yield Suggestion(genes=entry.genes, state={"diagnostics": {"phase": AUDIT}, WHOLE: True})
        if self._audit is not None and self._audit.tau >= LEAST_TAU:
            for genes in self._picked:
                yield Suggestion(genes=genes, state={"diagnostics": {"phase": PICK, "audit": self._audit.to_dict()}})

    @override
    def annotated(self, suggestion: Suggestion) -> Suggestion:
        own = dict(suggestion.state.get("diagnostics", {}))
        if self._audit is not None:
            own["audit"] = self._audit.to_dict()
            if self._audit.tau < LEAST_TAU:
                own["note"] = f"the scores rank no better than tau {self._audit.tau:.2f}: bo proposes without them"
        elif self._audited and self._audit_over:
            own["note"] = "too few trainings of the audit have come to their end: bo proposes without the scores"
        return Suggestion(genes=suggestion.genes, state={**suggestion.state, "diagnostics": own})

    def audit(self) -> RankCorrelation | None:
        """Correlate scores with the first measured objective over the audited trials.

        Returns None while too few of them ended, or if too few of all are complete.
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
        return rank_correlation([score for score, _ in pairs], [loss for _, loss in pairs], seed=self.seed)

    def _picks(self, count: int) -> list[Assignment]:
        """Return up to `count` scored candidates, front by front.

        Within a front the best score comes first, then always the candidate farthest from all before it.
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
    phase: str | None = trial.searcher_state.get("diagnostics", {}).get("phase")
    return phase
