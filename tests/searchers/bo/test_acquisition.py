"""The worth of points, against botorch's Monte Carlo classes and against what can be worked out by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.monte_carlo import qNoisyExpectedImprovement
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.acquisition.multi_objective.monte_carlo import qNoisyExpectedHypervolumeImprovement
from botorch.acquisition.objective import GenericMCObjective
from botorch.models import ModelListGP, SingleTaskGP
from botorch.sampling.normal import SobolQMCNormalSampler
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import Module

from autopeft.searchers.bo import acquisition as module
from autopeft.searchers.bo.acquisition import (
    TINY,
    LogAcquisition,
    NoisyHypervolumeImprovement,
    WithDeclared,
    hypervolume_improvement,
    log_trainable,
)
from autopeft.searchers.bo.surrogate import GaussianProcess

from ...support.slow import slow

#: Features of a point.
WIDTH = 2
SAMPLES = 1024
none = torch.zeros((0, WIDTH + 1), dtype=torch.double)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """botorch advises its logarithmic classes, and points next to each other need a jitter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def inputs(n: int, seed: int) -> Tensor:
    """Features, and a known loss that falls with the first of them: what is good costs."""
    points = np.random.default_rng(seed).random((n, WIDTH))
    return torch.as_tensor(np.column_stack([points, points.sum(1) - 1]))


def losses_of(points: Tensor, which: int = 0) -> np.ndarray:
    x, y = points[:, 0].numpy(), points[:, 1].numpy()
    return [2 - 2 * x - np.sin(3 * y), np.cos(3 * x) + y, (x - y) ** 2 * 3 - 1][which]


def surrogates(baseline: Tensor, count: int = 1, noise: float = 0.05) -> list[GaussianProcess]:
    rng = np.random.default_rng(11)
    return [
        GaussianProcess.fit(
            baseline,
            losses_of(baseline, which) + noise**0.5 * rng.normal(size=len(baseline)),
            np.full(len(baseline), noise),
            WIDTH,
            "smooth",
        )
        for which in range(count)
    ]


def models(found: Sequence[GaussianProcess]) -> list[SingleTaskGP]:
    return [one.model for one in found]


def stock(
    kind: Callable[..., Module],
    fitted: Sequence[SingleTaskGP],
    sources: Sequence[int],
    baseline: Tensor,
    pending: Tensor,
    corner: Tensor,
    samples: int = SAMPLES,
) -> Module:
    """botorch's class for the same question."""
    return kind(
        model=fitted[0] if len(fitted) == 1 else ModelListGP(*fitted),
        ref_point=-corner,
        X_baseline=baseline,
        X_pending=pending if len(pending) else None,
        objective=WithDeclared(sources),
        sampler=SobolQMCNormalSampler(torch.Size([samples]), seed=1),
        prune_baseline=False,
        cache_root=False,
    )


def values(worth: LogAcquisition, points: Tensor) -> np.ndarray:
    with torch.no_grad():
        return worth(points).numpy()


def one_by_one(worth: Module, points: Tensor) -> np.ndarray:
    with torch.no_grad():
        return worth(points[:, None]).numpy()


