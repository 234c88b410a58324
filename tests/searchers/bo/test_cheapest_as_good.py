"""The acquisition function of the goal "cheapest_as_good", against its own definition by sampling, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from autopeft.searchers.bo.acquisition import quiet
from autopeft.searchers.bo.cheapest_as_good import CheapestAsGood
from autopeft.searchers.bo.surrogate import GaussianProcess

from .test_acquisition import WIDTH, inputs, losses_of, surrogates

MARGIN = 0.3


def log_costs(points: Tensor) -> Tensor:
    """What is good costs: the first feature lowers the loss, see `losses_of`."""
    return 3 * points[:, 0]


def worth(
    found: GaussianProcess, baseline: Tensor, points: Tensor, margin: float = MARGIN, seed: int = 0
) -> np.ndarray:
    with quiet():
        function = CheapestAsGood(found.model, baseline, log_costs(baseline), margin, seed)
        return function(points, log_costs(points)).exp().numpy()


def test_it_is_the_expectation_that_it_says() -> None:
    """Joint samples of the losses at all points, without any closed form."""
    baseline, points = inputs(10, 0), inputs(12, 1)
    (found,) = surrogates(baseline, noise=0.3)
    with quiet():
        drawn = found.model.posterior(torch.cat([baseline, points])).rsample(torch.Size([240_000]))[..., 0].numpy()
    known, new = drawn[:, :10], drawn[:, 10:]
    best = known.min(1, keepdims=True)
    costs = log_costs(baseline).numpy()
    cheapest = np.where(known <= best + MARGIN, costs, np.inf).min(1, keepdims=True)
    saving = np.maximum(0, cheapest - log_costs(points).numpy())
    samples = (new <= best + MARGIN) * saving + np.maximum(0, best - new) / MARGIN
    expected = samples.mean(0)
    assert (expected > 0.05).sum() >= 4, "there is something to compare"
    many = np.array([worth(found, baseline, points, seed=seed) for seed in range(160)])
    error = np.sqrt(samples.var(0) / len(samples) + many.var(0) / len(many))
    assert error.max() < 0.012 * expected.max(), "the comparison is sharp"
    assert (np.abs(many.mean(0) - expected) <= 4 * error + 1e-6).all()


def test_without_noise_it_is_the_saving_or_the_gain() -> None:
    points = inputs(40, 3)
    found = GaussianProcess.fit(points, losses_of(points), np.full(40, 1e-6), WIDTH, "smooth")
    found.model.likelihood.noise_covar.raw_noise.data.fill_(1e-7)
    baseline, others = points[:8], points[8:]
    losses, best = losses_of(points), losses_of(points)[:8].min()
    costs = log_costs(points).numpy()
    cheapest = costs[:8][losses[:8] <= best + MARGIN].min()
    saving = np.where(losses[8:] <= best + MARGIN, np.maximum(0, cheapest - costs[8:]), 0)
    expected = saving + np.maximum(0, best - losses[8:]) / MARGIN
    assert (expected > 0.01).sum() >= 3
    assert (expected == 0).sum() >= 3
    clear = np.abs(losses[8:] - best - MARGIN) > 0.01
    assert worth(found, baseline, others)[clear] == pytest.approx(expected[clear], abs=0.02)


def test_a_dearer_point_that_cannot_be_better_is_worth_nothing() -> None:
    baseline = inputs(16, 0)
    (found,) = surrogates(baseline, noise=1e-3)
    dear = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.double)
    best = baseline[int(losses_of(baseline).argmin())][None]
    with quiet():
        function = CheapestAsGood(found.model, baseline, log_costs(baseline), MARGIN, 0)
        cheap = function(best, log_costs(best) - 1)
        same = function(best, log_costs(best) + 1)
    assert float(cheap.exp()) > 0.9
    assert float(same.exp()) < 0.1
    assert torch.isfinite(function(dear, log_costs(dear))).all()


def test_beyond_the_bound_nothing_is_as_good() -> None:
    """A cheaper point within the margin of the best, whose loss is above the bound of the objective."""
    baseline = inputs(16, 0)
    (found,) = surrogates(baseline, noise=1e-3)
    best = baseline[int(losses_of(baseline).argmin())][None]
    with quiet():
        worth = [
            float(CheapestAsGood(found.model, baseline, log_costs(baseline), 0.3, 0, bound)(best, log_costs(best) - 1))
            for bound in (float("inf"), losses_of(baseline).min() - 1)
        ]
    assert worth[0] > -0.1
    assert worth[1] < -3
