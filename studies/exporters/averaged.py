"""Mixtures of LoRAs for formats that have none: with all their experts weighted alike, they are one LoRA.

Its A has the experts' A on top of each other, its B their B side by side, those of the E routed experts divided by E.
Its scale is that of the expert with the largest rank, what another expert's differs from it is in B.
Where a router mixes the parameters themselves, A and B are their means.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from autopeft.search_space.adapters import AdapterSpec
from autopeft.search_space.adapters.lora import Lora
from autopeft.search_space.adapters.mixture import Mixture
from autopeft.studies.exporters.base import Exporter, Fit, State, approximate, unsupported
from autopeft.studies.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


class AveragingExporter(Exporter):
    """A format of trained weights that has no mixtures: it gets plain LoRAs for those of LoRAs."""

    def assess(self, recipe: Recipe) -> Fit:
        reasons = obstacles(recipe)
        if reasons:
            return unsupported(*reasons)
        fit = self.assess_plain(averaged(recipe))
        return fit if fit.level == "unsupported" else approximate(*lost(recipe), *fit.lost)

    def write(self, recipe: Recipe, state: State, folder: Path) -> None:
        self.write_plain(averaged(recipe), averaged_state(recipe, state), folder)

    @abstractmethod
    def assess_plain(self, recipe: Recipe) -> Fit:
        """`assess` of a recipe without mixtures."""

    @abstractmethod
    def write_plain(self, recipe: Recipe, state: State, folder: Path) -> None:
        """`write` of a recipe without mixtures."""


def averaged(recipe: Recipe) -> Recipe:
    """The recipe with plain LoRAs for its mixtures. Only for one that meets no `obstacles`."""
    architecture = {name: tuple(_averaged(spec) for spec in specs) for name, specs in recipe.architecture.items()}
    return recipe.model_copy(update={"architecture": architecture})


def averaged_state(recipe: Recipe, state: State) -> dict[str, Tensor]:
    """The tensors of `averaged(recipe)`, from those of the recipe."""
    plain = dict(state)
    for name, spec in _mixtures(recipe):
        own = f"{name}/{spec.kind}/"
        # [S + E, R, D_in] and [S + E, D_out, R], the shared experts first; one LoRA already where ranks differ.
        a, b = state[f"{own}A"], state[f"{own}B"]
        if spec.routed_by.mixes_parameters:
            a, b = a.mean(0), b.mean(0)
        else:
            if not spec.ranks:
                a, b = a.flatten(0, 1), b.movedim(0, 1).flatten(1)
            b = b * a.new_tensor(list(_gates(spec)))
        plain = {key: value for key, value in plain.items() if not key.startswith(own)}
        plain |= {f"{name}/{Lora.kind}/A": a, f"{name}/{Lora.kind}/B": b}
    return plain


def obstacles(recipe: Recipe) -> list[str]:
    """Why mixtures of the recipe are no plain LoRAs even with their experts weighted alike, a line each."""
    reasons = []
    for name, spec in _mixtures(recipe):
        kind = spec.expert.kind
        beside = [other.plain.kind for other in recipe.architecture[name]].count(Lora.kind) > 1
        if kind != Lora.kind:
            reasons.append(f"{name} {spec.kind}: experts of kind {kind} are not one adapter together, as those of lora")
        elif beside:
            reasons.append(f"{name} {spec.kind}: would be a second LoRA at one module")
    return reasons


def lost(recipe: Recipe) -> list[str]:
    """What `averaged` loses, with the price if it was measured: a line, or none where no router weighs experts."""
    routed = [(name, spec) for name, spec in _mixtures(recipe) if not spec.routed_by.constant]
    if not routed:
        return []
    where = f"{routed[0][0]} {Mixture.kind}" + (f" and {len(routed) - 1} more" if len(routed) > 1 else "")
    routers = ", ".join(sorted({spec.router for _, spec in routed}))
    prices = [
        f"validation {metric} {price.value:.4f} instead of {price.routed:.4f}"
        f" (mean of {len(price.seeds)} training{'s' if len(price.seeds) > 1 else ''})"
        for metric, price in recipe.averaged.items()
    ]
    price = ", ".join(prices) or "what that costs was not measured (it is for finalists)"
    return [f"{where}: plain LoRAs with all experts weighted alike, without routing by {routers}; {price}"]


def _mixtures(recipe: Recipe) -> Iterator[tuple[str, Mixture]]:
    return ((name, spec) for name, spec in recipe.adapters if isinstance(spec, Mixture))


def _gates(spec: Mixture) -> Iterator[float]:
    """Of every rank of every expert, in terms of the scale of the largest."""
    largest = spec.expert
    for e, expert in enumerate(spec.each):
        assert isinstance(expert, Lora)
        assert isinstance(largest, Lora)
        share = 1.0 if e < spec.shared_experts else 1.0 / spec.experts
        yield from [share * expert.scale / largest.scale] * expert.rank


def _averaged(spec: AdapterSpec) -> AdapterSpec:
    if not isinstance(spec, Mixture):
        return spec
    expert = spec.expert
    assert isinstance(expert, Lora)
    if spec.routed_by.mixes_parameters:
        return expert
    # So that alpha by the rank is the scale of one expert.
    alpha = expert.alpha * (sqrt(expert.rank) if expert.scaling == "rslora" else 1.0)
    total = sum(spec.ranks) or spec.num_experts_total * expert.rank
    return replace(expert, rank=total, alpha=total / expert.rank * alpha, scaling="alpha")
