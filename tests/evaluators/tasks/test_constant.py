"""Scores of the best constant prediction, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import f1_score

from autopeft.evaluators.tasks.causal_lm import CausalLM
from autopeft.evaluators.tasks.classification import Classification, MultiLabel
from autopeft.evaluators.tasks.constant import MOST_CONSTANTS, constant_scores
from autopeft.search_space.metrics import ALWAYS, QUALITIES, Own

TRAIN = [{"text": "", "label": label} for label in "aaab"]
VALIDATION = [{"text": "", "label": label} for label in "bbbaa"]


def own(function: object, maximise: bool = True) -> Own:
    return Own(name="mine", summary="", place="a:b", maximise=maximise, function=function)  # type: ignore[arg-type]


def test_one_label() -> None:
    metrics = (*ALWAYS, QUALITIES["macro-f1"], QUALITIES["matthews"])
    found = constant_scores(Classification, TRAIN, VALIDATION, "ab", metrics)
    # b, the more frequent one of the validation rows, is predicted; the loss is that of a 3/4, b 1/4.
    assert found == {
        "loss": pytest.approx(-(3 * math.log(1 / 4) + 2 * math.log(3 / 4)) / 5),
        "accuracy": pytest.approx(3 / 5),
        "macro-f1": pytest.approx(f1_score([1, 1, 1, 0, 0], [1] * 5, average="macro", zero_division=0)),
        "matthews": 0.0,
    }


def test_the_loss_is_the_entropy_where_the_splits_are_alike() -> None:
    found = constant_scores(Classification, VALIDATION * 2, VALIDATION, "ab", ALWAYS)
    assert found["loss"] == pytest.approx(-(0.6 * math.log(0.6) + 0.4 * math.log(0.4)))


def test_each_metric_has_its_own_best_constant_in_its_own_direction() -> None:
    share_of_a = own(lambda targets, predictions: (predictions == 0).mean())
    assert constant_scores(Classification, TRAIN, VALIDATION, "ab", (share_of_a,))["mine"] == 1.0
    away = own(lambda targets, predictions: 5.0 - (predictions == 0).sum(), maximise=False)
    assert constant_scores(Classification, TRAIN, VALIDATION, "ab", (away,))["mine"] == 0.0


def test_a_metric_without_a_value_is_left_out() -> None:
    def undefined(targets: np.ndarray, predictions: np.ndarray) -> float:
        raise ZeroDivisionError

    found = constant_scores(Classification, TRAIN, VALIDATION, "ab", (*ALWAYS, own(undefined)))
    assert found.keys() == {"loss", "accuracy"}
    assert constant_scores(Classification, TRAIN[:3], VALIDATION, "ab", ALWAYS).keys() == {"accuracy"}, "loss: infinite"


def test_any_number_of_labels() -> None:
    def rows(*sets: str) -> list[dict[str, object]]:
        return [{"text": "", "labels": list(labels)} for labels in sets]

    train, validation = rows("a", "ab", "", "a"), rows("ab", "ab", "a", "", "c")
    trained = rows("c", *[""] * 4)
    found = constant_scores(MultiLabel, train + trained, validation, "abc", (*ALWAYS, QUALITIES["macro-f1"]))
    assert found["accuracy"] == pytest.approx(2 / 5), "the set ab"
    targets = [[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert found["macro-f1"] == pytest.approx(f1_score(targets, [[1, 1, 1]] * 5, average="macro"))
    shares = {"a": 3 / 9, "b": 1 / 9, "c": 1 / 9}
    per_label = [
        -(row[k] * math.log(share) + (1 - row[k]) * math.log(1 - share))
        for row in targets
        for k, share in enumerate(shares.values())
    ]
    assert found["loss"] == pytest.approx(sum(per_label) / 15)


def test_many_labels_take_few_constants() -> None:
    calls: list[int] = []

    def count(targets: np.ndarray, predictions: np.ndarray) -> float:
        calls.append(1)
        return float((targets == predictions).mean())

    labels = [f"{i:03}" for i in range(100)]
    rows = [{"text": "", "label": label} for label in [*labels, "077"]]
    found = constant_scores(Classification, rows, rows, labels, (own(count),))
    assert found["mine"] == pytest.approx(2 / 101)
    assert len(calls) == MOST_CONSTANTS
    calls.clear()
    sets = [{"text": "", "labels": [label]} for label in labels]
    constant_scores(MultiLabel, sets, sets, labels, (own(count),))
    assert len(calls) == MOST_CONSTANTS + 1


def test_a_task_without_labels_has_none() -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    assert constant_scores(CausalLM, rows, rows, (), ALWAYS) == {}
