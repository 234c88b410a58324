"""Scheduled evaluations besides the search: baselines before it, finalists and matched baselines after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from autopeft.search_space.architecture import Candidate
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.metrics import FORGETTING
from autopeft.search_space.problem import FINALIST, Problem, Role, RoleKind, Trial
from autopeft.search_space.spaces.controls import CONTROLS, controls
from autopeft.search_space.spaces.location import locate
from autopeft.search_space.spaces.rules import ALL_BASELINES, RULES
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.studies.analysis.recommendation import first_look
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.engine.plan import StudyPlan


@dataclass(frozen=True, slots=True)
class Planned:
    """A future evaluation. `of`: the number of the trial that it repeats or accompanies."""

    role: Role
    candidate: Candidate
    seed: int
    of: int | None = None


def baselines(plan: StudyPlan, space: SearchSpace) -> Iterator[Planned]:
    """Yield baselines at their learning rates; other training settings as in the study, ranges at their middle."""
    middle = space.middle.training
    for name in plan.baselines:
        architecture = ALL_BASELINES[name](space.backbone)
        if not architecture and not (name == "head" and space.backbone.head_modules):
            continue  # the model lacks a head, or the parameters that the baseline trains, such as biases
        for rate in _rates(plan, name, space.backbone):
            candidate = Candidate(architecture=architecture, training={**middle, "learning_rate": rate})
            yield Planned(Role("baseline", name), candidate, plan.seed)


def _rates(plan: StudyPlan, name: str, backbone: Backbone) -> tuple[float, ...]:
    rule = RULES.get(name)
    if rule is not None and rule.learning_rate is not None:
        return (rule.learning_rate(backbone),)
    return plan.full_learning_rates if name == "full" else plan.learning_rates


def observed(plan: StudyPlan, problem: Problem, trials: Iterable[Trial]) -> Iterator[Trial]:
    """Yield complete baselines that are points of the space and were trained as long as the search's trials."""
    for trial in trials:
        if trial.role.kind == "baseline" and trial.state == "complete" and plan.share == 1.0:
            within = trial.candidate.architecture and problem.limits.rejection(trial.values) is None
            genes = locate(problem.space, trial.candidate) if within else None
            if genes is not None:
                yield replace(trial, genes=genes)


