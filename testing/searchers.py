"""Checks of a searcher: points inside the space, replay from trials and seed, and robustness to failed trials."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from typing import Any

from autopeft.search_space import Candidate, Measurement, Objective, Problem, SearchSpace, Trial
from autopeft.search_space.problem import SEARCH, TrialState
from autopeft.search_space.spaces.genes import Assignment
from autopeft.searchers import SEARCHERS, Searcher
from autopeft.testing.spaces import mixed_space

OBJECTIVES = (Objective.of("accuracy"), Objective.of("num_params"), Objective.of("loss"), Objective.of("latency_s"))


def check_searcher(name: str, space: SearchSpace | None = None, num_trials: int = 24) -> None:
    """Check a registered searcher over a space of more than `num_trials` points (default: `mixed_space`).

    Raises AssertionError, which names the first check that fails.
    """
    assert name in SEARCHERS, f"{name!r} is not a registered searcher: install its entry point"
    kind = SEARCHERS[name]
    assert kind.name == name, f"its attribute name is {kind.name!r}, but it is registered as {name!r}"
    assert kind.summary, "a searcher needs a summary"
    for check in CHECKS:
        try:
            check(kind, space or mixed_space(), num_trials)
        except Exception as error:
            raise AssertionError(f"{check.__name__} of {name}: {error}") from error


def suggestions_are_contained(kind: type[Searcher], space: SearchSpace, num_trials: int) -> None:
    """Check for one to four objectives that suggestions lie in the space and rarely repeat each other."""
    for num_objectives in range(1, len(OBJECTIVES) + 1):
        trials = run(kind(problem_of(space, num_objectives, num_trials), 0), num_trials)
        assert len({t.candidate.key for t in trials}) > num_trials / 2, (
            "more than half of the suggestions repeat others"
        )


def directions_can_be_mixed(kind: type[Searcher], space: SearchSpace, num_trials: int) -> None:
    """Check a search with objectives against their usual direction, one of them with a bound."""
    objectives = (Objective.of("accuracy", maximise=False, bound=0.95), Objective.of("num_params", maximise=True))
    problem = Problem(space=space, objectives=objectives, num_trials=num_trials)
    assert len(run(kind(problem, 0), num_trials)) == num_trials


def trials_and_seed_alone_decide(kind: type[Searcher], space: SearchSpace, num_trials: int) -> None:
    """Check that the next suggestion depends only on trials and seed, also for a new object and stored trials.

    A study that was interrupted then continues as without the interruption.
    """
    problem = problem_of(space, num_trials=num_trials)
    searcher = kind(problem, 7)
    trials = run(searcher, num_trials)
    for length in (0, 1, 3, num_trials // 2 - 1, num_trials - 1):
        fresh = kind(problem, 7)
        for given in (trials, stored(trials)):
            for tested in (fresh, searcher):
                tested.update(given[:length])
                (suggestion,) = tested.suggest()
                assert exact([suggestion]) == exact([trials[length]]), f"another suggestion after {length} trials"
                assert dict(suggestion.state) == dict(trials[length].searcher_state), f"another state after {length}"
    assert exact(run(kind(problem, 8), 5)) != exact(trials[:5]), "another seed gives the same suggestions"


def a_batch_is_one_by_one_with_pending_trials(kind: type[Searcher], space: SearchSpace, num_trials: int) -> None:
    """Check that a batch equals single suggestions, each with the earlier ones as pending trials."""
    problem = problem_of(space, num_trials=num_trials)
    searcher = kind(problem, 3)
    trials = run(searcher, num_trials // 2 + 2)
    searcher.update(trials)
    batch = searcher.suggest(4)
    assert len(batch) == 4, f"a batch of 4 has {len(batch)}"
    pending: list[Trial] = []
    for suggestion in batch:
        again = kind(problem, 3)
        again.update(trials, stored(pending))
        (alone,) = again.suggest()
        assert exact([alone]) == exact([suggestion]), "single suggestions differ from the batch"
        fields: dict[str, Any] = {"state": "running", "measurement": None, "violation": 0.0}
        pending.append(ended(problem, len(trials) + len(pending), alone.genes, alone.state, **fields))
    assert len(set(exact(batch))) >= 3, "the points of a batch repeat each other"


def bad_trials_do_no_harm(kind: type[Searcher], space: SearchSpace, num_trials: int) -> None:
    """Check a search with failed and infeasible trials, values beyond a bound, and non-finite or missing values."""

    def end(problem: Problem, number: int, genes: Assignment, suggested: Any) -> Trial:
        values = measured(problem.space, genes)
        kinds: list[dict[str, Any]] = [
            {"state": "failed", "measurement": None, "violation": 0.0, "error": "the loss became nan"},
            {"state": "infeasible", "measurement": None, "violation": 0.5, "error": "too large"},
            {"violation": 0.25},
            {"measurement": Measurement(values=values | {"accuracy": float("nan")})},
            {"measurement": Measurement(values=values | {"accuracy": float("-inf")})},
            {"measurement": None},
            {},
            {},
        ]
        return ended(problem, number, genes, suggested, **kinds[number % len(kinds)])

    trials = run(kind(problem_of(space, num_trials=num_trials), 0), num_trials + 8, end)
    assert len({t.candidate.key for t in trials}) > (num_trials + 8) / 2, "more than half of the suggestions repeat"


def a_study_without_any_value(kind: type[Searcher], space: SearchSpace, num_trials: int) -> None:
    """Check that the search continues if all trials fail or are infeasible."""
    states: tuple[TrialState, ...] = ("failed", "infeasible")
    for state in states:

        def end(
            problem: Problem, number: int, genes: Assignment, suggested: Any = None, state: TrialState = state
        ) -> Trial:
            fields: dict[str, Any] = {
                "state": state,
                "measurement": None,
                "violation": 1.0 if state == "infeasible" else 0.0,
            }
            return ended(problem, number, genes, suggested, **fields)

        assert len(run(kind(problem_of(space), 0), 16, end)) == 16


def trials_are_taken_in_the_order_of_their_numbers(kind: type[Searcher], space: SearchSpace, num_trials: int) -> None:
    """Check trial numbers with gaps, as baselines leave them, and pending trials older than completed ones."""
    problem = problem_of(space)
    searcher = kind(problem, 1)
    trials = [replace(t, number=3 + 2 * t.number) for t in run(searcher, 9)]
    searcher.update(trials)
    expected = exact(searcher.suggest(2))
    waiting = replace(trials[4], state="running", measurement=None, violation=0.0)
    searcher.update([*trials[:4], waiting, *trials[5:]])
    among = exact(searcher.suggest(2))
    searcher.update(trials[:4] + trials[5:], [waiting])
    assert exact(searcher.suggest(2)) == among
    searcher.update(trials)
    assert exact(searcher.suggest(2)) == expected


def no_warnings_and_no_output(kind: type[Searcher], space: SearchSpace, num_trials: int) -> None:
    """Check that a search neither warns nor prints."""
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, redirect_stdout(printed), redirect_stderr(printed):
        warnings.simplefilter("always")
        run(kind(problem_of(space), 0), 12)
    assert [str(warning.message) for warning in caught] == []
    assert printed.getvalue() == ""


SearcherCheck = Callable[[type[Searcher], SearchSpace, int], None]
CHECKS: tuple[SearcherCheck, ...] = (
    suggestions_are_contained,
    directions_can_be_mixed,
    trials_and_seed_alone_decide,
    a_batch_is_one_by_one_with_pending_trials,
    bad_trials_do_no_harm,
    a_study_without_any_value,
    trials_are_taken_in_the_order_of_their_numbers,
    no_warnings_and_no_output,
)


def problem_of(space: SearchSpace, num_objectives: int = 2, num_trials: int = 24) -> Problem:
    """Return a problem over `space` with the first of `OBJECTIVES`."""
    return Problem(space=space, objectives=OBJECTIVES[:num_objectives], num_trials=num_trials)


def measured(space: SearchSpace, genes: Assignment) -> dict[str, float]:
    """Return artificial values that depend smoothly on all genes."""
    unit, mask = space.encode(genes)
    active = [u for u, on in zip(unit, mask, strict=True) if on]
    num_params = space.decode(genes).architecture.num_params(space.backbone)
    accuracy = 1 - sum((u - 0.6) ** 2 for u in active) / max(1, len(unit))
    return {"accuracy": accuracy, "num_params": num_params, "loss": 1 - accuracy**2, "latency_s": len(active) / 100}


def ended(problem: Problem, number: int, genes: Assignment, suggested: Any = None, **fields: Any) -> Trial:
    """Return a complete trial with artificial values."""
    values = measured(problem.space, genes)
    fields = {"state": "complete", "measurement": Measurement(values=values), "violation": -1.0, **fields}
    return Trial(number=number, role=SEARCH, candidate=problem.space.decode(genes), genes=genes,
                 searcher_state=suggested or {}, **fields)  # fmt: skip


def run(
    searcher: Searcher, num_trials: int, end: Callable[..., Trial] = ended, trials: Sequence[Trial] = ()
) -> list[Trial]:
    """Suggest, evaluate and update, one trial at a time, until there are `num_trials`."""
    trials = list(trials)
    while len(trials) < num_trials:
        searcher.update(trials)
        for suggestion in searcher.suggest():
            assert searcher.problem.space.contains(suggestion.genes)
            trials.append(end(searcher.problem, len(trials), suggestion.genes, suggestion.state))
    return trials


def stored(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials after a round trip through the ledger."""
    return [
        replace(
            trial,
            genes=json.loads(json.dumps(trial.genes)),
            searcher_state=json.loads(json.dumps(trial.searcher_state)),
            candidate=Candidate.from_dict(json.loads(json.dumps(trial.candidate.to_dict()))),
        )
        for trial in trials
    ]


def exact(points: Sequence[Any]) -> list[str]:
    """Return the genes of points or trials as texts, for exact comparisons."""
    return [json.dumps(point.genes) for point in points]
