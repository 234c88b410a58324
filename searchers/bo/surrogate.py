"""Gaussian processes over the encoded genes, which predict losses at points that were never tried.

Notation: n trials, D features. Losses are standardised before they come here; everything is float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import log, sqrt
from typing import Any

import numpy as np
import torch
from botorch.exceptions.warnings import OptimizationWarning
from botorch.models import SingleTaskGP
from botorch.models.map_saas import add_saas_prior
from botorch.optim.fit import fit_gpytorch_mll_scipy
from botorch.utils.constraints import LogTransformedInterval
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import Kernel, MaternKernel, ScaleKernel
from gpytorch.likelihoods.gaussian_likelihood import _GaussianLikelihoodBase
from gpytorch.means import Mean
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.module import Module
from gpytorch.priors import GammaPrior, LogNormalPrior, NormalPrior
from linear_operator.operators import DiagLinearOperator, LinearOperator
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor
from typing_extensions import override

Floats = NDArray[np.float64]

#: Mean and standard deviation of the tilt before any trial. 300 trainings of the race's table say 0.28.
TILT = 0.2, 0.1
#: Steps of L-BFGS; the likelihood is flat long before.
FIT_STEPS = 75
LEAST_NOISE = 1e-4


class ScaledNoise(Module):  # type: ignore[misc]  # GPyTorch counts as untyped
    """Noise variances known up to one learned factor: that of training row i is `factor * weights[i]`.

    The standard error of a validation score is known, but it is not the noise between candidates: all are scored on the
    same examples, which removes some of it, and training adds the noise of its seed. Both act on all candidates alike.
    """

    def __init__(self, weights: Tensor, prior: LogNormalPrior) -> None:
        super().__init__()
        self.weights = weights
        self.register_parameter("raw_noise", torch.nn.Parameter(torch.zeros(1, dtype=torch.double)))
        self.register_constraint(
            "raw_noise", GreaterThan(LEAST_NOISE, transform=None, initial_value=max(float(prior.mode), 2 * LEAST_NOISE))
        )
        self.register_prior("noise_prior", prior, lambda module: module.noise)

    @property
    def noise(self) -> Tensor:
        """The learned factor, [1]."""
        factor: Tensor = self.raw_noise
        return factor

    @override
    def forward(self, *params: Any, shape: torch.Size | None = None, **kwargs: Any) -> DiagLinearOperator:
        size = len(self.weights) if shape is None else shape[-1]
        # At points other than the training rows the function is predicted, not an observation of it.
        weights = self.weights if size == len(self.weights) else torch.ones(size, dtype=torch.double)
        return DiagLinearOperator(self.noise * weights)


class Trend(Mean):  # type: ignore[misc]  # GPyTorch counts as untyped
    """Mean function: a constant plus a multiple of one column of the inputs, the prediction of a prior study.

    The multiple is learned and starts from 0, so a prior study that is unrelated to this one has no influence.
    """

    def __init__(self, column: int) -> None:
        super().__init__()
        self.column = column
        self.register_parameter("constant", torch.nn.Parameter(torch.zeros((), dtype=torch.double)))
        self.register_parameter("slope", torch.nn.Parameter(torch.zeros((), dtype=torch.double)))
        prior = NormalPrior(torch.zeros((), dtype=torch.double), torch.ones((), dtype=torch.double))
        self.register_prior("slope_prior", prior, "slope")

    @override
    def forward(self, x: Tensor) -> Tensor:
        mean: Tensor = self.constant + self.slope * x[..., self.column]
        return mean


def smooth(features: int) -> Kernel:
    """Return a Matérn 5/2 kernel with a lengthscale per feature, whose prior grows with the root of their number.

    Hvarfner, Hellsten and Nardi 2024: processes over 10 and over 200 features are equally smooth a priori. BoTorch has
    this prior, and learns the lengthscale itself. Learning its logarithm takes less than half of the steps.
    """
    prior = LogNormalPrior(sqrt(2) + log(max(features, 1)) / 2, sqrt(3))
    return MaternKernel(
        nu=2.5,
        ard_num_dims=features,
        active_dims=list(range(features)),
        lengthscale_prior=prior,
        lengthscale_constraint=LogTransformedInterval(2.5e-2, 1e4, initial_value=float(prior.mode)),
    )


def sparse(features: int) -> Kernel:
    """Return a Matérn 5/2 kernel under the SAAS prior, by which few features matter (Eriksson and Jankowiak 2021).

    It is fitted to the maximum a posteriori. Sampling it, as the paper does, needs JAX; an ensemble of maxima costs
    eight times as much and ranks no better.
    """
    matern = MaternKernel(nu=2.5, ard_num_dims=features, active_dims=list(range(features)))
    return ScaleKernel(add_saas_prior(matern), outputscale_prior=GammaPrior(2.0, 0.15))


class Tilted(Kernel):  # type: ignore[misc]  # GPyTorch counts as untyped
    """A kernel that sees the learning rate relative to what suits the size of a candidate.

    Small adapters want higher rates: the best one falls with the parameters N as N^-tilt. Where a kernel measures
    distances in the rate itself, the optimum lies askew in rate and size, which takes many trials to learn. Here the
    feature `rate` moves by tilt times the input `size`, the logarithm of N in the same unit, and the tilt is learned.
    """

    def __init__(self, base: Kernel, rate: int, size: int) -> None:
        super().__init__()
        self.base_kernel = base
        self.rate, self.size_input = rate, size
        self.register_parameter("tilt", torch.nn.Parameter(torch.full((), TILT[0], dtype=torch.double)))
        mean, deviation = (torch.full((), number, dtype=torch.double) for number in TILT)
        self.register_prior("tilt_prior", NormalPrior(mean, deviation), "tilt")

    @override
    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor | LinearOperator:
        found: Tensor | LinearOperator = self.base_kernel(self._moved(x1), self._moved(x2), diag=diag, **params)
        return found

    def _moved(self, x: Tensor) -> Tensor:
        rate = x[..., self.rate] + self.tilt * x[..., self.size_input]
        return torch.cat([x[..., : self.rate], rate[..., None], x[..., self.rate + 1 :]], dim=-1)


KERNELS = {"smooth": smooth, "sparse": sparse}


@dataclass(frozen=True, slots=True)
class GaussianProcess:
    """A fitted Gaussian process over inputs [n, D + more]; the kernel ignores columns beyond the D features."""

    model: SingleTaskGP
    inputs: Tensor
    losses: Tensor

    @classmethod
    def chosen(
        cls,
        inputs: Tensor,
        losses: Floats,
        noise: Floats,
        features: int,
        kinds: Sequence[str],
        rate: int | None = None,
        trend: int | None = None,
    ) -> GaussianProcess:
        """Fit several kinds of process and return the one with the largest leave-one-out density of the losses."""
        fitted = [cls.fit(inputs, losses, noise, features, kind, rate, trend) for kind in kinds]
        return fitted[0] if len(fitted) == 1 else max(fitted, key=lambda one: one.left_out_log_density())

    @classmethod
    def fit(
        cls,
        inputs: Tensor,
        losses: Floats,
        noise: Floats,
        features: int,
        kind: str,
        rate: int | None = None,
        trend: int | None = None,
    ) -> GaussianProcess:
        """Fit a process by maximum a posteriori.

        `noise`: variances [n] of the standardised losses, NaN where none is known. `kind`: of `KERNELS`. `rate`: the
        feature that is the learning rate, see `Tilted`; the size is then the input after the features. `trend`: the
        column of the inputs that the mean follows, see `Trend`.
        """
        known = np.isfinite(noise) & (noise > 0)
        typical = float(np.median(noise[known])) if known.any() else 1.0
        weights = np.where(known, noise / typical, 1.0)
        # Known errors centre the factor; without them it is the library's own prior.
        prior = LogNormalPrior(log(max(typical, LEAST_NOISE)), 0.75) if known.any() else LogNormalPrior(-4.0, 1.0)
        target = torch.as_tensor(losses, dtype=torch.double)[:, None]
        likelihood = _GaussianLikelihoodBase(noise_covar=ScaledNoise(torch.as_tensor(weights), prior))
        kernel = KERNELS[kind](features)
        if rate is not None:
            kernel = Tilted(kernel, rate, features)
        mean = None if trend is None else Trend(trend)
        model = SingleTaskGP(
            inputs, target, covar_module=kernel, likelihood=likelihood, mean_module=mean, outcome_transform=None
        )
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizationWarning)
            # One attempt: `fit_gpytorch_mll` takes an early stop for a failure and restarts from random values.
            with suppress(ArithmeticError, RuntimeError):
                fit_gpytorch_mll_scipy(mll, options={"maxiter": FIT_STEPS})
        model.eval()
        return cls(model=model, inputs=inputs, losses=target[:, 0])

    def lengthscales(self) -> Floats:
        """Return the lengthscale of each feature, [D]."""
        kernel = self.model.covar_module
        while hasattr(kernel, "base_kernel"):
            kernel = kernel.base_kernel
        found: Floats = kernel.lengthscale.detach().numpy().reshape(-1)
        return found

    def left_out(self) -> tuple[Floats, Floats]:
        """Return mean and variance [n] of each trial's loss given all others.

        Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", equation 5.12.
        """
        with torch.no_grad():
            covariance = self.model.covar_module(self.inputs).to_dense()
            covariance = covariance + torch.diag(self.model.likelihood.noise_covar.noise * self.weights)
            inverse = torch.linalg.inv(covariance)
            residual = self.losses - self.model.mean_module(self.inputs)
            variance = 1.0 / inverse.diagonal()
            mean = self.losses - (inverse @ residual) * variance
        return mean.numpy(), variance.numpy()

    def left_out_log_density(self) -> float:
        """Return the leave-one-out log density, summed over the trials, up to a constant."""
        mean, variance = self.left_out()
        return float(-0.5 * (np.log(variance) + (self.losses.numpy() - mean) ** 2 / variance).sum())

    @property
    def weights(self) -> Tensor:
        """Relative noise variances [n] of the trials, see `ScaledNoise`."""
        weights: Tensor = self.model.likelihood.noise_covar.weights
        return weights

    def rank_correlation(self) -> float:
        """Return Spearman's correlation of the losses with the left-out predictions; 0 if either is constant."""
        mean, _ = self.left_out()
        losses = self.losses.numpy()
        if np.ptp(losses) == 0 or np.ptp(mean) == 0:
            return 0.0
        return float(spearmanr(mean, losses).statistic)


def relevance(lengthscales: Floats, gene_of_feature: Sequence[str], spread: Floats) -> dict[str, float]:
    """Return the share of each gene in the squared distances between trials that the kernel sees.

    A gene's weight is the sum over its features of the variance of their values over the squared lengthscale. The
    shares add up to 1 unless no feature varies.
    """
    weight: dict[str, float] = {}
    for gene, scale, variance in zip(gene_of_feature, lengthscales, spread, strict=True):
        weight[gene] = weight.get(gene, 0.0) + float(variance / scale**2)
    total = sum(weight.values())
    return {gene: value / total for gene, value in weight.items()} if total > 0 else dict.fromkeys(weight, 0.0)
