"""Mixtures of LoRAs for formats without mixtures: with all experts weighted equally, a mixture is one LoRA.

A of that LoRA stacks the rows of the experts' A, B concatenates the columns of their B; columns of the E routed experts
are divided by E. Its scale is that of the expert with the largest rank; B absorbs the differences to other scales.
Where the router mixes the parameters themselves, A and B are the means over the experts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from autopeft.search_space.adapters import AdapterSpec
from autopeft.search_space.adapters.lora import Lora
from autopeft.search_space.adapters.mixture import Mixture
from autopeft.studies.exporters.base import Assessment, Exporter, State, approximate, unsupported
from autopeft.studies.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


class AveragingExporter(Exporter):
    """A format of trained weights without mixtures: plain LoRAs replace mixtures of LoRAs."""

    @override
    def assess(self, recipe: Recipe) -> Assessment:
        reasons = obstacles(recipe)
        if reasons:
            return unsupported(*reasons)
        fit = self.assess_plain(averaged(recipe))
        return fit if fit.level == "unsupported" else approximate(*lost(recipe), *fit.lost)

    @override
    def write(self, recipe: Recipe, state: State, folder: Path) -> Sequence[str] | None:
        return self.write_plain(averaged(recipe), averaged_state(recipe, state), folder)

    @abstractmethod
    def assess_plain(self, recipe: Recipe) -> Assessment:
        """Assess a recipe without mixtures."""

    @abstractmethod
    def write_plain(self, recipe: Recipe, state: State, folder: Path) -> Sequence[str] | None:
        """Write a recipe without mixtures; see `write`."""


def averaged(recipe: Recipe) -> Recipe:
    """Return the recipe with plain LoRAs in place of its mixtures; it must have no `obstacles`."""
    architecture = {name: tuple(_averaged(spec) for spec in specs) for name, specs in recipe.architecture.items()}
    return recipe.model_copy(update={"architecture": architecture})


def averaged_state(recipe: Recipe, state: State) -> dict[str, Tensor]:
    """Return the tensors of `averaged(recipe)` from those of the recipe."""
    plain = dict(state)
    for name, spec in _mixtures(recipe):
        own = f"{name}/{spec.kind}/"
        # [S + E, R, D_in] and [S + E, D_out, R], shared experts first; where ranks differ, they are stacked already.
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
    """Return a line for each mixture that no plain LoRA can replace, even with its experts weighted equally."""
    reasons = []
    for name, spec in _mixtures(recipe):
        kind = spec.expert.kind
        several = [other.plain.kind for other in recipe.architecture[name]].count(Lora.kind) > 1
        if kind != Lora.kind:
            reasons.append(
                f"{name} {spec.kind}: experts of type {kind} cannot be combined into one adapter, only LoRAs"
            )
        elif several:
            reasons.append(f"{name} {spec.kind}: would become a second LoRA on one module")
    return reasons


def lost(recipe: Recipe) -> list[str]:
    """Return a line on what `averaged` loses, with its measured cost, or none if no router weights the experts."""
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
    price = ", ".join(prices) or "the cost of this was not measured (studies measure it for finalists)"
    return [f"{where}: becomes plain LoRAs with all experts weighted equally, without routing by {routers}; {price}"]


def _mixtures(recipe: Recipe) -> Iterator[tuple[str, Mixture]]:
    return ((name, spec) for name, spec in recipe.adapters if isinstance(spec, Mixture))


def _gates(spec: Mixture) -> Iterator[float]:
    """Yield the weight of every rank of every expert, relative to the scale of the largest expert."""
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
    # alpha / rank of the result has to be the scale of one expert.
    alpha = expert.alpha * (sqrt(expert.rank) if expert.scaling == "rslora" else 1.0)
    total = sum(spec.ranks) or spec.num_experts_total * expert.rank
    return replace(expert, rank=total, alpha=total / expert.rank * alpha, scaling="alpha")
