"""Costs that are foretold from a few measurements add up, and each is measured once."""

from __future__ import annotations

from random import Random
from typing import Any, cast

import pytest

from autopeft.evaluators.base import Costs
from autopeft.evaluators.cost_table import CostTable
from autopeft.evaluators.train import TrainEvaluator
from autopeft.search_space import AdapterChoice, Candidate, Choice, SearchSpace

from .spaces import SMALL

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
        return BARE_S + sum(seconds[spec.kind] + 0.001 * (spec.size or 0) for _, spec in candidate.architecture)

    def costs(self, candidate: Candidate, measured: frozenset[str]) -> Costs:
        assert measured == {"latency_s"}
        self.asked.append(candidate)
        return Costs(values={"latency_s": self.latency_s(candidate) - self.noise * bool(candidate.architecture)})


def table_of(evaluator: Any) -> CostTable:
    return CostTable(cast(TrainEvaluator, evaluator), SPACE, ["latency_s"], {"batch_size": 4})


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
