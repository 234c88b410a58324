"""Whether anything was learnt: candidates against the best constant prediction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from autopeft.search_space.problem import FINALIST, Measurement, Trial
from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.session import open_ledger, read_snapshot

from ...support.tiny_study import save_study
from ...support.tracked_study import TRIALS, snapshot
from ..engine.test_study import run

NOTHING = "no candidate is shown to be better than the same prediction for every input (accuracy 0.5)"


def scored(trial: Trial, number: int, share: float, **changes: object) -> Trial:
    """A run with this share of 400 examples right."""
    right = [1.0] * round(400 * share) + [0.0] * round(400 * (1 - share))
    Random(number).shuffle(right)
    assert trial.measurement is not None
    measurement = Measurement(values={**trial.values, "accuracy": share}, per_example={"accuracy": tuple(right)})
    return replace(trial, number=number, measurement=measurement, **changes)


@pytest.mark.parametrize(("best", "said"), [(0.5, NOTHING), (0.53, NOTHING), (0.58, None)])
def test_a_candidate_that_is_better_for_sure(best: float, said: str | None) -> None:
    """The standard error is 0.025."""
    trials = [scored(TRIALS[1], 1, 0.4), scored(TRIALS[2], 2, best)]
    assert snapshot(trials, constant={"accuracy": 0.5}).nothing_learnt == said


def test_finalists_decide_where_there_are_any() -> None:
    """The best of many single runs is above by chance."""
    trials = [scored(TRIALS[1], 1, 0.58), scored(TRIALS[2], 2, 0.58)]
    fresh = [
        scored(TRIALS[2], 3 + seed, share, role=FINALIST, of=2, seed=seed) for seed, share in ((1, 0.5), (2, 0.51))
    ]
    assert snapshot(trials, constant={"accuracy": 0.5}).nothing_learnt is None
    assert snapshot([*trials, *fresh], constant={"accuracy": 0.5}).nothing_learnt == NOTHING


def test_nothing_is_said_where_nothing_is_known() -> None:
    trials = [scored(TRIALS[1], 1, 0.4)]
    assert snapshot(trials).nothing_learnt is None, "a ledger of an earlier version"
    assert snapshot(trials, constant={"macro-f1": 0.9}).nothing_learnt is None
    assert snapshot(constant={"accuracy": 1.0}, trials=()).nothing_learnt is None
    without = replace(TRIALS[1], measurement=Measurement(values=TRIALS[1].values))
    assert snapshot([without], constant={"accuracy": 1.0}).nothing_learnt is None


@pytest.mark.slow
@pytest.mark.parametrize("quality", ["accuracy", "loss"])
def test_a_study_says_that_nothing_was_learnt(quality: str, tmp_path: Path) -> None:
    """At a learning rate of 1e-9 it says so, also from its ledger; where something was learnt it does not."""
    said = {}
    for rate in (1e-9, 1e-2):
        settings = load_study(
            save_study(
                tmp_path / f"{rate}",
                objectives=[quality, "num_params"],
                training={"learning_rate": rate, "epochs": 16, "batch_size": 8},
                search={"searcher": "random", "trials": 3, "batch": 3},
                baselines={"names": ["lora-r8-qv"], "learning_rates": [rate]},
            )
        )
        ended = run(settings)
        again = read_snapshot(settings, open_ledger(settings))
        assert ended.constant == again.constant
        assert ended.constant["accuracy"] == pytest.approx(1 / 3)
        assert ended.constant["loss"] == pytest.approx(1.0986, abs=1e-4)
        assert ended.nothing_learnt == again.nothing_learnt
        said[rate] = ended.nothing_learnt
    expected = {"accuracy": "(accuracy 0.3333)", "loss": "(loss 1.099)"}[quality]
    assert said[1e-9] == f"no candidate is shown to be better than the same prediction for every input {expected}"
    assert said[1e-2] is None
