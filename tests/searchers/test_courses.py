"""Final values that are extrapolated from a rung."""

from __future__ import annotations

import numpy as np
import pytest

from autopeft.search_space.problem import Measurement
from autopeft.searchers.courses import LEAST_COURSES, Extrapolation, at_rung


def test_a_line_is_found() -> None:
    losses = np.linspace(1, 2, 9)
    found = Extrapolation.of(losses, 0.3 + 0.5 * losses)
    assert found is not None
    assert found(np.array([1.5, 4.0])) == pytest.approx([1.05, 2.3])
    assert found.variance == pytest.approx(0, abs=1e-10)


def test_the_deviations_have_their_variance() -> None:
    rng = np.random.default_rng(0)
    losses = rng.random(4000)
    found = Extrapolation.of(losses, losses + rng.normal(0, 0.2, 4000))
    assert found is not None
    assert found.variance == pytest.approx(0.04, rel=0.1)


def test_a_falling_line_is_flat() -> None:
    found = Extrapolation.of(np.arange(6.0), -np.arange(6.0))
    assert found is not None
    assert found(np.array([0.0, 9.0])) == pytest.approx([-2.5, -2.5])


def test_too_few() -> None:
    losses = np.arange(LEAST_COURSES - 1.0)
    assert Extrapolation.of(losses, losses) is None


def test_the_loss_at_a_rung() -> None:
    measurement = Measurement(values={}, rungs=((0.15, {"loss": 2.0}), (0.4, {"accuracy": 0.5})))
    assert [at_rung(m, r) for m, r in ((measurement, 0.15), (measurement, 0.4), (measurement, 0.9), (None, 0.1))] == [
        2.0, None, None, None
    ]  # fmt: skip
