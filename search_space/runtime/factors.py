"""Initial values that follow from a site, its weight or training rows: factors of a LoRA, places of a sparse change.

Notation: W: [D_out, D_in] is the frozen weight, Q components of a decomposition, of which a LoRA of rank R takes R.
A rule is one function that decomposes the weight or a statistic of the site into components, and one that makes A and
B of them. `Statistics` provides the statistics; a rule names the one that it reads. Places are those of the highest
scores of the elements of W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.adapters.lora import FROM_SITE
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.backbones.linear import weight_of
from autopeft.search_space.parameter import Factor, Kept
from autopeft.search_space.runtime.init import stream

#: Names of the statistics of a site.
COVARIANCE = "the covariance of inputs"
MOMENT = "the scaled second moment of inputs"
GRADIENT = "the gradient of the weight"
MOVEMENT = "the movement of the weight"


class Statistics(Protocol):
    """Statistics of the training rows at the sites of the bare model, by their names."""

    def __call__(self, site: Site, name: str) -> Tensor:
        """Return a statistic of a site."""

    def saliency(self, site: Site, spec: AdapterSpec, seed: object) -> dict[str, Tensor]:
        """Return |value * gradient| for the trained tensors of an adapter at its start, by name."""


@dataclass(frozen=True, slots=True)
class Components:
    """A decomposition U S V with u: [D_out, Q], s: [Q] and v: [Q, D_in], the leading components first."""

    u: Tensor
    s: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How factors start. `decompose`: (W, statistic, rank, random stream) to components, at least as many as needed.

    `factors`: (components, rank, scale) to A: [R, D_in] and B: [D_out, R]. `statistic`: the one that `decompose` reads,
    None for W alone. `per_rank`: whether the leading components depend on the rank.
    """

    decompose: Callable[[Tensor, Tensor, int, Generator], Components]
    factors: Callable[[Components, int, float], tuple[Tensor, Tensor]]
    statistic: str | None = None
    per_rank: bool = False


def _principal(weight: Tensor, statistic: Tensor, rank: int, generator: Generator) -> Components:
    """Return the singular value decomposition of W (Meng et al. 2024, PiSSA, section 3)."""
    return Components(*torch.linalg.svd(weight, full_matrices=False))


def _fast_principal(weight: Tensor, statistic: Tensor, rank: int, generator: Generator) -> Components:
    """Return the leading components of W by four subspace iterations (Halko et al. 2011), as peft's pissa_niter_4.

    It has the random numbers of `generator`, so that the result does not depend on what ran before.
    """
    start = torch.randn(weight.shape[1], min(rank, *weight.shape), generator=generator).to(weight)
    basis = torch.linalg.qr(weight @ start).Q
    for _ in range(4):
        basis = torch.linalg.qr(weight.T @ basis).Q
        basis = torch.linalg.qr(weight @ basis).Q
    u, s, v = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return Components(basis @ u, s, v)


def _orthonormal(weight: Tensor, statistic: Tensor, rank: int, generator: Generator) -> Components:
    """Return the QR decomposition of W (Büyükakyüz 2024, OLoRA, algorithm 1)."""
    q, r = torch.linalg.qr(weight)
    return Components(q, torch.ones(len(r)).to(r), r)


