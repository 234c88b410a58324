"""Costs that are foretold from a few measurements add up, and each is measured once."""

from __future__ import annotations

from random import Random
from typing import Any, cast

import pytest

from autopeft.evaluators.base import Costs
from autopeft.evaluators.costs.predictor import CostTable
from autopeft.evaluators.training.base import TrainingEvaluator
from autopeft.search_space import AdapterChoice, Candidate, Choice, SearchSpace
from autopeft.testing.spaces import SMALL

SPACE = SearchSpace(
    backbone=SMALL,
    adapters={
        "lora": AdapterChoice(kind="lora", fields={"rank": Choice.of([0, 1, 4])}, vary={"rank": "site"}),
        "mlp": AdapterChoice(kind="bottleneck", placement="layer", fields={"size": Choice.of([2, 8])}),
    },
)
BARE_S = 1.0


class Additive:
    """An evaluator whose candidates cost what their adapters cost, in seconds that only it knows."""

    backbone = SMALL

    def __init__(self, noise: float = 0.0) -> None:
        self.asked: list[Candidate] = []
        self.noise = noise

    def latency_s(self, candidate: Candidate) -> float:
        seconds = {"lora": 0.01, "bottleneck": 0.03}
        return BARE_S + sum(seconds[spec.plain.kind] + 0.001 * (spec.size or 0) for _, spec in candidate.architecture)

    def costs(self, candidate: Candidate, measured: frozenset[str]) -> Costs:
        assert measured == {"latency_s"}
        self.asked.append(candidate)
        return Costs(values={"latency_s": self.latency_s(candidate) - self.noise * bool(candidate.architecture)})


def table_of(evaluator: Any, space: SearchSpace = SPACE, **options: Any) -> CostTable:
    return CostTable(cast(TrainingEvaluator, evaluator), space, ["latency_s"], {"batch_size": 4}, **options)


def test_costs_add_up_and_are_measured_once() -> None:
    evaluator, rng = Additive(), Random(0)
    table = table_of(evaluator)
    for _ in range(50):
        candidate = SPACE.decode(SPACE.sample(rng))
        expected = evaluator.latency_s(candidate)
        assert table.costs(candidate.architecture) == {"latency_s": pytest.approx(expected)}
    # The bare model; two ranks at the queries and at the values; two sizes.
    assert len(evaluator.asked) == 1 + 2 * 2 + 2
    assert all(candidate.training == {"batch_size": 4} for candidate in evaluator.asked)


def test_no_adapter_makes_a_model_faster() -> None:
    table = table_of(Additive(noise=0.5))
    assert table.costs(SPACE.decode(SPACE.largest()).architecture) == {"latency_s": BARE_S}


def test_what_was_measured_before_is_not_measured_again() -> None:
    kept: dict[str, Any] = {}
    architectures = [SPACE.decode(SPACE.sample(Random(n))).architecture for n in range(20)]
    first = table_of(Additive(), save=kept.update)
    found = [first.costs(architecture) for architecture in architectures]
    slower = Additive(noise=0.5)
    again = table_of(slower, measured=kept)
    assert [again.costs(architecture) for architecture in architectures] == found
    assert not slower.asked


@pytest.mark.parametrize("router_per", ["site", "layer"])
def test_mixtures(router_per: str) -> None:
    space = SearchSpace(
        backbone=SMALL,
        adapters={
            "lora": AdapterChoice(
                kind="lora",
                fields={"rank": Choice.of([1, 4]), "experts": Choice.of([0, 2, 4])},
                vary={"experts": "layer"},
                router_per=router_per,
            )
        },
    )
    evaluator, rng = Additive(), Random(0)
    table = table_of(evaluator, space)
    for _ in range(20):
        candidate = space.decode(space.sample(rng))
        expected = evaluator.latency_s(candidate)
        assert table.costs(candidate.architecture) == {"latency_s": pytest.approx(expected)}
