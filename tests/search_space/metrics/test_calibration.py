"""Brier score and expected calibration error against scikit-learn and slow references, and their columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss
from torch.nn.functional import cross_entropy

from autopeft.evaluators.tasks import TASKS
from autopeft.evaluators.tasks.classification import Classification, MultiLabel
from autopeft.search_space.metrics import QUALITIES
from autopeft.search_space.metrics.base import BRIER, CONFIDENCE, PREDICTION, TARGET, standard_error
from autopeft.search_space.metrics.calibration import NUM_BINS

ECE, BRIER_SCORE = QUALITIES["ece"], QUALITIES["brier"]
#: Confidences anywhere, and on the edges of the bins.
CONFIDENCES = st.floats(1e-6, 1) | st.integers(1, NUM_BINS).map(lambda m: m / NUM_BINS)
ROWS = st.lists(st.tuples(CONFIDENCES, st.booleans()), min_size=1, max_size=30)


def columns_of(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, list[float]]:
    task: Any = Classification(None, 8, [str(i) for i in range(logits.shape[1])])
    with torch.no_grad():
        return {name: column.tolist() for name, column in task.score(logits, targets).items()}


def slow_ece(confidences: list[float], right: list[float]) -> float:
    """Equation 3 of Guo et al. (2017), bin by bin: bin m has the confidences in ((m - 1) / M, m / M]."""
    total = 0.0
    for m in range(1, NUM_BINS + 1):
        inside = [i for i, c in enumerate(confidences) if (m - 1) < c * NUM_BINS <= m]
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            confidence = sum(confidences[i] for i in inside) / len(inside)
            total += len(inside) / len(confidences) * abs(accuracy - confidence)
    return total


@given(ROWS)
@settings(deadline=None)
def test_the_calibration_error_is_that_of_the_slow_sum(rows: list[tuple[float, bool]]) -> None:
    confidences, right = [c for c, _ in rows], [float(hit) for _, hit in rows]
    columns = {CONFIDENCE: confidences, "accuracy": right}
    assert ECE.value(columns) == pytest.approx(slow_ece(confidences, right), abs=1e-12)
    found = ECE.contributions(columns)
    assert np.mean(found) == pytest.approx(ECE.value(columns), abs=1e-12)
    if (n := len(rows)) > 1:
        without = np.array(
            [slow_ece([*confidences[:i], *confidences[i + 1 :]], [*right[:i], *right[i + 1 :]]) for i in range(n)]
        )
        expected = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
        assert standard_error(found) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_brier_score_is_that_of_numpy_and_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes, count = int(rng.integers(2, 6)), int(rng.integers(classes_least := 2, 40)) + classes_least
    logits, targets = rng.normal(0, 3, (count, classes)), rng.integers(classes, size=count)
    columns = columns_of(torch.tensor(logits), torch.tensor(targets))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    by_hand = ((shares - np.eye(classes)[targets]) ** 2).sum(1)
    assert columns[BRIER] == pytest.approx(by_hand, abs=1e-6)
    assert BRIER_SCORE.value(columns) == pytest.approx(by_hand.mean(), abs=1e-6)
    if classes == 2:
        # That of scikit-learn counts one of the two classes.
        assert BRIER_SCORE.value(columns) == pytest.approx(2 * brier_score_loss(targets, shares[:, 1]), abs=1e-6)
    assert columns[CONFIDENCE] == pytest.approx(shares.max(1), abs=1e-6)
    assert columns[PREDICTION] == logits.argmax(1).tolist()
    assert columns[TARGET] == targets.tolist()


def test_the_range_of_the_brier_score() -> None:
    sure = torch.tensor([[60.0, 0.0, 0.0]])
    assert columns_of(sure, torch.tensor([0]))[BRIER] == pytest.approx([0.0], abs=1e-6)
    assert columns_of(sure, torch.tensor([1]))[BRIER] == pytest.approx([2.0])
    assert (BRIER_SCORE.bound, BRIER_SCORE.worst) == (0.0, 2.0)


def test_loss_and_accuracy_are_what_they_were_to_the_bit() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(50, 7, requires_grad=True), torch.randint(7, (50,))
    scored = Classification(None, 8, list("abcdefg")).score(logits, targets)
    assert torch.equal(scored["loss"], cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(scored["accuracy"], (logits.argmax(-1) == targets).float())
    (found,) = torch.autograd.grad(scored["loss"].sum(), logits)
    (expected,) = torch.autograd.grad(cross_entropy(logits, targets, reduction="sum"), logits)
    assert torch.equal(found, expected)
    assert not {BRIER, CONFIDENCE} & scored.keys(), "a training step does without"
    with torch.no_grad():
        evaluated = Classification(None, 8, list("abcdefg")).score(logits, targets)
    assert evaluated.keys() == Classification.columns
    assert torch.equal(evaluated["loss"], scored["loss"])


def test_calibration_is_of_one_label_per_row() -> None:
    for metric in (ECE, BRIER_SCORE):
        able = [name for name, task in TASKS.items() if metric.computable(task.readable())]
        assert able == ["classification"]
        assert not metric.computable(MultiLabel.readable())