# Against the library


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sources", "pending"),
    [((0, -1), False), ((0, 1), False), ((-1, 0), False), ((0, -1), True)],
    ids=["one is known", "both are modelled", "the first is known", "with pending points"],
)
def test_the_closed_form_is_botorch_s_expectation(
    sources: tuple[int, ...], pending: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline, points = inputs(10, 0), inputs(80, 1)
    under_way = inputs(2, 2) if pending else none
    fitted = models(surrogates(baseline, 1 + max(sources)))
    corner = torch.tensor([1.0, 0.9], dtype=torch.double)
    hypervolume = stock(qNoisyExpectedHypervolumeImprovement, fitted, sources, baseline, under_way, corner)
    logarithm = stock(qLogNoisyExpectedHypervolumeImprovement, fitted, sources, baseline, under_way, corner)
    sampled = one_by_one(hypervolume, points)
    assert (sampled > 0.01).sum() >= 12, "there is something to compare"

    # As it is used.
    few = values(NoisyHypervolumeImprovement(fitted, sources, baseline, under_way, corner, seed=5), points)
    counts = sampled > 1e-3 * sampled.max()
    assert spearmanr(few[counts], one_by_one(logarithm, points)[counts]).statistic > 0.98
    # With as many fronts as the library has samples.
    monkeypatch.setattr(module, "FRONTS", dict.fromkeys(module.FRONTS, SAMPLES))
    many = np.exp(values(NoisyHypervolumeImprovement(fitted, sources, baseline, under_way, corner, seed=5), points))
    assert np.abs(many - sampled).max() < 0.03 * sampled.max()
    assert many.sum() == pytest.approx(sampled.sum(), rel=0.01)


def test_one_objective_is_noisy_expected_improvement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FRONTS", dict.fromkeys(module.FRONTS, SAMPLES))
    baseline, points = inputs(10, 0)[:, :WIDTH], inputs(40, 1)[:, :WIDTH]
    fitted = models(surrogates(baseline))
    own = np.exp(values(NoisyHypervolumeImprovement(fitted, [0], baseline, none[:, :WIDTH], torch.tensor([99.0]), 5),
                        points))  # fmt: skip
    settings = {"model": fitted[0], "X_baseline": baseline, "prune_baseline": False, "cache_root": False,
                "objective": GenericMCObjective(lambda samples, X=None: -samples[..., 0]),
                "sampler": SobolQMCNormalSampler(torch.Size([SAMPLES]), seed=1)}  # fmt: skip
    sampled = one_by_one(qNoisyExpectedImprovement(**settings), points)
    assert (sampled > 0.01).sum() >= 5
    assert np.abs(own - sampled).max() < 0.03 * sampled.max()
    logarithm = one_by_one(qLogNoisyExpectedImprovement(**settings), points)
    counts = sampled > 1e-3 * sampled.max()
    assert spearmanr(np.log(own)[counts], logarithm[counts]).statistic > 0.98


# By hand


def area(front: Sequence[tuple[float, float]], corner: tuple[float, float]) -> float:
    """What a front of losses dominates within its corner, as a sum of columns."""
    total, lowest = 0.0, corner[1]
    for x, y in sorted(front):
        if x < corner[0] and y < lowest:
            total += (corner[0] - x) * (lowest - y)
            lowest = y
    return total


def test_without_noise_it_is_the_growth_of_the_area() -> None:
    """Points whose losses are known as good as exactly, and a front that is."""
    points = inputs(25, 3)
    found = GaussianProcess.fit(points, losses_of(points), np.full(25, 1e-6), WIDTH, "smooth")
    found.model.likelihood.noise_covar.raw_noise.data.fill_(1e-7)
    baseline, others = points[:8], points[8:]
    corner = (1.0, 0.8)
    worth = NoisyHypervolumeImprovement([found.model], (0, -1), baseline, none, torch.tensor(corner).double(), 0)
    pairs = list(zip(losses_of(points), points[:, -1].tolist(), strict=True))
    growth = np.array([area([*pairs[:8], pair], corner) - area(pairs[:8], corner) for pair in pairs[8:]])
    assert (growth > 0.01).sum() >= 3
    assert (growth == 0).sum() >= 3
    assert np.allclose(np.exp(values(worth, others)), growth, atol=2e-3)


def test_beyond_the_corner_nothing_is_worth_anything() -> None:
    """A bound on an objective belongs into the corner: a known loss beyond it, and one that is surely modelled."""
    baseline, points = inputs(16, 0), inputs(60, 1)
    (found,) = surrogates(baseline, noise=1e-3)
    with torch.no_grad():
        posterior = found.model.posterior(points)
    mean, deviation = posterior.mean[:, 0].numpy(), posterior.variance[:, 0].sqrt().numpy()
    known = points[:, -1].numpy()
    corner = torch.tensor([0.3, 0.1], dtype=torch.double)
    worth = values(hypervolume_improvement([found.model], (0, -1), baseline, none, corner, seed=0), points)
    assert np.all(worth[known >= 0.1] == np.log(TINY))
    surely = mean - 6 * deviation > 0.3
    assert surely.sum() >= 5
    assert worth[surely].max() < -15
    assert worth.max() > -5


def test_nobody_knows_a_trial_that_is_good_enough() -> None:
    """All trials lie beyond the corner: what counts is to get within it."""
    baseline, points = inputs(10, 0), inputs(40, 1)
    fitted = models(surrogates(baseline))
    corner = torch.tensor([losses_of(baseline).min() - 0.2, 2.0], dtype=torch.double)
    worth = values(hypervolume_improvement(fitted, (0, -1), baseline, none, corner, seed=0), points)
    assert np.isfinite(worth).all()
    assert len(np.unique(worth)) > 20
    assert losses_of(points)[worth.argmax()] < np.quantile(losses_of(points), 0.2)


def test_pending_points_repel() -> None:
    baseline, points = inputs(10, 0), inputs(200, 1)
    fitted = models(surrogates(baseline))
    corner = torch.tensor([1.0, 0.9], dtype=torch.double)
    before = values(hypervolume_improvement(fitted, (0, -1), baseline, none, corner, seed=0), points)
    best = int(before.argmax())
    after = values(hypervolume_improvement(fitted, (0, -1), baseline, points[best : best + 1], corner, seed=0), points)
    drop = before - after
    distance = np.linalg.norm((points - points[best])[:, :WIDTH].numpy(), axis=1)
    assert drop[best] > 2
    near = (distance > 0) & (distance < 0.08)
    assert near.sum() >= 2
    assert drop[near].min() > 0.3
    counts = (distance > 0.5) & (before > before.max() - 4)
    assert counts.sum() >= 3
    assert np.median(np.abs(drop[counts])) < 0.25 * drop[near].min()


def test_what_cannot_be_trained_is_worth_less() -> None:
    baseline, points = inputs(20, 0), inputs(40, 1)
    labels = np.where(baseline[:, 0] > 0.5, 1.0, -1.0)
    failures = GaussianProcess.fit(baseline, labels, np.full(20, np.nan), WIDTH, "smooth").model
    drop = -values(lambda inputs: log_trainable(failures, inputs), points)
    assert drop.min() >= 0
    x = points[:, 0].numpy()
    assert drop[x > 0.7].min() > 1.5
    assert drop[x < 0.3].max() < 0.2


# More objectives


@pytest.mark.parametrize("sources", [(0, 1, -1), slow((0, -1, -2)), slow((0, 1, 2))])
def test_three_objectives(sources: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A point that is known to cost less, and is the same to the processes, is worth more."""
    num_known = sum(source < 0 for source in sources)
    baseline, points = (
        torch.hstack([table, -table[:, :1]])[:, : WIDTH + num_known] for table in (inputs(10, 0), inputs(30, 1))
    )
    fitted = models(surrogates(baseline, 1 + max(sources)))
    corner = torch.tensor([1.5, 1.5, 1.2], dtype=torch.double)
    pending = points[:1]
    worth = hypervolume_improvement(fitted, sources, baseline, pending, corner, seed=0)
    found = values(worth, points)
    assert found.shape == (30,)
    assert np.isfinite(found).all()
    assert found.max() > -6
    for column in range(WIDTH, WIDTH + num_known):
        cheaper = points.clone()
        cheaper[:, column] -= 0.3
        better = values(worth, cheaper)
        assert (better >= found - 1e-9).all()
        assert (better > found).mean() > 0.5
    monkeypatch.setattr(module, "FRONTS", dict.fromkeys(module.FRONTS, 128))
    many = np.exp(values(hypervolume_improvement(fitted, sources, baseline, pending, corner, seed=0), points))
    hypervolume = stock(qNoisyExpectedHypervolumeImprovement, fitted, sources, baseline, pending, corner, samples=128)
    sampled = one_by_one(hypervolume, points)
    assert np.abs(many - sampled).max() < 0.1 * sampled.max()
    counts = sampled > 0.05 * sampled.max()
    # As it is used: a few fronts tell the good points from the others, hardly the others from each other.
    assert counts.sum() >= 8
    assert spearmanr(found[counts], sampled[counts]).statistic > 0.6


@pytest.mark.parametrize("pending", [none, inputs(2, 4)], ids=["alone", "with pending points"])
def test_four_objectives_are_scalarised(pending: Tensor) -> None:
    baseline, points = inputs(10, 0), inputs(30, 1)
    sources = (0, 1, -1, 2)
    fitted = models(surrogates(baseline, 3))
    corner = torch.full((4,), 2.0, dtype=torch.double)
    found = [
        values(hypervolume_improvement(fitted, sources, baseline, pending, corner, seed), points) for seed in range(6)
    ]
    assert all(worth.shape == (30,) and np.isfinite(worth).all() for worth in found)
    assert len({int(worth.argmax()) for worth in found}) >= 2, "weights differ from seed to seed"
    again = values(hypervolume_improvement(fitted, sources, baseline, pending, corner, 0), points)
    assert np.array_equal(again, found[0])


def test_four_objectives_of_which_one_is_constant() -> None:
    baseline, points = inputs(10, 0), inputs(30, 1)
    (first, second) = surrogates(baseline, 2)
    flat = GaussianProcess.fit(baseline, np.zeros(10), np.full(10, np.nan), WIDTH, "smooth")
    corner = torch.full((4,), 2.0, dtype=torch.double)
    sources = (0, 1, 2, -1)
    found = values(hypervolume_improvement(models([first, second, flat]), sources, baseline, none, corner, 0), points)
    assert np.isfinite(found).all()
    assert len(np.unique(found)) > 20
