"""The processes of `bo`: what they say of trials that they have not seen, of noise and of what matters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autopeft.searchers.bo.surrogate import Floats, GaussianProcess, Tilted, relevance, smooth

every_kind = pytest.mark.parametrize("kind", ["smooth", "sparse"])
UNKNOWN = float("nan")


def standardised(values: Floats) -> Floats:
    return (values - values.mean()) / values.std()


def sample(n: int, width: int, seed: int) -> tuple[Floats, Floats]:
    """Points, and a smooth function of the first and the third feature."""
    points = np.random.default_rng(seed).random((n, width))
    return points, standardised(np.sin(4 * points[:, 0]) + 1.5 * (points[:, 2] - 0.3) ** 2)


def fitted(points: Floats, losses: Floats, kind: str = "smooth", noise: Floats | float = UNKNOWN) -> GaussianProcess:
    noise = np.broadcast_to(noise, losses.shape).copy()
    return GaussianProcess.fit(torch.as_tensor(points), losses, noise, points.shape[1], kind)


def matern(a: Floats, b: Floats, scales: Floats) -> Floats:
    """5/2"""
    distance = 5**0.5 * np.linalg.norm((a[:, None] - b[None]) / scales, axis=-1)
    return (1 + distance + distance**2 / 3) * np.exp(-distance)


def by_hand(
    surrogate: GaussianProcess, train: Floats, losses: Floats, noise: Floats, points: Floats
) -> tuple[Floats, Floats]:
    """Mean and variance of the function at `points`, with the hyperparameters of `surrogate`."""
    kernel = surrogate.model.covar_module
    scale = kernel.outputscale.item() if hasattr(kernel, "outputscale") else 1.0
    scales = surrogate.lengthscales()
    constant = surrogate.model.mean_module.constant.item()
    inverse = np.linalg.inv(scale * matern(train, train, scales) + np.diag(noise))
    across = scale * matern(points, train, scales)
    return constant + across @ inverse @ (losses - constant), scale - np.einsum("ij,jk,ik->i", across, inverse, across)


@every_kind
def test_left_out_is_what_really_leaving_out_gives(kind: str) -> None:
    points, losses = sample(12, 4, seed=0)
    losses = standardised(losses + 0.2 * np.random.default_rng(1).normal(size=12))
    known = np.linspace(0.02, 0.3, 12)
    known[[2, 7]] = UNKNOWN
    surrogate = fitted(points, losses, kind, known)
    # Trials without a known error have the typical one.
    noise = np.where(np.isnan(known), np.nanmedian(known), known)
    noise *= surrogate.model.likelihood.noise_covar.noise.item() / np.nanmedian(known)
    means, variances = surrogate.left_out()
    for i in range(12):
        rest = np.arange(12) != i
        mean, variance = by_hand(surrogate, points[rest], losses[rest], noise[rest], points[i : i + 1])
        assert means[i] == pytest.approx(mean[0], abs=1e-6)
        assert variances[i] == pytest.approx(variance[0] + noise[i], rel=1e-6)
    density = -0.5 * (np.log(variances) + (losses - means) ** 2 / variances).sum()
    assert surrogate.left_out_log_density() == pytest.approx(density)


@every_kind
def test_the_posterior_is_the_function_s(kind: str) -> None:
    """Without the noise of a measurement, and blind to columns that are carried along."""
    points, losses = sample(14, 3, seed=2)
    noise = np.full(14, 0.05)
    carried = np.random.default_rng(0).random((14, 2))
    surrogate = GaussianProcess.fit(torch.as_tensor(np.hstack([points, carried])), losses, noise, 3, kind)
    factor = surrogate.model.likelihood.noise_covar.noise.item()
    # Also at as many points as there are trials, whose noise is none of theirs.
    for count in (5, 14):
        others = np.random.default_rng(3).random((count, 3))
        mean, variance = by_hand(surrogate, points, losses, np.full(14, factor), others)
        with torch.no_grad():
            inputs = torch.as_tensor(np.hstack([others, np.full((count, 2), 1e6)]))
            posterior = surrogate.model.posterior(inputs)
        assert np.allclose(posterior.mean[:, 0], mean, atol=1e-6)
        assert np.allclose(posterior.variance[:, 0], variance, atol=1e-6)


@every_kind
def test_smooth_functions_are_learnt_and_noise_is_not(kind: str) -> None:
    points, losses = sample(30, 4, seed=4)
    assert fitted(points, losses, kind).rank_correlation() > 0.9
    noise = [np.random.default_rng(seed).normal(size=30) for seed in range(5)]
    assert abs(np.median([fitted(points, standardised(y), kind).rank_correlation() for y in noise])) < 0.3


def test_constant_losses_rank_nothing() -> None:
    points, _ = sample(8, 3, seed=0)
    assert fitted(points, np.zeros(8)).rank_correlation() == 0.0


@pytest.mark.parametrize("deviation", [0.1, 0.5])
def test_the_scale_of_the_noise_is_learnt(deviation: float) -> None:
    """From known errors that are right, too large or too small, and without any."""
    points, losses = sample(40, 3, seed=5)
    losses = losses + deviation * np.random.default_rng(6).normal(size=40)
    true = deviation**2
    for claimed, factor in ((true, 2.0), (4 * true, 3.0), (true / 4, 3.0), (UNKNOWN, 3.0)):
        found = fitted(points, losses, noise=claimed).model.likelihood.noise_covar.noise.item()
        assert true / factor < found < true * factor, claimed


def test_errors_of_a_trial_weigh_it() -> None:
    """Of two outliers the one that is said to be uncertain has less of a say."""
    points, losses = sample(30, 3, seed=7)
    losses = losses.copy()
    losses[:2] += 4.0
    noise = np.full(30, 0.04)
    noise[0] = 16.0
    surrogate = fitted(points, losses, noise=noise)
    with torch.no_grad():
        mean = surrogate.model.posterior(torch.as_tensor(points[:2])).mean[:, 0].numpy()
    follows = (mean - (losses[:2] - 4.0)) / 4.0
    assert follows[0] < 0.2
    assert follows[1] > follows[0] + 0.1
    assert np.isfinite(fitted(points, losses, noise=0.0).left_out()[0]).all(), "an error of 0 says nothing"


@every_kind
def test_relevance_tells_what_matters(kind: str) -> None:
    points, losses = sample(40, 6, seed=8)
    genes = ["a", "b", "c", "d", "d", "e"]
    found = relevance(fitted(points, losses, kind).lengthscales(), genes, points.var(0))
    assert found.keys() == set(genes)
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["a"] + found["c"] > 0.8
    assert min(found["a"], found["c"]) > 2 * max(found["b"], found["d"], found["e"])


def test_relevance_of_what_does_not_vary() -> None:
    scales, spread = np.array([1.0, 0.5, 2.0]), np.array([0.0, 0.1, 0.0])
    assert relevance(scales, ["a", "b", "c"], spread) == {"a": 0.0, "b": 1.0, "c": 0.0}
    assert relevance(scales, ["a", "b", "b"], np.zeros(3)) == {"a": 0.0, "b": 0.0}
    # By hand: 0.2 / 1 for a; 0.1 / 0.25 + 1.6 / 4 for b.
    assert relevance(scales, ["a", "b", "b"], np.array([0.2, 0.1, 1.6])) == pytest.approx({"a": 0.2, "b": 0.8})


def test_of_two_kinds_the_likelier_is_chosen() -> None:
    """Two of thirty features matter: a sparse process sees that sooner."""
    points, losses = sample(45, 30, seed=9)
    noise = np.full(45, UNKNOWN)
    inputs = torch.as_tensor(points)
    kinds = [GaussianProcess.fit(inputs, losses, noise, 30, kind) for kind in ("smooth", "sparse")]
    chosen = GaussianProcess.chosen(inputs, losses, noise, 30, ("smooth", "sparse"))
    densities = [one.left_out_log_density() for one in kinds]
    assert chosen.left_out_log_density() == pytest.approx(max(densities))
    assert densities[1] > densities[0]
    assert np.sort(kinds[1].lengthscales())[1] < 0.2 * np.median(kinds[1].lengthscales())


# The learning rate relative to the size


def test_the_tilted_kernel_is_its_base_at_moved_points() -> None:
    points = torch.as_tensor(np.random.default_rng(0).random((7, 4)))
    base = smooth(3)
    kernel = Tilted(base, rate=1, size=3)
    with torch.no_grad():
        kernel.tilt.fill_(0.3)
        moved = points.clone()
        moved[:, 1] += 0.3 * points[:, 3]
        assert torch.allclose(kernel(points).to_dense(), base(moved).to_dense())
        assert torch.allclose(kernel(points, diag=True), base(moved, diag=True))
    assert GaussianProcess.fit(
        points, np.arange(7.0), np.full(7, UNKNOWN), 3, "smooth", rate=1
    ).lengthscales().shape == (3,)


@every_kind
@pytest.mark.parametrize("tilt", [0.0, 0.4])
def test_the_tilt_is_learnt(kind: str, tilt: float) -> None:
    """The best rate falls with the size; what is learnt ranks unseen points better than without it."""
    rng = np.random.default_rng(1)
    rates, sizes = rng.random((2, 60))
    # An input that tells the size only roughly, as the ranks of single layers do.
    points = np.column_stack([rates, sizes + rng.normal(scale=0.1, size=60), sizes])
    losses = standardised((rates + tilt * sizes - 0.6) ** 2)
    surrogate = GaussianProcess.fit(torch.as_tensor(points), losses, np.full(60, UNKNOWN), 2, kind, rate=0)
    assert surrogate.model.covar_module.tilt.item() == pytest.approx(tilt, abs=0.1)
