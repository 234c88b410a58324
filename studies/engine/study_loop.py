"""The loop of a study: baselines, the search, and the final front, with all evaluations in the ledger."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from autopeft.evaluators.atomic import atomic_write
from autopeft.evaluators.base import Costs, Evaluator, Outcome, Request, Select
from autopeft.search_space.architecture import Candidate
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.problem import (
    COPY,
    FINALIST,
    METRICS,
    SEARCH,
    Fidelity,
    Problem,
    RoleKind,
    ScoredPoint,
    Trial,
)
from autopeft.searchers import Searcher, Suggestion
from autopeft.searchers.base import WHOLE
from autopeft.searchers.halving import survivors
from autopeft.searchers.racing import continuing
from autopeft.studies.analysis.outlook import Outlook
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.engine.plan import StudyPlan, weights_path
from autopeft.studies.engine.repeated_errors import Failures
from autopeft.studies.engine.scheduled_trials import (
    FINAL_PARTS,
    Planned,
    baselines,
    ended_as,
    num_evaluations,
    observed,
)
from autopeft.studies.engine.time_budget import Pace, TimeUsed, is_over, outlook_of
from autopeft.studies.engine.watcher import Stage, Watcher
from autopeft.studies.errors import NoFeasibleCandidateError, cause, file_errors
from autopeft.studies.reports.samples import Samples, write_samples
from autopeft.studies.storage.database import GO_ON
from autopeft.studies.storage.ledger import Ledger

if TYPE_CHECKING:
    from autopeft.studies.tracking.mlflow_sync import Tracker

LOGGER = logging.getLogger(__name__)
#: Consecutive proposals without an evaluation that end the search, because the space is exhausted or infeasible.
MOST_REJECTIONS = 200
MOST_BEYOND_LIMITS = 50  # the same for candidates whose measured costs exceed a limit, in one process
#: Roles of the evaluations for the final front.
FINAL_KINDS = frozenset(kind for kind, _ in FINAL_PARTS)

#: Computes the scored candidates of a problem.
ScoreFunction = Callable[[Problem, Stage], tuple[ScoredPoint, ...]]


class StudyLoop:
    """Runs or resumes a study from the trials in its ledger.

    `scores`: for a searcher that starts from scores. `pace`: of a training, for a time limit before any has ended.
    """

    def __init__(
        self,
        problem: Problem,
        evaluator: Evaluator,
        searcher: type[Searcher],
        ledger: Ledger,
        tracker: Tracker | None,
        plan: StudyPlan,
        scores: ScoreFunction | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.problem = problem
        self.evaluator = evaluator
        self.searcher = searcher
        self.ledger = ledger
        self.tracker = tracker
        self.plan = plan
        self.scores = scores
        wanted = [o.metric for o in problem.measures] + [METRICS[name] for name in problem.limits.maxima]
        self.measured = frozenset(metric.name for metric in wanted if metric.source == "measured")
        trials, self.left_out = ledger.readable()
        self.trials: dict[int, Trial] = {trial.number: trial for trial in trials}
        self.failures = Failures(problem.space.backbone)
        self.pace = pace
        self.time = TimeUsed(ledger)
        self.samples: Samples | None = None

    @property
    def backbone(self) -> Backbone:
        """The frozen model."""
        return self.problem.space.backbone

    def snapshot(self) -> Snapshot:
        """Return the current state of the study, as it is in the ledger."""
        return Snapshot(
            study=self.plan.study,
            study_id=self.ledger.study_id,
            settings=self.ledger.settings,
            objectives=self.problem.objectives,
            reported=self.problem.reported,
            backbone=self.backbone,
            trials=tuple(self.failures.held.get(n, self.trials[n]) for n in sorted(self.trials)),
            within=self.plan.within,
            constant=self.ledger.constant,
            outlook=Outlook.read(self.ledger.outlook),
            left_out=self.left_out,
        )

    def run(self, watcher: Watcher) -> Snapshot:
        """Make all remaining evaluations and return the final state.

        Raises NoFeasibleCandidateError, RepeatedError, UnusableEnvironmentError (the disk) and KeyboardInterrupt.
        """
        self.ledger.planned = self.problem.num_trials
        with self.time.count("study"):
            return self._run(watcher)

    def _run(self, watcher: Watcher) -> Snapshot:
        watcher.plan(num_evaluations(self.plan, self.problem), len(self.snapshot().evaluated))
        with file_errors(GO_ON):
            unfinished = self.ledger.unfinished(self.problem.objectives)
            self._evaluate_planned("baseline", unfinished, self._baselines(), watcher)
            with self.time.count("search"):
                searcher = self._search(unfinished, watcher)
            # What the final front needs; each part follows from those before it.
            for kind, planned in FINAL_PARTS:
                snapshot = self.snapshot()
                done, found = len(snapshot.evaluated), list(planned(self.plan, snapshot))
                watcher.plan(done + len(found) + sum(t.role.kind in FINAL_KINDS for t in unfinished), done)
                self._evaluate_planned(kind, unfinished, found, watcher)
                unfinished = [trial for trial in unfinished if trial.role.kind != kind]
        try:
            outlook = outlook_of(searcher, self.snapshot(), self.plan.batch)
        except Exception as error:  # all trainings have ended, and nothing else needs the searcher's model
            outlook = None
            LOGGER.warning("the report does not say what more time would buy: %s", cause(error))
        self.ledger.outlook = outlook
        snapshot = self.snapshot()
        self.samples = write_samples(self.evaluator, snapshot, weights_path, self.plan.output_folder)
        if self.tracker is not None:
            self.tracker.sync(snapshot, final=True)
        if not any(row.on_front for row in snapshot.rows()):
            raise NoFeasibleCandidateError(self._why_nothing())
        return snapshot

    # Baselines

    def _baselines(self) -> Iterator[Planned]:
        known = {(t.role, t.candidate.key) for t in self.trials.values()}
        return (p for p in baselines(self.plan, self.problem.space) if (p.role, p.candidate.key) not in known)

    # The search

    def _search(self, unfinished: Sequence[Trial], watcher: Watcher) -> Searcher:
        scored = () if self.scores is None else self.scores(self.problem, watcher.stage)
        known = tuple(observed(self.plan, self.problem, self.trials.values()))
        searcher = self.searcher(replace(self.problem, scored=scored, observed=known), self.plan.seed)
        pending, beyond_limits = list(self._admitted(unfinished)), 0
        # Each suggestion depends on the earlier ones, so a killed study resumes with the same batch.
        while beyond_limits < MOST_BEYOND_LIMITS and (batch := self._fill(pending, searcher)):
            searched = [trial for trial in batch if trial.role == SEARCH]
            # Trials that must be trained to the end come first, and rungs do not stop them.
            for whole in (True, False):
                part = [trial for trial in searched if bool(trial.searcher_state.get(WHOLE)) is whole]
                if part:
                    self._evaluate_batch(part, watcher, halving=not whole)
            for trial in batch:
                if trial.role == COPY and trial.of is not None:
                    self._finish(ended_as(trial, self.trials[trial.of]))
            pending = []
            ruled_out = all(self.trials[trial.number].state == "infeasible" for trial in searched)
            beyond_limits = beyond_limits + len(searched) if ruled_out else 0
            self.time.save()
        self._record_failures()
        if not any(t.state == "complete" and t.violation <= 0 for t in self.trials.values() if t.role == SEARCH):
            raise NoFeasibleCandidateError(self._why_nothing())
        return searcher

    def _admitted(self, unfinished: Sequence[Trial]) -> Iterator[Trial]:
        """Yield unfinished trials of the search; end those that a kill kept from being ended by `_fill`."""
        for trial in unfinished:
            rejection = self._rejection(trial.candidate) if trial.role == SEARCH else None
            if rejection is not None:
                self._finish(replace(trial, state="infeasible", violation=rejection[0], error=rejection[1]))
            elif trial.role == COPY and trial.of is not None and self.trials[trial.of].state != "running":
                self._finish(ended_as(trial, self.trials[trial.of]))
            elif trial.role in (SEARCH, COPY):
                yield trial

    def _fill(self, pending: Sequence[Trial], searcher: Searcher) -> list[Trial]:
        """Return the next batch: the trials `pending` and new ones, until it is full or the search has all its trials.

        Copies of a candidate in the batch do not count. Infeasible trials and copies of ended trials end at once.
        """
        batch, rejected = list(pending), 0

        def num_admitted() -> int:
            return self._num_searched() + sum(trial.role == SEARCH for trial in batch)

        # Batches are consecutive blocks of trials. A batch that was interrupted after some of its trials had ended is
        # not filled up again: its trials were chosen without the results of that part.
        size, admitted = self.plan.batch, num_admitted()
        end = admitted if batch and admitted % size == 0 else (admitted // size + 1) * size
        while (
            num_admitted() < min(end, self.problem.num_trials)
            and rejected < MOST_REJECTIONS
            and not self._out_of_time(num_admitted() and 1 + sum(trial.role == SEARCH for trial in batch))
        ):
            suggestion = self._suggestion(searcher, batch)
            if suggestion is None:
                break
            candidate = self.problem.space.decode(suggestion.genes)
            duplicate = self._duplicate(candidate, batch)
            trial = self.ledger.begin(
                self.problem,
                SEARCH if duplicate is None else COPY,
                candidate,
                genes=suggestion.genes,
                seed=self.plan.seed,
                searcher_state=suggestion.state,
                of=None if duplicate is None else duplicate.number,
            )
            self.trials[trial.number] = trial
            rejection = self._rejection(candidate)
            if duplicate is not None and duplicate.state != "running":
                self._finish(ended_as(trial, duplicate))
            elif duplicate is None and rejection is not None:
                self._finish(replace(trial, state="infeasible", violation=rejection[0], error=rejection[1]))
            else:
                batch.append(trial)
            rejected = 0 if trial in batch and duplicate is None else rejected + 1
        return batch

    def _suggestion(self, searcher: Searcher, batch: Sequence[Trial]) -> Suggestion | None:
        """Return the next point: start points first, then the searcher's suggestions; None if there are no more."""
        suggested = [self.trials[n] for n in sorted(self.trials) if self.trials[n].role in (SEARCH, COPY)]
        # Each suggestion is a trial, whatever its outcome, so the ledger has the number of suggestions so far.
        if len(suggested) < len(self.problem.start):
            return Suggestion(genes=self.problem.start[len(suggested)])
        searcher.update([trial for trial in suggested if trial.state != "running"], batch)
        return next(iter(searcher.suggest(1)), None)

    def _num_searched(self) -> int:
        return sum(t.role == SEARCH and t.state in ("complete", "pruned", "failed") for t in self.trials.values())

    def _out_of_time(self, more: int) -> bool:
        return is_over(self.plan, self.problem.space, self.trials.values(), self.time, more, self.pace)

    def _duplicate(self, candidate: Candidate, batch: Sequence[Trial]) -> Trial | None:
        """Return a trial of the search with the same network and training, which is not evaluated again."""
        key = candidate.key
        searched = (t for t in self.trials.values() if t.role == SEARCH and (t.state != "running" or t in batch))
        return next((t for t in searched if t.candidate.key == key), None)

    def _why_nothing(self) -> str:
        reasons = [t.error or "a value exceeds a bound" for t in self.trials.values() if t.role == SEARCH]
        if not reasons and self.plan.timeout_s is not None and self._out_of_time(0):
            limit = f"search.timeout_s ({self.plan.timeout_s:g} s) is too short: it ran out"
            return f"{limit} before a candidate was trained; the scores of `proxy` take time, too"
        shown = "\n  ".join(dict.fromkeys(reasons[-5:]))
        return f"none of {len(reasons)} candidates is feasible; reasons of the last ones:\n  {shown}"

    # Evaluations

    def _evaluate_planned(
        self, kind: RoleKind, unfinished: Sequence[Trial], planned: Iterable[Planned], watcher: Watcher
    ) -> None:
        """Evaluate unfinished trials with a role of this kind, and the planned ones."""
        trials = [trial for trial in unfinished if trial.role.kind == kind]
        trials += [self.ledger.begin(self.problem, p.role, p.candidate, seed=p.seed, of=p.of) for p in planned]
        self._evaluate_batch(trials, watcher)
        self._record_failures()

    def _evaluate_batch(self, trials: Sequence[Trial], watcher: Watcher, halving: bool = False) -> None:
        """Evaluate trials side by side and record their outcomes."""
        from autopeft.evaluators.training.record import failure

        weighed: list[tuple[Trial, Costs]] = []
        for trial in trials:
            self.trials[trial.number] = trial
            watcher.begin([trial])  # measuring costs takes a while
            try:
                rejection, costs = self._weigh(trial)
            except Exception as error:  # a failed measurement ends only this trial
                self._end([self._ended(trial, Costs(values={}), failure(self._request(trial), error))], watcher)
                continue
            if rejection is None:
                weighed.append((trial, costs))
            else:
                self._end([replace(trial, state="infeasible", violation=rejection[0], error=rejection[1])], watcher)
        requests = [self._request(trial) for trial, _ in weighed]
        select = self._selection([costs for _, costs in weighed]) if halving else None
        watcher.begin([trial for trial, _ in weighed])

        def ended(index: int, outcome: Outcome) -> None:
            self._end([self._ended(*weighed[index], outcome)], watcher)

        # The selection at a rung depends on the whole batch, so its trials are recorded together: all of them or none.
        if select is None:
            self.evaluator.evaluate(requests, watcher.step, ended=ended)
        elif requests:
            outcomes = self.evaluator.evaluate(requests, watcher.step, select=select)
            self._end([self._ended(*pair, o) for pair, o in zip(weighed, outcomes, strict=True)], watcher)

    def _selection(self, costs: Sequence[Costs]) -> Select | None:
        """Return the selection at the rungs, by the held-out loss and the costs among the objectives."""
        keep = self.plan.keep
        if keep == 1.0 or not self.plan.rungs:
            return None
        priced = [o for o in self.problem.objectives if not o.is_quality]

        def select(rung: float, found: Sequence[tuple[int, Mapping[str, float]]]) -> list[int]:
            losses = [
                [values["loss"], *(o.loss(costs[index].values[o.name]) for o in priced)] for index, values in found
            ]
            if isinstance(keep, str):
                places = continuing(self.problem, self.trials.values(), rung, losses)
            else:
                places = survivors(losses, keep)
            return [found[place][0] for place in places]

        return select

    def _ended(self, trial: Trial, costs: Costs, outcome: Outcome) -> Trial:
        """Return a trial with its outcome."""
        if outcome.measurement is None:
            state = outcome.failure or "failed"
            violation = 1.0 if state == "infeasible" else 0.0
            ended = replace(trial, state=state, violation=violation, error=outcome.reason)
            if outcome.error is not None:
                self.failures.add(trial, ended, outcome.error)
            return ended
        values = {**outcome.measurement.values, **costs.values}
        measurement = replace(outcome.measurement, values=values, spread=costs.spread)
        if measurement.share < self._request(trial).fidelity.share:
            why = f"loss {values['loss']:.4g} after {measurement.share:.0%} of the steps"
            return replace(trial, state="pruned", measurement=measurement, error=why)
        self._save_weights(trial, outcome)
        return replace(trial, state="complete", measurement=measurement, violation=self.problem.violation(values))

    def _weigh(self, trial: Trial) -> tuple[tuple[float, str] | None, Costs]:
        """Return the rejection of a candidate of the search, if there is one, and its costs.

        Declared costs come first: a candidate that they rule out is not measured.
        """
        rejection = self._rejection(trial.candidate) if trial.role == SEARCH else None
        if rejection is not None:
            return rejection, Costs(values={})
        costs = self.evaluator.costs(trial.candidate, self.measured)
        return (self.problem.limits.rejection(costs.values) if trial.role == SEARCH else None), costs

    def _request(self, trial: Trial) -> Request:
        final = trial.role.kind in FINAL_KINDS
        share = self.plan.share if trial.role == SEARCH else 1.0
        return Request(
            candidate=trial.candidate,
            seed=trial.seed,
            fidelity=Fidelity(share=share, rungs=() if final else self.plan.rungs),
            test=final,
            keep_weights=trial.role == FINALIST and trial.seed == self.plan.seed + 1,
        )

    def _rejection(self, candidate: Candidate) -> tuple[float, str] | None:
        """Return the violation and the reason if a candidate's declared costs rule it out, else None."""
        if not candidate.architecture:
            return 1.0, "no adapter is on: that is the baseline `head`"
        return self.problem.limits.rejection(self.evaluator.costs(candidate).values)

    def _end(self, trials: Sequence[Trial], watcher: Watcher) -> None:
        self._finish(*trials)
        snapshot = self.snapshot()
        if self.tracker is not None:
            self.tracker.sync(snapshot)
        for trial in trials:
            watcher.end(trial, snapshot)
        self.failures.check(self.trials.values())

    def _finish(self, *trials: Trial) -> None:
        self.trials.update({trial.number: trial for trial in trials})
        self.ledger.finish([trial for trial in trials if not self.failures.holds(trial)], self.problem.objectives)

    def _record_failures(self) -> None:
        self._finish(*(self.trials[number] for number in self.failures.release()))

    def _save_weights(self, trial: Trial, outcome: Outcome) -> None:
        if outcome.weights is None or trial.of is None:
            return
        path = weights_path(self.plan.output_folder, trial.of)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            save_file(dict(outcome.weights), temporary)
