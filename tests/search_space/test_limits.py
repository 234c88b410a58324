"""Limits reject before any training, and objectives know their direction."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.search_space.limits import Limits
from autopeft.search_space.problem import METRICS, Fidelity, Measurement, Objective
from autopeft.testing.spaces import encoder

costs = st.dictionaries(st.sampled_from(sorted(METRICS)), st.just(0.0) | st.floats(1e-6, 1e12))


@given(costs, costs)
def test_a_rejection_names_what_is_exceeded_and_nothing_else(most: dict[str, float], found: dict[str, float]) -> None:
    rejection = Limits(most).rejection(found)
    beyond = {name for name in most.keys() & found.keys() if found[name] > most[name]}
    if rejection is None:
        assert not any(found[name] > most[name] * (1 + 1e-12) + 1e-12 for name in beyond)
        return
    violation, reason = rejection
    assert violation > 0
    assert math.isfinite(violation)
    named = {part.split()[0] for part in reason.split("; ")}
    assert {name for name in beyond if found[name] > most[name] * (1 + 1e-12)} <= named <= beyond


def test_the_violation_is_the_largest_excess() -> None:
    limits = Limits({"num_params": 1_000_000, "latency_s": 0.1, "step_s": 1.0})
    assert limits.rejection({"num_params": 1_000_000, "latency_s": 0.1}) is None
    rejection = limits.rejection({"num_params": 1_500_000, "latency_s": 0.2, "step_s": 0.5})
    assert rejection is not None
    assert rejection[0] == pytest.approx(1.0)
    assert rejection[1] == ("num_params 1,500,000 is above the limit 1,000,000; latency_s 0.2 is above the limit 0.1")
    assert limits.rejection({"peak_memory_bytes": 1e12}) is None, "what has no limit has no rejection"


def test_a_limit_of_nothing() -> None:
    assert Limits({"num_params": 0}).rejection({"num_params": 0}) is None
    assert Limits({"num_params": 0}).rejection({"num_params": 12}) == (12, "num_params 12 is above the limit 0")


def test_a_share_of_the_backbone_is_a_limit_on_parameters() -> None:
    backbone = encoder()
    assert Limits.of({"trainable_fraction": 0.01}, backbone).maxima == {"num_params": 1_083_102.72}
    assert Limits.of({"trainable_fraction": 0.01, "num_params": 5}, backbone).maxima == {"num_params": 5}
    assert Limits.of({"trainable_fraction": 1e-9, "num_params": 5}, backbone).maxima["num_params"] < 1
    assert Limits.of({}, backbone).rejection({"num_params": 1e15}) is None


@given(st.sampled_from(sorted(METRICS)), st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_every_objective_is_minimised(name: str, a: float, b: float) -> None:
    objective = Objective.of(name, bound=a)
    assert objective.value(objective.loss(b)) == b
    better = b >= a if METRICS[name].maximise else b <= a
    assert (objective.violation(b) <= 0) == better
    assert Objective.of(name).violation(b) <= 0, "without a bound everything is within"


def test_violations_of_a_bound_are_relative_to_it() -> None:
    assert Objective.of("num_params", bound=1000).violation(1500) == 0.5
    assert Objective.of("accuracy", bound=0.8).violation(0.4) == pytest.approx(0.5)
    assert Objective.of("loss", bound=0.0).violation(0.25) == 0.25


def test_directions_can_be_turned() -> None:
    assert Objective.of("accuracy").loss(0.9) == -0.9
    assert Objective.of("accuracy", maximise=False).loss(0.9) == 0.9
    assert Objective.of("latency_s").unit == "seconds"
    with pytest.raises(KeyError):
        Objective.of("speed")


def test_measurements_survive_json() -> None:
    measurement = Measurement(
        values={"accuracy": 0.5},
        std_err={"accuracy": 0.1},
        losses=(1.0, 0.5),
        rungs=((0.5, {"accuracy": 0.4}),),
        per_example={"accuracy": (1.0, 0.0)},
        test_per_example={"accuracy": (1.0,)},
        spread={"latency_s": 0.1},
    )
    assert Measurement.from_dict(json.loads(json.dumps(measurement.to_dict()))) == measurement


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
def test_a_share_of_the_training(share: float) -> None:
    with pytest.raises(ValueError, match="share must be in"):
        Fidelity(share=share)
