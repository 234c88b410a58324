"""Which finalists get which seeds: the first ones for all, and a second look at those that decide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from autopeft.search_space import AdapterChoice, SearchSpace
from autopeft.search_space.problem import FINALIST, Objective, Trial
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.check import baseline_warnings
from autopeft.studies.engine.plan import StudyPlan
from autopeft.studies.engine.scheduled_trials import FINAL_PARTS, Planned, baselines, contenders, deciding, finalists
from autopeft.testing.spaces import encoder

from ...support.tiny_study import save_study
from ...support.tracked_study import TRIALS, snapshot, trial

PLAN = StudyPlan(study="topics", output_folder=Path(), most_finalists=3, finalist_seeds=4)
NUM_EXAMPLES = 2000
#: Trials 2 and 4 are near each other, and trial 1 is far below.
QUALITIES = {1: 0.5, 2: 0.795, 4: 0.8}


def run_of(planned: Planned) -> Trial:
    """Return a run whose examples differ between seeds by a few points of accuracy."""
    assert planned.of is not None
    rng = np.random.default_rng([planned.of, planned.seed])
    level = QUALITIES[planned.of] + (0.02 if planned.seed % 2 else -0.02)
    scores = tuple((rng.random(NUM_EXAMPLES) < level).astype(float).tolist())
    made = trial(0, 0.5, 1)
    assert made.measurement is not None
    measurement = replace(
        made.measurement,
        values={**made.measurement.values, "accuracy": float(np.mean(scores))},
        per_example={"accuracy": scores},
    )
    return replace(
        made, candidate=planned.candidate, role=FINALIST, of=planned.of, seed=planned.seed, measurement=measurement
    )


def grown(found: Snapshot, planned: list[Planned]) -> Snapshot:
    runs = [replace(run_of(one), number=len(found.trials) + i) for i, one in enumerate(planned)]
    return replace(found, trials=(*found.trials, *runs))


def pairs(planned: list[Planned]) -> list[tuple[int | None, int]]:
    return sorted((one.of or 0, one.seed) for one in planned)


def study() -> Snapshot:
    return snapshot(TRIALS[1:], within=0.03)


def test_every_finalist_gets_the_first_seeds() -> None:
    assert pairs(list(finalists(PLAN, study()))) == [(n, seed) for n in (1, 2, 4) for seed in (1, 2)]


def test_the_other_seeds_go_to_those_that_decide() -> None:
    first = grown(study(), list(finalists(PLAN, study())))
    found = first.front().recommendation
    assert found is not None
    assert [case.trial for case in found.open] == [2]
    more = list(deciding(PLAN, first))
    # Three finalists with two more seeds each are six runs, three for each of the two.
    assert pairs(more) == [(n, seed) for n in (2, 4) for seed in (3, 4, 5)]
    assert not list(deciding(replace(PLAN, finalist_seeds=2), first)), "no runs are left"


def test_a_killed_study_goes_on_with_the_same_seeds() -> None:
    first = grown(study(), list(finalists(PLAN, study())))
    more = list(deciding(PLAN, first))
    for count in range(len(more) + 1):
        found = grown(first, more[:count])
        assert pairs([*more[:count], *deciding(PLAN, found)]) == pairs(more)
        assert not list(finalists(PLAN, found))


def test_a_study_that_an_earlier_version_ended_is_ended() -> None:
    """It had all seeds of all finalists: those of the others are spent, and the racing ones have theirs."""
    all_seeds = [Planned(FINALIST, t.candidate, seed, of=t.number) for t in TRIALS[1:5] for seed in (1, 2, 3, 4)]
    found = grown(study(), [one for one in all_seeds if one.of in QUALITIES])
    assert pairs(list(deciding(PLAN, found))) == []


def test_matched_baselines_have_the_seeds_of_their_mixture() -> None:
    assert [kind for kind, _ in FINAL_PARTS] == ["finalist", "finalist", "control"], "after the second look"


def test_what_is_decided_needs_no_second_look() -> None:
    """With a margin of 30 points, and with one of a tenth of a point, no number of seeds matters."""
    for within in (0.3, 0.001):
        first = grown(study(), list(finalists(PLAN, study())))
        assert not list(deciding(PLAN, replace(first, within=within)))


def test_members_of_the_search_front_that_were_left_out_are_named() -> None:
    few = replace(PLAN, most_finalists=2)
    found = grown(study(), list(finalists(few, study())))
    assert found.front().left_out == (2,)
    assert study().front().left_out == ()


def numbers(plan: StudyPlan, found: Snapshot) -> list[int]:
    return [one.number for one in contenders(plan, found)]


def test_free_places_go_to_the_next_fronts() -> None:
    """One lucky run dominates many: trial 3 is behind trial 2, and is trained again where there is room."""
    assert numbers(PLAN, study()) == [4, 2, 1]
    assert numbers(replace(PLAN, most_finalists=9), study()) == [4, 2, 3, 1]
    assert numbers(replace(PLAN, most_finalists=2), study()) == [4, 1], "a front without room keeps its ends"


def test_the_goal_gives_most_places_to_those_that_may_be_as_good() -> None:
    cheap = [trial(10 + k, 0.3 + 0.02 * k, 1 + k) for k in range(4)]
    near = [trial(20 + k, 0.74 + 0.02 * k, 9 + k) for k in range(3)]
    found = snapshot([*cheap, *near, trial(30, 0.8, 16)], within=0.03)
    wide = replace(PLAN, most_finalists=4)
    assert numbers(wide, found) == [30, 21, 12, 10], "spread over the front"
    aimed = replace(wide, goal="cheapest_as_good")
    assert numbers(aimed, found) == [30, 21, 20, 13], "one place for the best of the others"
    assert numbers(replace(aimed, most_finalists=9), found) == [30, 22, 21, 20, 13, 12, 11, 10]


def test_where_forgetting_counts_most_places_are_for_those_that_may_be_as_good() -> None:
    """What has learnt least forgets least, so it is on the front, and tells nothing about the recommendation."""

    def forgetting(one: Trial, amount: float) -> Trial:
        assert one.measurement is not None
        values = {**one.measurement.values, "forgetting": amount}
        return replace(one, measurement=replace(one.measurement, values=values))

    cheap = [forgetting(trial(10 + k, 0.3 + 0.02 * k, 12), 0.01 * k) for k in range(4)]
    near = [forgetting(trial(20 + k, 0.74 + 0.02 * k, 12), 0.2 + 0.1 * k) for k in range(4)]
    objectives = tuple(Objective.of(name) for name in ("accuracy", "num_params", "forgetting"))
    found = snapshot([*cheap, *near], within=0.03, objectives=objectives)
    assert found.quality == "accuracy"
    assert {row.trial for row in found.front().members} == {10, 11, 12, 13, 20, 21, 22, 23}
    assert numbers(replace(PLAN, most_finalists=4), found)[:3] == [23, 21, 20]


def test_what_is_beyond_a_bound_is_not_the_best_that_others_are_compared_with() -> None:
    """Trial 30 learns most and is beyond a bound, as of what is forgotten: trials 20 to 22 are the best that count."""
    cheap = [trial(10 + k, 0.3 + 0.02 * k, 1 + k) for k in range(4)]
    near = [trial(20 + k, 0.64 + 0.02 * k, 9 + k) for k in range(3)]
    found = snapshot([*cheap, *near, trial(30, 1.0, 16, violation=0.5)], within=0.03)
    aimed = replace(PLAN, most_finalists=4, goal="cheapest_as_good")
    assert numbers(aimed, found) == [22, 21, 20, 13]
    assert numbers(replace(aimed, most_finalists=9), found) == [22, 21, 20, 13, 12, 11, 10]


def test_a_rule_has_one_run_at_its_own_rate_and_a_sweep_has_all_rates() -> None:
    names = ("lora-all-linear", "rule-unsloth", "sweep-rslora-r64", "mlp-only-r10", "full")
    plan = replace(PLAN, baselines=names, learning_rates=(1e-3, 1e-2), full_learning_rates=(1e-4,))
    lora = AdapterChoice(kind="lora", fields={"rank": 4})
    without_mlp = encoder(num_layers=1, hidden_size=16, linears=("attn.q", "attn.v"))
    space = SearchSpace(backbone=without_mlp, adapters={"lora": lora}, training={"epochs": 2.0})
    planned = [(one.role.name, one.candidate.training) for one in baselines(plan, space)]
    assert planned == [
        (name, {"epochs": 2.0, "learning_rate": rate})
        for name, rates in (
            ("lora-all-linear", (1e-3, 1e-2)),
            ("rule-unsloth", (2e-4,)),
            ("sweep-rslora-r64", (1e-3, 1e-2)),
            ("full", (1e-4,)),
        )
        for rate in rates
    ]


def test_baselines_that_the_model_cannot_have_are_warned_of(tmp_path: Path) -> None:
    names = ["head", "rule-tinker", "sweep-all-linear-r16", "mlp-only-r10"]
    settings = load_study(save_study(tmp_path, baselines={"names": names}))
    without_mlp = encoder(num_layers=1, hidden_size=16, linears=("attn.q", "attn.v"))
    assert [line.partition("names.")[2] for line in baseline_warnings(settings, without_mlp)] == [
        "1: rule-tinker: its formula knows Llama and Qwen; for Bert it takes Llama's exponent",
        "3: mlp-only-r10: this model lacks the sites of this baseline, so it is left out",
    ]
