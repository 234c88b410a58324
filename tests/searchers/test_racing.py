"""Which candidates continue at a rung when all trainings so far are compared by what is believed of their end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.declaration import AdapterChoice
from autopeft.search_space.problem import SEARCH, Measurement, Objective, Problem, Trial
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.searchers.courses import LEAST_COURSES
from autopeft.searchers.racing import Course, continuing, racing
from autopeft.testing.spaces import encoder

MARGIN = 0.01
#: Twelve trainings that ended: the loss at the rung says much about the end, and larger ones are better.
ENDED = [
    Course(loss=2.0 - 0.1 * k, cost=1000.0 * 2**k, final=-0.5 - 0.01 * k + (0.002 if k % 2 else -0.002))
    for k in range(12)
]


def test_all_continue_while_too_few_have_ended() -> None:
    batch = [Course(loss=loss, cost=1e9) for loss in (1.0, 2.0, 9.0)]
    assert racing(batch, ENDED[: LEAST_COURSES - 1], MARGIN) == [0, 1, 2]
    assert racing(batch, [], MARGIN) == [0, 1, 2]


def test_both_ends_continue_and_what_is_neither_stops() -> None:
    best, worst, dear_and_as_good, cheap_and_as_good = (
        Course(loss=0.8, cost=1e7),
        Course(loss=2.2, cost=500.0),
        Course(loss=0.92, cost=1e8),
        Course(loss=0.92, cost=100.0),
    )
    assert racing([best, worst, dear_and_as_good, cheap_and_as_good], ENDED, MARGIN) == [0, 3]


def test_a_cheaper_one_never_stops_a_better_one() -> None:
    """The finding behind this rule: ranks of loss and cost keep the cheapest, whatever its loss."""
    batch = [Course(loss=0.8, cost=1e7), *(Course(loss=2.0 - 0.01 * k, cost=10.0 * k + 1) for k in range(7))]
    assert 0 in racing(batch, ENDED, MARGIN)


def test_a_baseline_says_how_courses_end_but_stops_nobody() -> None:
    """Full fine-tuning is better than all adapters here, and costs nothing in the example."""
    far_better = [replace(c, final=(c.final or 0) - 0.3, cost=0.0, rival=False) for c in ENDED]
    batch = [Course(loss=2.0, cost=1e5), Course(loss=0.9, cost=1e6)]
    assert 1 in racing(batch, far_better, MARGIN)
    assert racing([replace(batch[0], loss=2.4)], far_better, MARGIN) == [0], "one alone is the best that there is"


def test_what_is_beyond_a_bound_stops_nobody() -> None:
    """The study accepts no more forgetting than its bound, and what learns most exceeds it."""
    objectives = (Objective.of("loss"), Objective.of("num_params"), Objective.of("forgetting", bound=0.1))
    space = SearchSpace(
        backbone=encoder(num_layers=2), adapters={"lora": AdapterChoice(kind="lora", fields={"rank": 4})}
    )
    problem = Problem(space=space, objectives=objectives, num_trials=24)

    def ended(k: int) -> Trial:
        values = {"loss": 1.5 - 0.01 * k + (0.002 if k % 2 else -0.002), "num_params": 1000.0 * 2**k}
        values["forgetting"] = 0.5 if k >= 12 else 0.0
        return Trial(
            number=k,
            role=SEARCH,
            candidate=Candidate(architecture=Architecture(), training={}),
            state="complete",
            measurement=Measurement(values=values, rungs=((0.5, {"loss": 2.0 - 0.1 * k}),)),
            violation=problem.violation(values),
        )

    trials = [ended(k) for k in range(24)]
    batch = [[0.85, 1e7], [2.4, 1e9]]
    assert continuing(problem, trials[:12], 0.5, batch) == [0]
    assert continuing(problem, trials, 0.5, batch) == [0]
    feasible = [replace(trial, violation=-1.0) for trial in trials]
    assert continuing(problem, feasible, 0.5, batch) == [], "without the bound, half of the trials are better"


def test_a_rung_that_says_nothing_stops_nobody_who_is_cheap() -> None:
    """Ends that have nothing to do with the loss at the rung."""
    noise = np.random.default_rng(0).normal(size=40)
    ended = [Course(loss=2 + 0.1 * (-1) ** k, cost=1e6, final=-0.5 + 0.05 * y) for k, y in enumerate(noise)]
    batch = [Course(loss=2 + 0.02 * k, cost=1e3) for k in range(8)]
    assert racing(batch, ended, 0.05) == list(range(8))


def test_a_loss_that_is_no_number_stops() -> None:
    batch = [Course(loss=float("nan"), cost=1.0), Course(loss=0.8, cost=1.0)]
    assert racing(batch, ENDED, MARGIN) == [1]
    assert racing(batch, [], MARGIN) == [1]
    assert racing([], ENDED, MARGIN) == []


@given(st.lists(st.tuples(st.floats(0.1, 5), st.floats(1, 1e6)), min_size=1, max_size=10), st.floats(1e-3, 0.2))
def test_the_most_promising_one_continues(batch: list[tuple[float, float]], margin: float) -> None:
    """Unless an ended one is surely better by more than the margin, or as good and cheaper."""
    courses = [Course(loss=loss, cost=cost) for loss, cost in batch]
    kept = racing(courses, [replace(c, final=c.final and c.final + 5) for c in ENDED], margin)
    lowest = min(courses, key=lambda c: (c.loss, c.cost))
    assert courses.index(lowest) in kept or lowest.loss > min(c.loss for c in ENDED)
