"""Metrics over the rows of one domain and of the worst one, against the metric on these rows alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopeft.search_space.metrics import ByDomain, MetricError, MetricsByName, Own, Quality, RegexMatch
from autopeft.search_space.metrics.base import BRIER, CONFIDENCE, DOMAIN, PREDICTION, TARGET, standard_error
from autopeft.search_space.problem import COSTS, METRICS, Objective, Problem
from autopeft.studies.analysis.statistics import estimate, paired_difference

NAMES = ("accuracy", "loss", "macro-f1", "matthews", "brier", "ece")


def quality(name: str) -> Quality:
    found = METRICS[name]
    assert isinstance(found, Quality)
    return found


def columns_of(domains: list[str], seed: int = 0) -> dict[str, list[Any]]:
    rng = np.random.default_rng(seed)
    count = len(domains)
    targets = rng.integers(3, size=count)
    predictions = np.where(rng.random(count) < 0.6, targets, rng.integers(3, size=count))
    return {
        "loss": rng.exponential(1, count).tolist(),
        "accuracy": (targets == predictions).astype(float).tolist(),
        TARGET: targets.tolist(),
        PREDICTION: predictions.tolist(),
        BRIER: rng.random(count).tolist(),
        CONFIDENCE: rng.uniform(0.4, 1, count).tolist(),
        DOMAIN: domains,
    }


def of_domain(columns: dict[str, list[Any]], domain: str) -> dict[str, list[Any]]:
    rows = [i for i, name in enumerate(columns[DOMAIN]) if name == domain]
    return {name: [column[i] for i in rows] for name, column in columns.items()}


DRAWN = st.tuples(st.lists(st.sampled_from(["law", "code", "a@b"]), min_size=2, max_size=40), st.integers(0, 99))


@pytest.mark.parametrize("name", NAMES)
@given(drawn=DRAWN)
@settings(deadline=None, max_examples=40)
def test_a_part_has_the_values_of_its_rows_alone(name: str, drawn: tuple[list[str], int]) -> None:
    columns = columns_of(*drawn)
    values = {}
    for domain in sorted(set(columns[DOMAIN])):
        part, whole = quality(f"{name}@{domain}"), quality(name)
        alone = of_domain(columns, domain)
        assert part.value(columns) == whole.value(alone)
        assert list(part.contributions(columns)) == list(whole.contributions(alone))
        values[domain] = part.value(columns)
    worst = quality(f"{name}@worst")
    assert worst.value(columns) == (min if worst.maximise else max)(values.values())
    found = worst.contributions(columns)
    assert len(found) == len(columns[DOMAIN])
    assert np.mean(found) == pytest.approx(worst.value(columns), abs=1e-9)
    # The standard error is that of a worst domain: among equals of the one with the largest.
    errors = [
        standard_error(quality(f"{name}@{domain}").contributions(columns))
        for domain, value in values.items()
        if value == worst.value(columns)
    ]
    assert standard_error(found) == pytest.approx(max(errors), abs=1e-9)


def test_pairs_of_candidates_with_one_worst_domain_are_pairs_on_its_rows() -> None:
    domains = ["law"] * 20 + ["code"] * 60
    first, second = columns_of(domains, 1), columns_of(domains, 2)
    for columns, share in ((first, 0.4), (second, 0.5)):
        columns["accuracy"] = [float(i < share * 20) for i in range(20)] + [1.0] * 60
    worst, law = quality("accuracy@worst"), quality("accuracy@law")
    found = paired_difference(worst.contributions(first), worst.contributions(second))
    expected = np.subtract(law.contributions(first), law.contributions(second))
    assert found.value == pytest.approx(-0.1)
    assert found.std_err == pytest.approx(standard_error(expected.tolist()))


def test_pairs_of_candidates_with_different_worst_domains() -> None:
    """Domains have no row in common, so the errors of both add up."""
    domains = ["law"] * 20 + ["code"] * 60
    first, second = columns_of(domains, 1), columns_of(domains, 2)
    first["accuracy"] = [float(i < 8) for i in range(20)] + [1.0] * 60
    second["accuracy"] = [1.0] * 20 + [float(i < 30) for i in range(60)]
    worst = quality("accuracy@worst")
    assert (worst.value(first), worst.value(second)) == (0.4, 0.5)
    found = paired_difference(worst.contributions(first), worst.contributions(second))
    errors = [standard_error(of_domain(c, d)["accuracy"]) for c, d in ((first, "law"), (second, "code"))]
    assert found.value == pytest.approx(-0.1)
    assert found.std_err == pytest.approx(math.hypot(*errors), rel=0.02)


def test_shares_near_one_get_pseudo_examples_in_a_domain() -> None:
    """The interval of a domain that is all right is that of its rows alone."""
    columns = columns_of(["law"] * 30 + ["code"] * 300)
    columns["accuracy"] = [1.0] * 330
    found = estimate(quality("accuracy@law").contributions(columns))
    assert found == estimate([1.0] * 30)
    assert found.low < 0.95


def test_a_domain_of_one_row_and_a_class_that_is_missing_are_defined() -> None:
    columns = columns_of(["law", "code", "code", "code"])
    columns[TARGET], columns[PREDICTION] = [0, 1, 1, 1], [2, 1, 1, 1]
    for name in NAMES:
        for domain in ("law", "worst", "code"):
            metric = quality(f"{name}@{domain}")
            assert math.isfinite(metric.value(columns))
            assert all(map(math.isfinite, metric.contributions(columns)))
    assert quality("macro-f1@code").value(columns) == 1.0
    with pytest.raises(MetricError, match="no row has the domain 'medicine'"):
        quality("accuracy@medicine").value(columns)


def test_names_are_resolved_by_one_mapping() -> None:
    part = METRICS["macro-f1@law"]
    assert isinstance(part, ByDomain)
    assert part.whole is METRICS["macro-f1"]
    assert (part.name, part.domain, part.unit, part.maximise, part.bound) == ("macro-f1@law", "law", "share", True, 1.0)
    assert quality("accuracy@a@b").name.endswith("@a@b")
    assert not quality("loss@worst").maximise
    for unknown in ("acc@law", "num_params@law", "accuracy@", "@law", "mine@law"):
        assert unknown not in METRICS
        with pytest.raises(KeyError):
            METRICS[unknown]
    assert all("@" not in name for name in METRICS)
    mine = Own.declared("mine", "module:score", maximise=False)
    known = METRICS.with_own({"mine": mine}, "x+")
    assert known["mine"] is mine
    assert not known["mine@law"].maximise
    assert isinstance(known, MetricsByName)
    matching = quality("regex-match@law").whole, known["regex-match@law"]
    assert isinstance(matching[0], RegexMatch)
    assert isinstance(matching[1], ByDomain)
    assert matching[1].whole == RegexMatch().with_pattern("x+")
    assert "mine@law" not in METRICS


def test_objectives_and_constraints_by_domain() -> None:
    legal = Objective.of("accuracy@law", bound=0.7)
    assert legal.is_quality
    assert legal.violation(0.6) > 0 >= legal.violation(0.7)
    assert Objective.of("mine@law", own=ByDomain.over(Own.declared("mine", "a:b", maximise=False), "law")).is_quality
    params = Objective.of("num_params")
    space: Any = None
    plain = Problem(space=space, objectives=(Objective.of("accuracy"), params), num_trials=1)
    values = {"accuracy": 0.9, "accuracy@law": 0.6, "num_params": 10.0, "latency_s": 0.2}
    assert plain.violation(values) <= 0
    reported = (legal, Objective.of("latency_s", bound=0.1))
    bound = Problem(space=space, objectives=plain.objectives, num_trials=1, reported=reported)
    assert bound.violation(values) == pytest.approx(1.0)
    assert bound.violation({**values, "latency_s": 0.1}) == pytest.approx(0.1 / 0.7)
    assert bound.measures == (*plain.objectives, *reported)
    assert "latency_s" in COSTS