def contenders(plan: StudyPlan, snapshot: Snapshot) -> list[Trial]:
    """Return at most `most_finalists` trials of the search to be trained again, the best quality first.

    They are the search's front and, while there is room, the front of all others, and so on: single runs decide on the
    fronts, and one lucky run dominates many. A front without enough room is thinned over its length. With the goal
    "cheapest_as_good", three quarters of the room are for trials that may be within the margin of the best; so they are
    where forgetting is an objective, because those that have learnt little are on the front for it. None is beyond a
    bound: it can be neither on the front nor the best one.
    """
    trials = [t for t in snapshot.search_trials if t.state == "complete" and t.violation <= 0]
    near_first = plan.goal == "cheapest_as_good" or FORGETTING.name in snapshot.objectives_by_name
    near = snapshot.within_reach(trials) if near_first else trials
    far = [trial for trial in trials if trial not in near]
    most = plan.most_finalists
    chosen: list[Trial] = []
    for part, room in ((near, most - most // 4 if far else most), (far, most), (near, most)):
        left = [trial for trial in part if trial not in chosen]
        chosen += _front_by_front(snapshot, left, room - len(chosen))
    return snapshot.best_trials_first(chosen)


def _front_by_front(snapshot: Snapshot, trials: Sequence[Trial], room: int) -> list[Trial]:
    chosen: list[Trial] = []
    while room > len(chosen) and (front := snapshot.front_of([t for t in trials if t not in chosen])):
        left = room - len(chosen)
        if len(front) > left:
            front = [front[round(i * (len(front) - 1) / max(1, left - 1))] for i in range(left)]
        chosen += front
    return chosen


def finalists(plan: StudyPlan, snapshot: Snapshot) -> Iterator[Planned]:
    """Yield the missing runs with the first fresh seeds of every finalist; see `deciding` for the other seeds.

    Finalists are the contenders, and each baseline at its best learning rate. Each is trained at full length and scored
    on the test split.
    """
    yield from _missing(snapshot, _finalists(plan, snapshot), _fresh_seeds(plan)[: first_look(plan.finalist_seeds)])


def deciding(plan: StudyPlan, snapshot: Snapshot) -> Iterator[Planned]:
    """Yield the missing runs of the second look, after every finalist has its first seeds.

    The runs that are left of `finalist_seeds` for each finalist go to those that `Recommendation.second_look` names.
    They follow from the first seeds alone, so a study that was killed goes on as if it had not been.
    """
    first = _fresh_seeds(plan)[: first_look(plan.finalist_seeds)]
    known = tuple(t for t in snapshot.trials if t.role != FINALIST or t.seed in first)
    found = replace(snapshot, trials=known).front().recommendation
    if found is None:
        return
    racing, _ = found.second_look(0, len(first))
    # An earlier version trained all seeds of all finalists.
    others = sum(t.role == FINALIST and t.seed not in first and t.of not in racing for t in snapshot.trials)
    num_runs = (plan.finalist_seeds - len(first)) * len(_finalists(plan, snapshot)) - others
    _, each = found.second_look(max(0, num_runs), len(first))
    trials = [trial for trial in snapshot.trials if trial.number in racing]
    yield from _missing(snapshot, trials, range(first.stop, first.stop + each))


def _finalists(plan: StudyPlan, snapshot: Snapshot) -> list[Trial]:
    tuned = [entry.trial for entry in snapshot.tuned() if entry.trial.role.kind == "baseline"]
    return [*tuned, *contenders(plan, snapshot)]


def _missing(snapshot: Snapshot, trials: Sequence[Trial], seeds: range) -> Iterator[Planned]:
    existing = {(t.of, t.seed) for t in snapshot.trials if t.role == FINALIST}
    for trial in trials:
        for seed in seeds:
            if (trial.number, seed) not in existing:
                yield Planned(FINALIST, trial.candidate, seed, of=trial.number)


def comparisons(plan: StudyPlan, snapshot: Snapshot) -> Iterator[Planned]:
    """Yield the missing matched baselines of every contender with mixtures, with its training and its own seeds."""
    existing = {(t.role, t.of, t.seed) for t in snapshot.trials}
    for trial in contenders(plan, snapshot) if plan.controls else ():
        seeds = sorted(t.seed for t in snapshot.trials if t.role == FINALIST and t.of == trial.number)
        for name, architecture in controls(trial.candidate.architecture, snapshot.backbone).items():
            candidate = replace(trial.candidate, architecture=architecture)
            for seed in seeds:
                if (Role("control", name), trial.number, seed) not in existing:
                    yield Planned(Role("control", name), candidate, seed, of=trial.number)


#: What the final front needs, in this order: the kind of role, and the function that plans it.
FINAL_PARTS: tuple[tuple[RoleKind, Callable[[StudyPlan, Snapshot], Iterator[Planned]]], ...] = (
    ("finalist", finalists),
    ("finalist", deciding),
    ("control", comparisons),
)


def _fresh_seeds(plan: StudyPlan) -> range:
    return range(plan.seed + 1, plan.seed + plan.finalist_seeds + 1)


def runs_per_finalist(plan: StudyPlan, space: SearchSpace) -> int:
    """Return the trainings for each seed of a finalist: its own, and with mixtures those of three matched baselines."""
    mixed = any("experts" in choice.fields for choice in space.adapters.values())
    return 1 + len(CONTROLS) * (mixed and plan.controls)


def num_finals(plan: StudyPlan, space: SearchSpace) -> int:
    """Return the largest number of evaluations for the final front: all finalists with as many seeds on average."""
    return (plan.most_finalists + len(plan.baselines)) * plan.finalist_seeds * runs_per_finalist(plan, space)


def num_evaluations(plan: StudyPlan, problem: Problem) -> int:
    """Return the largest number of evaluations of the whole study."""
    return len(list(baselines(plan, problem.space))) + problem.num_trials + num_finals(plan, problem.space)


def ended_as(trial: Trial, duplicate: Trial) -> Trial:
    """Return a copy with the outcome of the trial that it repeats."""
    own = ("number", "role", "genes", "of", "searcher_state")
    return replace(duplicate, **{name: getattr(trial, name) for name in own})
