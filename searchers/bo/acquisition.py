"""The acquisition function of the goal "front": the expected improvement of its hypervolume by measuring at a point.

Notation: n trials, D features, k declared objectives, m objectives in all, r baseline points, b points to score, s
sampled fronts, c cells. An input row begins with D features and ends with the k declared losses, so that the exact
losses of a point are part of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.multi_objective.objective import MCMultiOutputObjective
from botorch.acquisition.objective import GenericMCObjective
from botorch.exceptions.warnings import BotorchWarning
from botorch.models import ModelListGP, SingleTaskGP
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.multi_objective.box_decompositions.box_decomposition_list import BoxDecompositionList
from botorch.utils.multi_objective.box_decompositions.non_dominated import FastNondominatedPartitioning
from botorch.utils.multi_objective.pareto import is_non_dominated
from botorch.utils.multi_objective.scalarization import get_chebyshev_scalarization
from botorch.utils.sampling import draw_sobol_normal_samples, sample_simplex
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor
from typing_extensions import override

#: The logarithm of the acquisition value [b] of inputs [b, .].
LogAcquisition = Callable[[Tensor], Tensor]

#: Sampled fronts by the number of objectives: the cells of one take long to find for three.
FRONTS = {1: 32, 2: 32, 3: 4}
#: Samples where the expectation has no closed form.
SAMPLES = 64
#: More objectives than this are scalarised: the boxes of a hypervolume grow exponentially with them.
MOST_OBJECTIVES = 3
TINY = 1e-300


def hypervolume_improvement(
    models: Sequence[SingleTaskGP],
    sources: Sequence[int],
    baseline: Tensor,
    pending: Tensor,
    reference: Tensor,
    seed: int,
) -> LogAcquisition:
    """Return the acquisition function of the goal "front".

    `models`: of the measured objectives, one at least; `sources`: for each objective the index of its model, or -1 - j
    for the j-th declared one; `reference` [m]: the hypervolume's corner, which includes the bounds on
    objectives. More than three objectives: qLogNParEGO, its weights from the seed.
    """
    if len(sources) > MOST_OBJECTIVES:
        return _scalarised(models, sources, baseline, pending, reference, seed)
    return NoisyHypervolumeImprovement(models, sources, baseline, pending, reference, seed)


def log_trainable(failures: SingleTaskGP, inputs: Tensor) -> Tensor:
    """Return the logarithm of the probability [b] that points can be trained; `failures`: above 0 where they cannot."""
    posterior = failures.posterior(inputs)
    found: Tensor = torch.special.log_ndtr(-posterior.mean[:, 0] / posterior.variance[:, 0].sqrt())
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Compute without gradients and without the warnings that are expected here."""
    with torch.no_grad(), warnings.catch_warnings():
        # Trials next to each other make covariances nearly singular; a jitter is added then.
        warnings.simplefilter("ignore", NumericalWarning)
        # Where all trials are infeasible the scalarised improvement is flat, and the library warns at every call.
        warnings.simplefilter("ignore", BotorchWarning)
        yield


class WithDeclared(MCMultiOutputObjective):  # type: ignore[misc]  # BoTorch counts as untyped
    """Samples of the modelled losses and the declared losses of the inputs, as values to be maximised."""

    def __init__(self, sources: Sequence[int]) -> None:
        super().__init__()
        self.sources = tuple(sources)
        self.num_declared = sum(source < 0 for source in sources)

    @override
    def forward(self, samples: Tensor, X: Tensor | None = None) -> Tensor:
        assert X is not None
        declared = self.declared(X)
        columns = [
            samples[..., source] if source >= 0 else declared[..., -1 - source].expand(samples.shape[:-1])
            for source in self.sources
        ]
        return -torch.stack(columns, dim=-1)

    def declared(self, inputs: Tensor) -> Tensor:
        """Return the declared losses [..., k] of inputs."""
        return inputs[..., inputs.shape[-1] - self.num_declared :]


