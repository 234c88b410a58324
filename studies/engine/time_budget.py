"""Time: what fits into the minutes that a user gives, by a measured training, and what more of them would buy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING, Any

from autopeft.search_space.problem import COSTS, SEARCH
from autopeft.studies.analysis.outlook import Outlook
from autopeft.studies.config.problem import problem_for
from autopeft.studies.config.settings import PACKED
from autopeft.studies.engine.plan import StudyPlan, plan_of
from autopeft.studies.engine.scheduled_trials import baselines
from autopeft.studies.errors import ConfigurationError

if TYPE_CHECKING:
    from autopeft.evaluators.training.base import TrainingEvaluator
    from autopeft.search_space.architecture import Candidate
    from autopeft.search_space.spaces.space import SearchSpace
    from autopeft.searchers import Searcher
    from autopeft.studies.analysis.snapshot import Snapshot
    from autopeft.studies.config.study_file import StudyFile

#: Random candidates whose median size is typical of a space.
SAMPLES = 100
#: Share of the time after the baselines that goes to the finalists.
FINALISTS_SHARE = 0.35
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
    """Seconds of one training on this machine: all its steps, its validation scores and its test scores."""

    step_s: float
    steps_s: float
    validation_s: float
    test_s: float

    @classmethod
    def measured(cls, evaluator: TrainingEvaluator, candidate: Candidate) -> Pace:
        """Measure a step and a forward pass of a candidate."""
        from autopeft.evaluators.base import Request

        found = evaluator.costs(candidate, frozenset({"step_s", "latency_s"})).values
        row_s = found["latency_s"] / evaluator.training(candidate).batch_size
        return cls(
            step_s=found["step_s"],
            steps_s=found["step_s"] * evaluator.num_steps(Request(candidate=candidate)),
            validation_s=row_s * len(evaluator.examples["validation"]),
            test_s=row_s * len(evaluator.examples["test"]),
        )

    def run_s(self, share: float = 1.0) -> float:
        """Return the seconds of a training of this share of the steps."""
        return share * self.steps_s + self.validation_s

    @property
    def final_s(self) -> float:
        """Seconds of a finalist's training."""
        return self.run_s() + self.test_s


def samples(space: SearchSpace, seed: int) -> list[Candidate]:
    """Return random candidates with adapters, the smallest first; the largest of the space where none was drawn."""
    rng = Random(seed)
    drawn = (space.decode(space.sample(rng)) for _ in range(SAMPLES))
    found = [candidate for candidate in drawn if candidate.architecture] or [space.decode(space.largest())]
    return sorted(found, key=lambda candidate: candidate.architecture.num_params(space.backbone))


def within_minutes(settings: StudyFile, evaluator: TrainingEvaluator) -> StudyFile:
    """Measure a training of median size, and return the settings that fit into `minutes`; see `fitted`."""
    if settings.minutes is None:
        return settings
    space = problem_for(settings, evaluator.backbone).space
    drawn = samples(space, settings.seed)
    pace = Pace.measured(evaluator, drawn[len(drawn) // 2])
    return fitted(settings, pace, len(list(baselines(plan_of(settings), space))))


def mean_share(plan: StudyPlan) -> float:
    """Return the mean share of the training steps that a candidate of the search gets, at most, given the rungs."""
    keep = 1.0 if plan.keep == "auto" else plan.keep
    stops = (0.0, *plan.rungs, plan.share)
    return sum((end - start) * keep**rung for rung, (start, end) in enumerate(pairwise(stops)))


def fitted(settings: StudyFile, pace: Pace, num_baselines: int) -> StudyFile:
    """Return settings with everything that `minutes` decides and the file does not set.

    `num_baselines`: trainings of baselines, which come first. Of the time after them, finalists get
    `FINALISTS_SHARE`, with three seeds where that is enough for four of them, and the search the rest.
    Raises ConfigurationError if too little is left for a search and its finalists.
    """
    if settings.minutes is None:
        return settings
    own, plan, total_s = settings.finalists, plan_of(settings), 60 * settings.minutes
    left_s = total_s - num_baselines * pace.run_s()
    names = len(plan.baselines)
    least_s = LEAST_TRIALS * pace.run_s(plan.share) + SEEDS[-1] * (LEAST_FINALISTS + names) * pace.final_s
    if left_s < least_s:
        needed = (total_s - left_s + least_s) / 60
        raise ConfigurationError(
            f"minutes: {settings.minutes:g} is too short on this machine: a training takes {pace.run_s():.0f} s, the"
            f" {num_baselines} of the baselines {(total_s - left_s) / 60:.1f} min; the least is {needed:.1f}, or fewer"
            " rows, epochs, baselines.names or baselines.learning_rates"
        )
    runs = int(FINALISTS_SHARE * left_s / pace.final_s)
    seeds = own.seeds if "seeds" in own.model_fields_set else SEEDS[runs < SEEDS[0] * (4 + names)]
    most = min(MOST_FINALISTS, max(LEAST_FINALISTS, runs // seeds - names))
    most = own.most if "most" in own.model_fields_set else most
    search_s = left_s - seeds * (most + names) * pace.final_s
    search = unset(settings.search, timeout_s=max(search_s, 1.0) + total_s - left_s)
    racing = search_s > TRIALS_FOR_RUNGS * pace.run_s() and {o.name in COSTS for o in settings.objectives} == {
        True,
        False,
    }
    if racing and settings.evaluation.evaluator == PACKED and not {"rungs", "keep"} & search.model_fields_set:
        search = unset(search, rungs=tuple(RUNGS), keep="auto")
    share = RACING_SHARE * plan.share if search.keep == "auto" else mean_share(plan)
    trials = min(MOST_TRIALS, max(LEAST_TRIALS, int(search_s / pace.run_s(share))))
    search = unset(search, trials=trials, batch=max(1, min(8, trials // 4)))
    return settings.model_copy(update={"search": search, "finalists": unset(own, seeds=seeds, most=most)})


def unset(section: Any, **values: Any) -> Any:
    """Return a section with those of the values that the file does not set."""
    return section.model_copy(update={k: v for k, v in values.items() if k not in section.model_fields_set})


def outlook_of(searcher: Searcher, snapshot: Snapshot, trials: int) -> Mapping[str, Any] | None:
    """Return the outlook as plain data; None where the searcher has no model, or nothing is recommended."""
    found = snapshot.front().recommendation
    cost = next((objective for objective in snapshot.objectives if not objective.is_quality), None)
    if found is None or cost is None:
        return None
    searcher.update(snapshot.search_trials)
    chance = searcher.chance_of_cheaper(trials, cost.loss(snapshot.entry(found.recommended).trial.values[cost.name]))
    spent_s = [t.measurement.wall_s for t in snapshot.evaluated if t.role == SEARCH and t.measurement is not None]
    if chance is None or not spent_s:
        return None
    minutes = trials * sum(spent_s) / len(spent_s) / 60
    return asdict(Outlook(recommended=found.recommended, trials=trials, minutes=minutes, chance=chance))