def _balanced(components: Components, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A = sqrt(S / scale) V and B = U sqrt(S / scale), so that scale * B A = U S V."""
    root = (components.s[:rank] / scale).sqrt()
    return root[:, None] * components.v[:rank], components.u[:, :rank] * root


def _as_they_are(components: Components, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A = V and B = U."""
    return components.v[:rank], components.u[:, :rank]


def _scaled_outputs(components: Components, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A = V and B = U S."""
    return components.v[:rank], components.u[:, :rank] * components.s[:rank]


def _principal_inputs(weight: Tensor, statistic: Tensor, rank: int, generator: Generator) -> Components:
    """Return the principal directions of the inputs from their covariance (Paischer et al. 2024, EVA, section 3)."""
    variances, directions = torch.linalg.eigh(statistic)
    v = directions.flip(1).T.to(weight)
    return Components(weight.new_zeros(len(weight), len(v)), variances.flip(0).to(weight), v)


def _in_context(weight: Tensor, statistic: Tensor, rank: int, generator: Generator) -> Components:
    """Return U, S and V C^-1 with U S V = W C and the inputs' second moment C (Yang et al. 2024, CorDA, section 3.2).

    As in the authors' code, the diagonal of C grows until the inverse is accurate. Raises ValueError for a C that is
    not finite, such as that of inputs that overflow.
    """
    if not statistic.isfinite().all():
        raise ValueError(f"{MOMENT} is not finite, so no init can follow from it")
    identity, damping = torch.eye(len(statistic)).to(statistic), 0.01
    while True:
        moment = statistic + damping * statistic.diagonal().mean() * identity
        inverse = torch.linalg.inv(moment)
        if torch.dist(moment @ inverse, identity) < 0.05:
            break
        damping *= 2
    u, s, v = torch.linalg.svd(weight @ moment.to(weight), full_matrices=False)
    return Components(u, s, (v.to(inverse) @ inverse).to(weight))


def _in_context_from_the_end(weight: Tensor, statistic: Tensor, rank: int, generator: Generator) -> Components:
    """Return the components of `_in_context` with the smallest singular values first."""
    found = _in_context(weight, statistic, rank, generator)
    return Components(found.u.flip(1), found.s.flip(0), found.v.flip(0))


def _of_gradient(weight: Tensor, statistic: Tensor, rank: int, generator: Generator) -> Components:
    """Return the singular value decomposition of the gradient of W (Wang et al. 2024, LoRA-GA, section 3.2)."""
    return Components(*torch.linalg.svd(statistic.to(weight), full_matrices=False))


def _inputs_alone(components: Components, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A = V and B = 0."""
    return components.v[:rank], torch.zeros_like(components.u[:, :rank])


def _crossed(components: Components, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the first R right and the next R left singular vectors, the latter scaled, as peft's LoraGAConfig does.

    peft's defaults: direction "ArB2r" and scale "stable" with gamma = 16, which multiplies by the singular values too.
    """
    u, s = components.u[:, rank : 2 * rank], components.s[rank : 2 * rank]
    return components.v[:rank], u * s * (len(u) ** 0.25 / LORA_GA_GAMMA**0.5)


LORA_GA_GAMMA = 16
RULES: dict[str, Rule] = {
    "pissa": Rule(decompose=_principal, factors=_balanced),
    "pissa_niter_4": Rule(decompose=_fast_principal, factors=_balanced, per_rank=True),
    "svd": Rule(decompose=_principal, factors=_scaled_outputs),
    "olora": Rule(decompose=_orthonormal, factors=_as_they_are),
    "eva": Rule(decompose=_principal_inputs, factors=_inputs_alone, statistic=COVARIANCE),
    "corda_ipm": Rule(decompose=_in_context, factors=_balanced, statistic=MOMENT),
    "corda_kpm": Rule(decompose=_in_context_from_the_end, factors=_balanced, statistic=MOMENT),
    "lora_ga": Rule(decompose=_of_gradient, factors=_crossed, statistic=GRADIENT),
}


@dataclass(frozen=True, slots=True)
class Score:
    """How places are ranked. `of`: (W, statistic) to scores, each [D_out, D_in]; `statistic`: as in `Rule`."""

    of: Callable[[Tensor, Tensor], Tensor]
    statistic: str | None = None


SCORES: dict[str, Score] = {
    "magnitude": Score(lambda weight, statistic: weight.abs()),
    "gradient": Score(lambda weight, statistic: statistic.abs(), GRADIENT),
    "snip": Score(lambda weight, statistic: (weight * statistic).abs(), GRADIENT),
    "movement": Score(lambda weight, statistic: statistic.abs(), MOVEMENT),
}


class Starts:
    """Initial values of factors and places, by rules. They are computed once for each site and rule, and kept.

    Kept are the components of the largest rank, or the most places, so far. It must not outlive a change of the model's
    weights.
    `statistics`: of the training rows; without them, rules that read one raise ValueError.
    """

    def __init__(self, statistics: Statistics | None = None) -> None:
        self._statistics = statistics
        self._kept: dict[tuple[Any, ...], Components] = {}
        self._ranked: dict[tuple[str, str], Tensor] = {}
        self._saliency: tuple[object, dict[str, Tensor]] = (None, {})  # of the last adapter alone

    @torch.no_grad()
    def value(self, factor: Factor, site: Site, base: nn.Module, shape: tuple[int, ...]) -> Tensor:
        """Return the initial value of a factor in this shape, on the CPU. `base`: the site's module."""
        rank = shape[0] if factor.side == "A" else shape[1]
        if next(base.parameters()).is_meta:
            return torch.zeros(shape)
        a, b = RULES[factor.rule].factors(self._components(factor.rule, site, base, rank), rank, factor.scale)
        value = a if factor.side == "A" else b
        assert value.shape == shape, (value.shape, shape)
        return value

    @torch.no_grad()
    def places(self, name: str, site: Site, base: nn.Module, count: int) -> Tensor:
        """Return the `count` places of the highest scores by a rule of `SCORES`, highest first, on the CPU: [count]."""
        rule, key = SCORES[name], (name, site.module)
        if next(base.parameters()).is_meta:
            return torch.zeros(count, dtype=torch.int32)
        if key not in self._ranked or len(self._ranked[key]) < count:
            statistic = torch.empty(0) if rule.statistic is None else self._statistic(rule.statistic, name, site)
            weight = weight_of(base).float()
            scores = rule.of(weight, statistic.to(weight)).flatten()
            # Stable, so that fewer places are the first of more of them.
            order = scores.sort(descending=True, stable=True).indices
            self._ranked[key] = order[:count].int().cpu().clone()
        return self._ranked[key][:count]

    def scores(self, kept: Kept, site: Site, base: nn.Module, values: Tensor, seed: object) -> Tensor:
        """Return the scores of the entries of the initial `values` of an adapter with this seed: [...]."""
        if not kept.snip or next(base.parameters()).is_meta:
            return values.abs()
        if self._statistics is None:
            raise ValueError("'snip' reads the gradient of training rows, and there are none here")
        key = (site.name, kept.of, seed)
        if self._saliency[0] != key:
            self._saliency = (key, self._statistics.saliency(site, kept.of, seed))
        return self._saliency[1][kept.tensor].to(values.device)

    def _components(self, name: str, site: Site, base: nn.Module, rank: int) -> Components:
        rule = RULES[name]
        key = (name, site.module, rank if rule.per_rank else None)
        count = rank * (FROM_SITE[name].components if name in FROM_SITE else 1)
        found = self._kept.get(key)
        if found is None or len(found.s) < count:
            statistic = torch.empty(0) if rule.statistic is None else self._statistic(rule.statistic, name, site)
            weight = weight_of(base).float()
            whole = rule.decompose(weight, statistic.to(weight.device), rank, stream(name, site.name))
            # Copies: a view would keep all components.
            parts = whole.u[:, :count], whole.s[:count], whole.v[:count]
            found = self._kept[key] = Components(*(part.cpu().clone() for part in parts))
        return found

    def _statistic(self, statistic: str, rule: str, site: Site) -> Tensor:
        if self._statistics is None:
            raise ValueError(f"{rule!r} reads {statistic} of training rows, and there are none here")
        return self._statistics(site, statistic)