class NoisyHypervolumeImprovement:
    """LogNEHVI (Daulton, Balandat and Bakshy 2021) for single points, exact given the sampled fronts.

    The trials are noisy, so the front is random: it is sampled through joint samples of the losses at trials and
    pending points. Given a front, the processes are independent and normal, and the expected improvement is a sum over
    the front's cells of products of expected overlaps (Yang et al. 2019, exact EHVI). BoTorch's qLogNEHVI samples at
    the point too; test_acquisition.py compares both. The closed form needs no smoothing to distinguish points that
    hardly ever improve, and its cost is O(b (n^2 + s r)), without the joint posterior of each point with the baseline.
    """

    def __init__(
        self,
        models: Sequence[SingleTaskGP],
        sources: Sequence[int],
        baseline: Tensor,
        pending: Tensor,
        reference: Tensor,
        seed: int,
    ) -> None:
        self.objective = WithDeclared(sources)
        points, fronts = torch.cat([baseline, pending]), FRONTS[len(sources)]
        normal = draw_sobol_normal_samples(len(points) * len(models), fronts, dtype=torch.double, seed=seed)
        normal = normal.reshape(fronts, len(models), len(points))
        posteriors = [Posterior.of(model) for model in models]
        drawn = [posterior.joint(points, normal[:, j]) for j, posterior in enumerate(posteriors)]
        values = self.objective(torch.stack(drawn, dim=-1), points)
        corner = -reference
        values = torch.where((values > corner).all(-1, keepdim=True), values, corner)
        # A front with noise has more points than one without, but most trials are on none of the samples.
        on_front = (is_non_dominated(values, deduplicate=False) & (values > corner).all(-1)).any(0)
        on_front = on_front if on_front.any() else torch.ones_like(on_front)
        self.lower, self.upper = _cells(values[:, on_front], corner)
        self.parts = [
            Conditional.of(posterior, points[on_front], sample[:, on_front])
            for posterior, sample in zip(posteriors, drawn, strict=True)
        ]

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the logarithm of the expected improvement [b] at inputs [b, .]."""
        declared = self.objective.declared(inputs)
        moments = [part(inputs) for part in self.parts]
        volume = torch.ones(())
        for j, source in enumerate(self.objective.sources):
            lower, upper = self.lower[:, None, :, j], self.upper[:, None, :, j]
            if source >= 0:
                mean, deviation = moments[source]
                mean, deviation = -mean[:, :, None], deviation[None, :, None]
                overlap = excess(mean, deviation, lower) - excess(mean, deviation, upper)
            else:
                value = -declared[None, :, -1 - source, None]
                overlap = torch.minimum(value, upper) - lower
            volume = volume * overlap.clamp_min(0.0)
        return volume.sum(-1).mean(0).clamp_min(TINY).log()


def excess(mean: Tensor, deviation: Tensor, threshold: Tensor) -> Tensor:
    """Return E[max(0, v - threshold)] of a normal v; 0 for an infinite threshold."""
    z = (mean - threshold) / deviation
    density = torch.exp(-0.5 * z.square()) * 0.3989422804014327
    found = deviation * (density + z.clamp_min(-1e10) * torch.special.ndtr(z))
    return torch.where(torch.isinf(threshold), torch.zeros(()), found)


def _cells(values: Tensor, corner: Tensor) -> tuple[Tensor, Tensor]:
    """Return lower and upper corners [s, c, m] of boxes that fill the regions that fronts [s, r, m] do not dominate."""
    if values.shape[-1] == 1:
        best = values.amax(1, keepdim=True)
        return best, torch.full_like(best, torch.inf)
    parts = [FastNondominatedPartitioning(ref_point=corner, Y=front) for front in values]
    lower, upper = BoxDecompositionList(*parts).get_hypercell_bounds()
    return lower, upper


@dataclass(frozen=True, slots=True)
class Posterior:
    """A Gaussian process given its n trials: root [n, n] of their covariance, weights [n] of the mean."""

    model: SingleTaskGP
    train: Tensor
    root: Tensor
    alpha: Tensor

    @classmethod
    def of(cls, model: SingleTaskGP) -> Posterior:
        """Condition a model on its training data."""
        model.eval()
        train, target = model.train_inputs[0], model.train_targets
        covariance = model.covar_module(train).to_dense() + model.likelihood.noise_covar(train).to_dense()
        root = psd_safe_cholesky(covariance)
        alpha = torch.cholesky_solve((target - model.mean_module(train))[:, None], root)[:, 0]
        return cls(model, train, root, alpha)

    def moments(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean [b] and the covariance with the trials, whitened [n, b]."""
        covariance = self.model.covar_module(self.train, points).to_dense()
        mean = self.model.mean_module(points) + covariance.mT @ self.alpha
        return mean, torch.linalg.solve_triangular(self.root, covariance, upper=False)

    def joint(self, points: Tensor, normal: Tensor) -> Tensor:
        """Return joint samples [s, b] at points [b, .] from standard normal numbers [s, b]."""
        mean, white = self.moments(points)
        covariance = self.model.covar_module(points).to_dense() - white.mT @ white
        root: Tensor = psd_safe_cholesky(covariance)
        return mean + normal @ root.mT


