"""The searcher `shrink`: ladders of sizes along the best scores, down to where quality breaks, then `bo`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopeft.search_space.limits import Limits
from autopeft.search_space.problem import SEARCH, Measurement, Problem, Trial, declared_costs
from autopeft.searchers.base import WHOLE
from autopeft.searchers.scored.shrunk import CLOSE, LADDER, Shrunk

from ..bo.test_bayesian import quality
from .test_proxied import phases, problem_of


def driven(problem: Problem, count: int, batch: int = 1, least: float = 0.0) -> list[Trial]:
    """Trials in batches; a quality is 0.9 where the parameters are above `least`, and falls below it."""
    searcher, trials = Shrunk(problem, 0), list[Trial]()
    while len(trials) < count:
        pending: list[Trial] = []
        for _ in range(batch):
            searcher.update(trials, pending)
            (suggestion,) = searcher.suggest(1)
            candidate = problem.space.decode(suggestion.genes)
            number = len(trials) + len(pending)
            pending.append(
                Trial(number=number, role=SEARCH, candidate=candidate, genes=suggestion.genes,
                      searcher_state=suggestion.state)
            )  # fmt: skip
        for trial in pending:
            costs = declared_costs(trial.candidate.architecture, problem.space.backbone)
            accuracy = min(0.9, 0.9 * costs["num_params"] / least) if least else quality(trial.genes)
            measurement = Measurement(values={"accuracy": accuracy, **costs})
            trials.append(replace(trial, state="complete", measurement=measurement, violation=-1.0))
    return trials


def sizes(trials: list[Trial]) -> list[float]:
    return [trial.values["num_params"] for trial in trials]


def test_the_largest_first_and_then_the_best_of_each_size() -> None:
    problem = problem_of(noise=0.0)
    first = driven(problem, LADDER + 1)
    assert phases(first) == ["shrink"] * (LADDER + 1)
    assert all(trial.searcher_state[WHOLE] for trial in first)
    costs = [entry.costs["num_params"] for entry in problem.scored]
    assert sizes(first)[0] == max(costs)
    assert sizes(first) == sorted(sizes(first), reverse=True)
    for trial in first:
        better = [e for e in problem.scored if e.costs["num_params"] <= trial.values["num_params"]]
        assert -quality(trial.genes) == pytest.approx(min(e.score for e in better)), (
            "no scored one of its size is better"
        )


@pytest.mark.slow
@pytest.mark.parametrize("least", [60.0, 200.0, 500.0])
def test_it_ends_at_the_smallest_size_that_is_as_good(least: float) -> None:
    problem = replace(problem_of(noise=0.0), within=0.001)
    trials = driven(problem, 24, least=least)
    descent = [trial for trial in trials if trial.searcher_state["diagnostics"]["phase"] == "shrink"]
    assert len(descent) <= 3 * LADDER + 1
    good = [size for size in sizes(descent) if size >= least]
    offered = sorted(e.costs["num_params"] for e in problem.scored if e.costs["num_params"] >= least)
    assert min(good) <= CLOSE * 1.3 * offered[0]
    assert phases(trials)[-1] != "shrink", "bo goes on"


def test_a_ladder_waits_for_the_one_before_and_bo_fills_the_batch() -> None:
    trials = driven(problem_of(noise=0.0), 8, batch=8, least=200.0)
    told = phases(trials)
    assert told[: LADDER + 1] == ["shrink"] * (LADDER + 1)
    assert "shrink" not in told[LADDER + 1 :]


def test_what_exceeds_a_limit_is_left_out_and_without_scores_it_is_bo() -> None:
    problem = problem_of(noise=0.0)
    limited = replace(problem, limits=Limits({"num_params": 200.0}))
    assert max(sizes(driven(limited, 3))) <= 200
    bare = replace(problem, scored=())
    assert "shrink" not in phases(driven(bare, 3))


def test_a_killed_search_goes_on_as_if_it_had_not_been() -> None:
    problem = problem_of(noise=0.1)
    whole = driven(problem, 12, least=200.0)
    for count in (2, 6, 9):
        searcher = Shrunk(problem, 0)
        searcher.update(whole[:count])
        assert searcher.suggest(1)[0].genes == whole[count].genes
