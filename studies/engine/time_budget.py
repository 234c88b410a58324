"""Time: what fits into the minutes that a user gives, by a measured training, and what more of them would buy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any

from autopeft.search_space.problem import SEARCH, Trial
from autopeft.studies.analysis.outlook import Outlook, num_searched
from autopeft.studies.config.problem import problem_for
from autopeft.studies.config.sections.training import PACKED
from autopeft.studies.engine.plan import StudyPlan, plan_of
from autopeft.studies.engine.scheduled_trials import baselines, num_finals, runs_per_finalist
from autopeft.studies.errors import ConfigurationError, UnusableEnvironmentError, cause

if TYPE_CHECKING:
    from autopeft.evaluators.training.base import TrainingEvaluator
    from autopeft.search_space.architecture import Candidate
    from autopeft.search_space.spaces.space import SearchSpace
    from autopeft.searchers import Searcher
    from autopeft.studies.analysis.snapshot import Snapshot
    from autopeft.studies.config.study_file import StudyFile
    from autopeft.studies.storage.ledger import Ledger

#: Seconds to measure a training step; a model of which one step takes longer is measured with fewer rows.
MEASURED_S = 12.0
#: Interquartile range of the times of a step, relative to their median, that is worth a word.
LARGE_SPREAD = 0.2
#: Random candidates whose median size is typical of a space.
SAMPLES = 100
#: Share of the time after the baselines that goes to the finalists.
FINALISTS_SHARE = 0.35
#: Settings that `minutes` decides where the file leaves them out, by section.
DECIDED = {"search": ("trials", "batch", "rungs", "keep"), "finalists": ("seeds", "most")}
#: The recommendation needs at least these; more than `MOST_FINALISTS` hardly ever decide it.
LEAST_TRIALS, LEAST_FINALISTS, MOST_FINALISTS = 8, 2, 8
SEEDS = (3, 2)
#: With fewer trials too few of them end for the rungs to predict anything, and batches are smaller.
TRIALS_FOR_RUNGS = 16
RUNGS = (0.15, 0.4)
#: Share of the steps that racing at these rungs takes in replays (docs/searchers.md).
RACING_SHARE = 0.7
MOST_TRIALS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds of one training on this machine: all its steps, its validation scores and its test scores.

    Scores are with those of the retained rows, if there are any. `texts_s`: the part of `validation_s` that generates
    texts. `rung_s`: seconds of the texts at a rung, `at_rungs`: whether they are generated also where no candidate may
    stop. `spread`, `share`: how a step was measured, as in `StepTimes`.
    """

    step_s: float
    steps_s: float
    validation_s: float
    test_s: float
    texts_s: float = 0.0
    rung_s: float = 0.0
    at_rungs: bool = False
    spread: float = 0.0
    share: float = 1.0

    @classmethod
    def measured(cls, evaluator: TrainingEvaluator, candidate: Candidate) -> Pace:
        """Measure a step, scores and texts of a candidate, for about `MEASURED_S` seconds."""
        from autopeft.evaluators.base import Request
        from autopeft.evaluators.data.splits import RETAINED

        found = evaluator.pace(candidate, MEASURED_S)
        row_s = found.scores_s / evaluator.training(candidate).batch_size
        length = fmean(evaluator.lengths["train"])

        def documents_s(split: str) -> float:
            return sum(
                row_s * sum(evaluator.lengths[each.key(split)]) / length
                + found.answer_s.get(each.name, 0.0) * len(each.prompts[split])
                for each in evaluator.requests
            )

        def scores_s(split: str) -> float:
            # Retained rows are other texts, of other lengths, after which nothing is generated.
            retained = evaluator.lengths[RETAINED[split]] if evaluator.forgetting is not None else ()
            own_s = (row_s + found.text_s) * len(evaluator.examples[split])
            return row_s * sum(retained) / length + own_s + documents_s(split)

        return cls(
            step_s=found.step_s,
            steps_s=found.step_s * evaluator.num_steps(Request(candidate=candidate)),
            validation_s=scores_s("validation"),
            test_s=scores_s("test"),
            texts_s=found.text_s * len(evaluator.examples["validation"]),
            rung_s=found.text_s * len(evaluator.rung_examples) + documents_s("validation"),
            at_rungs=evaluator.generation.at_rungs,
            spread=found.spread,
            share=found.share,
        )

    @classmethod
    def typical(cls, settings: StudyFile, evaluator: TrainingEvaluator) -> Pace:
        """Measure a candidate of median size of the study's space."""
        drawn = samples(problem_for(settings, evaluator.backbone).space, settings.seed)
        return cls.measured(evaluator, drawn[len(drawn) // 2])

    def run_s(self, share: float = 1.0) -> float:
        """Return the seconds of a training of this share of the steps."""
        return share * self.steps_s + self.validation_s

    def trial_s(self, plan: StudyPlan) -> float:
        """Return the mean seconds of a candidate of the search, given the rungs."""
        keep = 1.0 if plan.keep == "auto" else plan.keep
        generates = self.at_rungs or plan.keep != 1.0
        reached = sum(keep**rung for rung in range(len(plan.rungs))) if generates else 0.0
        return self.run_s(mean_share(plan)) + reached * self.rung_s

    def notes(self) -> Iterator[str]:
        """Yield why the times may be wrong."""
        if self.share < 1.0:
            yield (
                f"all rows of a training step take long or do not fit, so the time is from {self.share:.0%} of its rows"
                " and may be too high"
            )
        if self.spread > LARGE_SPREAD:
            yield (
                f"the measured times of a training step spread by {self.spread:.0%}: other work slows this machine, and"
                " the estimated time is as uncertain"
            )

    @property
    def final_s(self) -> float:
        """Seconds of a finalist's training."""
        return self.run_s() + self.test_s


def pace_of(settings: StudyFile, evaluator: TrainingEvaluator, ledger: Ledger | None) -> Pace | None:
    """Measure a training where the study has a time limit and no training of its search has ended yet.

    Raises UnusableEnvironmentError if that fails and `minutes` has to decide the study by it.
    """
    timed = settings.minutes is not None or settings.search.timeout_s is not None
    if not timed or (ledger is not None and any(t.role == SEARCH and t.measurement for t in ledger.trials())):
        return None
    try:
        return Pace.typical(settings, evaluator)
    except Exception as error:
        if ledger is not None or settings.minutes is None:
            return None
        raise UnusableEnvironmentError(
            f"minutes: a training of median size cannot be measured ({cause(error)}), so nothing says how many fit;"
            " leave minutes out and set search.trials"
        ) from error


def samples(space: SearchSpace, seed: int) -> list[Candidate]:
    """Return random candidates with adapters, the smallest first; the largest of the space where none was drawn."""
    rng = Random(seed)
    drawn = (space.decode(space.sample(rng)) for _ in range(SAMPLES))
    found = [candidate for candidate in drawn if candidate.architecture] or [space.decode(space.largest())]
    return sorted(found, key=lambda candidate: candidate.architecture.num_params(space.backbone))


class TimeUsed:
    """The seconds that the parts of a study have used, over all its runs: "study" as a whole, and its "search".

    The ledger has them as they were at the last `save`. A kill loses those after it.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        #: Returns seconds.
        self.clock: Callable[[], float] = time.monotonic
        self._before = ledger.used_s
        self._since: dict[str, float] = {}

    def __getitem__(self, part: str) -> float:
        begun = self._since.get(part)
        return self._before.get(part, 0.0) + (0.0 if begun is None else self.clock() - begun)

    @contextmanager
    def count(self, part: str) -> Iterator[None]:
        """Count the time of the block."""
        self._since[part] = self.clock()
        try:
            yield
        except BaseException:
            with suppress(UnusableEnvironmentError):  # of the same full disk: the first error says more
                self.save()
            raise
        self._before = self.save()
        self._since = dict.fromkeys(self._since.keys() - {part}, self.clock())

    def save(self) -> Mapping[str, float]:
        """Write the seconds so far to the ledger, and return them."""
        self.ledger.used_s = found = {part: self[part] for part in {*self._before, *self._since}}
        return found


def within_minutes(settings: StudyFile, evaluator: TrainingEvaluator, pace: Pace | None) -> StudyFile:
    """Return the settings that fit into `minutes` at this pace; see `fitted`."""
    if settings.minutes is None:
        return settings
    assert pace is not None
    space, plan = problem_for(settings, evaluator.backbone).space, plan_of(settings)
    return fitted(settings, pace, len(list(baselines(plan, space))), runs_per_finalist(plan, space))


def mean_share(plan: StudyPlan) -> float:
    """Return the mean share of the training steps that a candidate of the search gets, given the rungs."""
    if plan.keep == "auto":
        return RACING_SHARE * plan.share
    stops = (0.0, *plan.rungs, plan.share)
    return sum((end - start) * plan.keep**rung for rung, (start, end) in enumerate(pairwise(stops)))


def fitted(settings: StudyFile, pace: Pace, num_baselines: int, runs_per_finalist: int = 1) -> StudyFile:
    """Return settings with everything that `minutes` decides (`DECIDED`) and the file does not set.

    `num_baselines`: trainings of baselines, which come first. Of the time after them, finalists get
    `FINALISTS_SHARE`, with three seeds where that is enough for four of them, and the search the rest.
    `runs_per_finalist`: of each seed, with matched baselines. Raises ConfigurationError if too little is left.
    """
    if settings.minutes is None:
        return settings
    own, total_s = settings.finalists, 60 * settings.minutes
    baselines_s, names = num_baselines * pace.run_s(), len(settings.baselines.names)
    left_s, final_s = total_s - baselines_s, runs_per_finalist * pace.final_s
    least_trials = max(LEAST_TRIALS, settings.search.initial or 0, len(settings.search.start))
    least_trials = settings.search.trials if "trials" in settings.search.model_fields_set else least_trials
    runs = int(FINALISTS_SHARE * left_s / final_s)
    seeds = own.seeds if "seeds" in own.model_fields_set else SEEDS[runs < SEEDS[0] * (4 + names)]
    most = min(MOST_FINALISTS, max(LEAST_FINALISTS, runs // seeds - names))
    most = own.most if "most" in own.model_fields_set else most
    search_s = left_s - seeds * (most + names) * final_s
    search = settings.search
    if search_s > TRIALS_FOR_RUNGS * pace.run_s() and _may_race(settings):
        search = unset(search, rungs=RUNGS, keep="auto")
    trial_s = pace.trial_s(plan_of(settings.model_copy(update={"search": search})))
    if search_s < least_trials * trial_s:
        needed = (total_s - search_s + least_trials * trial_s) / 60
        raise ConfigurationError(
            f"minutes: {settings.minutes:g} is too short on this machine: a training takes {pace.run_s():.0f} s, the"
            f" {num_baselines} of the baselines {baselines_s / 60:.1f} min, the finalists"
            f" {seeds * (most + names) * final_s / 60:.1f} min, {least_trials} trials"
            f" {least_trials * trial_s / 60:.1f} min; about {needed:.1f} would do, or fewer rows, epochs,"
            " baselines.names or baselines.learning_rates"
        )
    search = unset(search, trials=min(MOST_TRIALS, int(search_s / trial_s)))
    search = unset(search, batch=max(1, min(8, search.trials // 4)))
    return settings.model_copy(update={"search": search, "finalists": unset(own, seeds=seeds, most=most)})


def _may_race(settings: StudyFile) -> bool:
    """Return whether the rungs of `RUNGS` with `keep: auto` are possible, and the file sets neither."""
    free = not {"rungs", "keep"} & settings.search.model_fields_set and settings.search.share == 1.0
    return free and settings.has_quality_and_cost and settings.evaluation.evaluator == PACKED


def is_over(
    plan: StudyPlan,
    space: SearchSpace,
    trials: Iterable[Trial],
    used: TimeUsed | Mapping[str, float],
    more: int,
    pace: Pace | None = None,
) -> bool:
    """Return whether the search has to end rather than train `more` candidates: they would exceed a time limit.

    Each is expected to take as long as the trainings of the search so far, the first ones as long as by `pace`. The
    limit is `timeout_s` for the search alone; `minutes` for the study with its finalists, which are expected to take as
    long as the complete trials of the search.
    """
    searched = [t for t in trials if t.role == SEARCH and t.measurement is not None]
    one_s = _mean_s(searched) or (0.0 if pace is None else pace.trial_s(plan))
    if plan.timeout_s is not None and used["search"] + more * one_s > plan.timeout_s:
        return True
    finals_s = num_finals(plan, space) * _mean_s([t for t in searched if t.state == "complete"])
    return plan.minutes is not None and used["study"] + more * one_s + finals_s > 60 * plan.minutes


def _mean_s(trials: Iterable[Trial]) -> float:
    found = [trial.measurement.wall_s for trial in trials if trial.measurement is not None]
    return sum(found) / len(found) if found else 0.0


def unset(section: Any, **values: Any) -> Any:
    """Return a section with those of the values that the file does not set."""
    return section.model_copy(update={k: v for k, v in values.items() if k not in section.model_fields_set})


def outlook_of(searcher: Searcher, snapshot: Snapshot, trials: int) -> Mapping[str, Any] | None:
    """Return the outlook as plain data.

    None where the searcher has no model, or does not know the best member of the front or the recommended one: a
    baseline outside of its space.
    """
    found = snapshot.front().recommendation
    cost = next((objective for objective in snapshot.objectives if objective.is_cost), None)
    if found is None or cost is None:
        return None
    if snapshot.outlook is not None and snapshot.outlook.is_about(found, snapshot.evaluated):
        return asdict(snapshot.outlook)  # a finished study that is only shown again proposes nothing
    members = [snapshot.entry(number).trial for number in (found.best, found.recommended)]
    known = {trial.candidate.key for trial in (*snapshot.search_trials, *searcher.problem.observed)}
    spent_s = [t.measurement.wall_s for t in snapshot.evaluated if t.role == SEARCH and t.measurement is not None]
    if not spent_s or any(trial.candidate.key not in known for trial in members):
        return None
    searcher.update(snapshot.search_trials)
    chance = searcher.chance_of_cheaper(trials, cost.loss(members[-1].values[cost.name]))
    if chance is None:
        return None
    minutes = chance[0] * sum(spent_s) / len(spent_s) / 60
    return asdict(
        Outlook(
            recommended=found.recommended,
            after=num_searched(snapshot.evaluated),
            margin=found.margin,
            trials=chance[0],
            minutes=minutes,
            chance=chance[1],
        )
    )
