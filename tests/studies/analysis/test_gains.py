"""What the recommended member gains over the baselines by rule, against numbers by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import nan
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_rel

from autopeft.search_space.adapters import Lora
from autopeft.search_space.architecture import Candidate
from autopeft.search_space.problem import FINALIST, SEARCH, Measurement, Objective, Role, Trial
from autopeft.search_space.spaces.presets import everywhere
from autopeft.search_space.spaces.rules import ALL_BASELINES
from autopeft.studies.analysis.gains import Gain, gains, other_qualities
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.testing.spaces import encoder

from ...support.tracked_study import snapshot

BACKBONE = encoder(num_layers=2)
#: The difficulty of the examples: all candidates share it.
SHARED = np.random.default_rng(3).normal(0, 0.2, 40)
SHARED -= SHARED.mean()
SEARCHED = everywhere(BACKBONE, Lora(rank=4), ("attn.q",))


def runs(
    number: int, name: str, mean: float, rate: float, *, noise_sd: float = 0.0, seeds: int = 2, **changes: Any
) -> list[Trial]:
    """An evaluation and its runs with fresh seeds; each has exactly this mean. `name`: a baseline, or "search"."""
    architecture = SEARCHED if name == "search" else ALL_BASELINES[name](BACKBONE)
    candidate = Candidate(architecture=architecture, training={"learning_rate": rate, "epochs": 2.0})
    values = {"num_params": float(architecture.num_params(BACKBONE)), "latency_s": changes.pop("latency_s", 0.5)}

    def measured(seed: int) -> Measurement:
        noise = np.random.default_rng([number, seed]).normal(0, 1, len(SHARED)) * noise_sd
        scores = mean + SHARED + noise - noise.mean()
        both = {"accuracy": tuple(scores), "loss": tuple(-scores)}
        return Measurement(values={**values, "accuracy": mean, "loss": -mean}, per_example=both)

    role = SEARCH if name == "search" else Role("baseline", name)
    first = Trial(
        number=number, candidate=candidate, role=role, genes={}, state="complete", measurement=measured(0), **changes
    )
    fresh = [
        replace(first, number=number + seed, role=FINALIST, of=number, seed=seed, measurement=measured(seed))
        for seed in range(1, seeds + 1)
    ]
    return [first, *fresh]


def study(*candidates: Sequence[Trial], **changes: Any) -> Snapshot:
    objectives = (Objective.of("accuracy"), Objective.of("num_params"), Objective.of("latency_s"))
    return snapshot(
        [trial for one in candidates for trial in one], backbone=BACKBONE, **{"objectives": objectives, **changes}
    )


def found(*candidates: Sequence[Trial], **changes: Any) -> dict[str, Gain]:
    made = study(*candidates, **changes)
    return {gain.baseline: gain for gain in gains(made, made.front())}


RECOMMENDED = runs(10, "search", 0.60, 3e-3, latency_s=0.4)
RULE = runs(20, "rule-unsloth", 0.44, 2e-4)
TUNED = runs(30, "sweep-all-linear-r16", 0.54, 1e-2)


def test_the_part_of_the_learning_rate_and_that_of_the_structure() -> None:
    """0.60 - 0.44 = (0.54 - 0.44) + (0.60 - 0.54); without noise the intervals are points."""
    gain = found(RECOMMENDED, RULE, TUNED)["rule-unsloth"]
    assert gain.difference is not None
    assert gain.learning_rate is not None
    assert gain.structure is not None
    numbers = [(e.value, e.low, e.high) for e in (gain.difference, gain.learning_rate, gain.structure)]
    assert np.array(numbers) == pytest.approx(np.array([[0.16] * 3, [0.10] * 3, [0.06] * 3]))
    # LoRA of rank 4 at a query of 768 x 768, and of rank 16 at the six linears of BERT-base.
    searched, rule = 4 * (768 + 768), 16 * (4 * (768 + 768) + 2 * (768 + 3072))
    assert gain.cost_ratios == pytest.approx({"num_params": searched / rule, "latency_s": 0.8})
    assert gain.tuned == "sweep-all-linear-r16"
    assert gain.sentence == (
        "trial 10 is better than rule-unsloth (lr 0.0002, not tuned): +16.0 points (95 % interval +16.0 to +16.0), at"
        " 0.028 times its num_params, 0.8 times its latency_s. Of this, +10.0 points (95 % interval +10.0 to +10.0) is"
        " the learning rate's (sweep-all-linear-r16, lr 0.01, minus rule-unsloth), and +6.0 points (95 % interval +6.0"
        " to +6.0) the structure's."
    )


def test_further_qualities_have_their_differences_and_the_recommended_member_its_value() -> None:
    """Of each, the runs differ by a number that all examples share, so intervals are points."""

    def forgetting(trials: list[Trial], amount: float) -> list[Trial]:
        changed = []
        for trial in trials:
            assert trial.measurement is not None
            column = tuple(amount + 0.1 * SHARED[:8] - 0.1 * SHARED[:8].mean())
            measurement = replace(
                trial.measurement,
                values={**trial.measurement.values, "forgetting": amount},
                per_example={**trial.measurement.per_example, "forgetting": column},
            )
            changed.append(replace(trial, measurement=measurement))
        return changed

    objectives = (Objective.of("accuracy"), Objective.of("num_params"), Objective.of("forgetting"))
    candidates = [forgetting(RECOMMENDED, 0.02), forgetting(RULE, 0.05), forgetting(TUNED, 0.01)]
    gain = found(*candidates, objectives=objectives)["rule-unsloth"]
    assert gain.others["forgetting"].value == pytest.approx(-0.03)
    assert gain.to_dict()["others"]["forgetting"]["low"] == pytest.approx(-0.03)
    assert "times its num_params, with -0.03 forgetting (95 % interval -0.03 to -0.03). Of this, +10.0" in gain.sentence
    made = study(*candidates, objectives=objectives)
    (sentence,) = other_qualities(made, made.front())
    low, high = ttest_1samp(0.02 + 0.1 * SHARED[:8], 0).confidence_interval(0.95) - 0.1 * SHARED[:8].mean()
    expected = f"trial 10 has forgetting 0.02 (95 % interval {low:.3g} to {high:.3g})."
    assert sentence == expected, "it is the best itself"
    cheap = forgetting(runs(60, "search", 0.70, 1e-3), 0.3)
    dear = [
        replace(trial, candidate=replace(trial.candidate, architecture=RULE[0].candidate.architecture),
                measurement=replace(trial.measurement, values={**trial.measurement.values, "num_params": 1e6}))
        for trial in cheap if trial.measurement is not None
    ]  # fmt: skip
    made = study(*candidates, dear, objectives=objectives, within=0.2)
    (sentence,) = other_qualities(made, made.front())
    assert "; minus that of the best, trial 60: -0.28 forgetting (95 % interval -0.28 to -0.28)." in sentence
    assert found(RECOMMENDED, RULE)["rule-unsloth"].others == {}


def test_points_of_a_further_quality_have_its_name() -> None:
    def with_f1(trials: list[Trial], value: float) -> list[Trial]:
        changed = []
        for trial in trials:
            assert trial.measurement is not None
            both = {**trial.measurement.per_example, "macro-f1": tuple(value + SHARED)}
            values = {**trial.measurement.values, "macro-f1": value}
            changed.append(replace(trial, measurement=replace(trial.measurement, values=values, per_example=both)))
        return changed

    objectives = (Objective.of("accuracy"), Objective.of("num_params"), Objective.of("macro-f1"))
    gain = found(with_f1(RECOMMENDED, 0.5), with_f1(RULE, 0.4), objectives=objectives)["rule-unsloth"]
    assert ": +16.0 points (95 %" in gain.sentence
    assert ", with +10.0 points of macro-f1 (95 % interval +10.0 to +10.0)." in gain.sentence


def test_a_baseline_is_compared_at_its_best_rate_within_the_bounds() -> None:
    """What learns most may forget more than the study permits; other rates of the same baseline do not."""
    beyond = runs(40, "sweep-all-linear-r16", 0.58, 3e-2, violation=0.5)
    for candidates in ([RECOMMENDED, beyond, TUNED], [RECOMMENDED, TUNED, beyond]):
        made = study(*candidates)
        (gain,) = gains(made, made.front())
        assert gain.trial == 30
        assert "it exceeds" not in gain.sentence
    made = study(RECOMMENDED, beyond)
    (gain,) = gains(made, made.front())
    assert gain.trial == 40
    assert "it exceeds the constraints of the study" in gain.sentence


def test_a_loss_falls() -> None:
    objectives = (Objective.of("loss"), Objective.of("num_params"))
    gain = found(RECOMMENDED, RULE, TUNED, objectives=objectives)["rule-unsloth"]
    assert gain.difference is not None
    assert gain.learning_rate is not None
    assert (gain.difference.value, gain.learning_rate.value) == pytest.approx((-0.16, -0.10))
    assert gain.sentence.startswith("trial 10 is better than rule-unsloth (lr 0.0002, not tuned): -0.16 loss (95 %")


def test_the_interval_is_that_of_a_paired_t_test_where_runs_are_single() -> None:
    one, other = runs(10, "search", 0.6, 3e-3, noise_sd=0.3, seeds=1), runs(20, "rule-unsloth", 0.59, 2e-4, seeds=1)
    gain = found(one, other)["rule-unsloth"]
    scores = [run[1].measurement for run in (one, other)]
    a, b = (np.array(m.per_example["accuracy"]) for m in scores if m is not None)
    interval = ttest_rel(a, b).confidence_interval(0.95)
    assert gain.difference is not None
    assert (gain.difference.low, gain.difference.high) == pytest.approx((interval.low, interval.high))
    assert "is not distinguished from" in gain.sentence
    assert "from single runs, so without the spread between seeds" in gain.sentence


def test_the_best_of_the_sweeps_is_the_opponent() -> None:
    worse_rate = runs(40, "sweep-all-linear-r16", 0.30, 1e-3)[:1]
    rslora = runs(50, "sweep-rslora-r64", 0.62, 1e-3)
    gain = found(RECOMMENDED, TUNED, worse_rate, rslora, within=0.05)
    assert list(gain) == ["sweep-rslora-r64"]
    sentence = gain["sweep-rslora-r64"].sentence
    assert sentence.startswith(
        "trial 10 is worse than sweep-rslora-r64 (lr 0.001, the only learning rate tried; the best of 2 sweeps): -2.0"
    )
    alone = found(RECOMMENDED, TUNED, worse_rate)["sweep-all-linear-r16"].sentence
    assert alone.startswith(
        "trial 10 is better than sweep-all-linear-r16 (lr 0.01, the best of 2 learning rates): +6.0"
    )


def test_a_rule_without_its_structure_at_a_tuned_rate() -> None:
    gain = found(RECOMMENDED, RULE)["rule-unsloth"]
    assert (gain.tuned, gain.learning_rate, gain.structure) == (None, None, None)
    known = " What of this is the learning rate's is not known: the baseline sweep-all-linear-r16 would tell."
    assert gain.sentence.endswith(known)


def test_the_structure_of_the_rule_at_the_rate_of_the_search() -> None:
    """The search has found the rule's structure: all of the gain is the rate's, whatever the other baselines say."""
    same = [replace(trial, candidate=replace(trial.candidate, architecture=RULE[0].candidate.architecture))
            for trial in RECOMMENDED]  # fmt: skip
    gain = found(same, RULE)["rule-unsloth"]
    assert gain.learning_rate == gain.difference is not None
    assert gain.structure is None
    assert gain.sentence.endswith(" The structure is the same, so all of this is the learning rate's (lr 0.003).")


def test_a_baseline_that_is_recommended_itself() -> None:
    gain = found(runs(10, "search", 0.3, 3e-3), TUNED, RULE)
    assert gain["sweep-all-linear-r16"].difference is None
    assert gain["sweep-all-linear-r16"].sentence == (
        "sweep-all-linear-r16 (lr 0.01, the only learning rate tried) is recommended itself: no candidate of the search"
        " takes its place."
    )
    assert gain["rule-unsloth"].sentence.startswith("sweep-all-linear-r16 is better than rule-unsloth")
    assert gain["rule-unsloth"].tuned == "sweep-all-linear-r16"


def test_a_rule_that_was_not_made_for_the_model_says_so() -> None:
    sentence = found(RECOMMENDED, runs(20, "rule-tinker", 0.5, 1.055e-3))["rule-tinker"].sentence
    assert "not tuned; its formula knows Llama and Qwen; for Bert it takes Llama's exponent)" in sentence


def test_a_baseline_beyond_the_constraints_is_compared_and_says_so() -> None:
    beyond = [replace(RULE[0], violation=0.5), *RULE[1:]]
    sentence = found(RECOMMENDED, beyond)["rule-unsloth"].sentence
    assert "rule-unsloth (lr 0.0002, not tuned; it exceeds the constraints of the study): +16.0 points" in sentence


def test_failed_and_diverged_baselines_are_named() -> None:
    failed = [replace(RULE[0], state="failed", measurement=None, error="the loss became nan\n  in step 3")]
    gain = found(RECOMMENDED, failed, runs(30, "mlp-only-r10", nan, 1e-2))
    why = "it has no complete runs with fresh seeds and finite scores"
    assert gain["rule-unsloth"].sentence == f"No comparison with rule-unsloth: {why} (the loss became nan)."
    assert gain["mlp-only-r10"].sentence == f"No comparison with mlp-only-r10: {why}."
    assert gain["mlp-only-r10"].to_dict()["difference"] is None


def test_nothing_is_compared_before_there_are_fresh_seeds_or_without_rules() -> None:
    assert not found(RECOMMENDED[:1], RULE[:1], TUNED[:1])
    assert not found(RECOMMENDED, runs(20, "lora-all-linear", 0.5, 1e-2))
    assert not found()
