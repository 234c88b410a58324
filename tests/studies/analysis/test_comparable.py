"""Trials that cannot be compared with the others are named, with the reason, and nothing else is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from autopeft.search_space.adapters import Lora
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.problem import COPY, FINALIST, Measurement, Trial
from autopeft.studies.analysis.comparable import incomparable

from ...support.tracked_study import BACKBONE, NUM_EXAMPLES, TRIALS, trial

OBJECTIVES = ("accuracy", "num_params")
SCORES = tuple(float(i % 2) for i in range(NUM_EXAMPLES))


def left_out(*more: Trial) -> Mapping[int, str]:
    return incomparable([*TRIALS, *more], OBJECTIVES, BACKBONE)


def measured(number: int, **changes: object) -> Trial:
    made = trial(number, 0.5, 4)
    assert made.measurement is not None
    return replace(made, measurement=replace(made.measurement, **changes))


def test_a_sound_study_loses_nothing() -> None:
    finalist = replace(measured(7, test_per_example={"accuracy": SCORES[:30]}), role=FINALIST, of=4)
    without_scores = measured(8, per_example={})
    pruned = replace(measured(9, per_example={}), state="pruned")
    running = replace(trial(10, 0.0, 2), state="running", measurement=None)
    assert left_out(finalist, without_scores, pruned, running) == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"per_example": {"accuracy": SCORES[:30]}}, "it has scores of 30 validation rows, the others of 50"),
        ({"per_example": {"loss": SCORES}}, "it has scores of loss, the others of accuracy"),
        ({"values": {"loss": 1.0, "num_params": 3.0}}, "it has no value of accuracy"),
    ],
)
def test_what_cannot_be_compared(changes: Mapping[str, object], said: str) -> None:
    assert left_out(measured(7, **changes)) == {7: said}


def test_a_metric_of_other_rows_has_its_own_number_of_them() -> None:
    def with_retained(number: int, count: int) -> Trial:
        both = {"accuracy": SCORES, "forgetting": SCORES[:count]}
        return measured(number, per_example=both, values={"accuracy": 0.5, "num_params": 3.0, "forgetting": 0.1})

    trials = [with_retained(number, 20) for number in range(3)]
    objectives = (*OBJECTIVES, "forgetting")
    assert incomparable(trials, objectives, BACKBONE) == {}
    assert incomparable([*trials, with_retained(3, 18)], objectives, BACKBONE) == {
        3: "it has scores of 18 retained rows, the others of 20"
    }


def test_test_rows_count_too() -> None:
    finalists = [
        replace(measured(7 + i, test_per_example={"accuracy": SCORES[:count]}), role=FINALIST, of=4, seed=i)
        for i, count in enumerate((30, 30, 20))
    ]
    assert left_out(*finalists) == {9: "it has scores of 20 test rows, the others of 30"}


def test_of_two_numbers_of_rows_most_trials_decide_then_the_first() -> None:
    few = {"accuracy": SCORES[:30]}
    many, others = [measured(1), measured(2)], [measured(n, per_example=few) for n in (3, 4)]
    assert incomparable([*many, *others], OBJECTIVES, BACKBONE).keys() == {3, 4}
    assert incomparable([*others, *many], OBJECTIVES, BACKBONE).keys() == {1, 2}
    assert incomparable([*many, *others, measured(5, per_example=few)], OBJECTIVES, BACKBONE).keys() == {1, 2}


def test_a_site_that_the_model_lacks() -> None:
    candidate = Candidate(architecture=Architecture.of({"layers.9.attn.q": [Lora(rank=1)]}))
    said = "it has an adapter at layers.9.attn.q, a site that the model lacks"
    assert left_out(replace(trial(7, 0.5, 4), candidate=candidate)) == {7: said}


def test_repeats_go_with_what_they_repeat() -> None:
    few = measured(7, per_example={"accuracy": SCORES[:30]})
    finalist, copy = replace(measured(8), role=FINALIST, of=7), replace(measured(9), role=COPY, of=7)
    why = "it repeats trial 7, which is left out"
    assert left_out(few, finalist, copy) == {7: "it has scores of 30 validation rows, the others of 50", 8: why, 9: why}
    assert incomparable([replace(measured(8), of=3)], OBJECTIVES, BACKBONE, {3}) == {
        8: "it repeats trial 3, which is left out"
    }


def test_values_alone_are_no_scores_of_another_metric() -> None:
    """A metric over the whole set may have no contributions."""
    alone = [measured(n, per_example={}) for n in range(3)]
    assert incomparable(alone, OBJECTIVES, BACKBONE) == {}
    assert isinstance(alone[0].measurement, Measurement)