@dataclass(frozen=True, slots=True)
class Conditional:
    """A Gaussian process given its trials and s samples of itself at r baseline points."""

    posterior: Posterior
    baseline: Tensor
    white: Tensor
    root: Tensor
    #: [s, r]: the samples' deviations from the mean, whitened.
    deviations: Tensor

    @classmethod
    def of(cls, posterior: Posterior, baseline: Tensor, samples: Tensor) -> Conditional:
        """Condition a process on samples [s, r] at baseline points."""
        mean, white = posterior.moments(baseline)
        root = psd_safe_cholesky(posterior.model.covar_module(baseline).to_dense() - white.mT @ white)
        deviations = torch.linalg.solve_triangular(root, (samples - mean).mT, upper=False).mT
        return cls(posterior, baseline, white, root, deviations)

    def __call__(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means [s, b] at points [b, .] and the standard deviation [b] that they share."""
        mean, white = self.posterior.moments(points)
        kernel = self.posterior.model.covar_module
        covariance = kernel(self.baseline, points).to_dense() - self.white.mT @ white
        rows = torch.linalg.solve_triangular(self.root, covariance, upper=False)
        variance = kernel(points, diag=True) - white.square().sum(0) - rows.square().sum(0)
        return mean + self.deviations @ rows, variance.clamp_min(1e-10).sqrt()


# Many objectives


def _beyond(column: int, most: float) -> Callable[[Tensor], Tensor]:
    return lambda samples: samples[..., column] - most


def _scalarised(
    models: Sequence[SingleTaskGP],
    sources: Sequence[int],
    baseline: Tensor,
    pending: Tensor,
    reference: Tensor,
    seed: int,
) -> LogAcquisition:
    """Return qLogNParEGO: qLogNEI of an augmented Chebyshev scalarisation.

    Knowles 2006; Daulton, Balandat and Bakshy 2020. BoTorch's own class does not pass the inputs to its objective, and
    they hold the declared losses. Points beyond the reference in a measured objective count as infeasible.
    """
    model = models[0] if len(models) == 1 else ModelListGP(*models)
    objective = WithDeclared(sources)
    values = objective(model.posterior(baseline).mean, baseline)
    weights = sample_simplex(values.shape[-1], seed=seed, dtype=torch.double)[0]
    scalarise = get_chebyshev_scalarization(weights, values)
    improvement = qLogNoisyExpectedImprovement(
        model=model,
        X_baseline=baseline,
        X_pending=pending if len(pending) else None,
        objective=GenericMCObjective(lambda samples, X=None: scalarise(objective(samples, X))),
        constraints=[_beyond(s, float(most)) for s, most in zip(sources, reference, strict=True) if s >= 0],
        sampler=SobolQMCNormalSampler(torch.Size([SAMPLES]), seed=seed),
        prune_baseline=True,
    )
    return lambda inputs: improvement(inputs[:, None])
