"""Controls of a mixture of experts: matched baselines without its router, or without its experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from autopeft.search_space.adapters import AdapterSpec
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone, Site

#: The controls by name, with the adapter that replaces each mixture.
CONTROLS: Mapping[str, str] = {
    "average": "the same experts with equal weights (Caccia et al. 2023, MHR-mu, but trained so from the start)",
    "active": "a plain adapter with as many parameters as are active per token in the mixture",
    "total": "a plain adapter with as many parameters as the mixture has, including pretrained experts",
}


def controls(architecture: Architecture, backbone: Backbone) -> dict[str, Architecture]:
    """Return the controls of an architecture by name.

    There is none without a mixture, and only "average" where the type of an expert has no size.
    """
    mixtures = {spec: spec.routed_by for _, spec in architecture if spec.routed_by}
    if not mixtures:
        return {}
    found = {}
    if not all(router.constant for router in mixtures.values()):
        found["average"] = _replaced(architecture, backbone, lambda spec, site: spec.averaged)
    if all(spec.plain.size_field for spec in mixtures):
        found["active"] = _replaced(
            architecture, backbone, lambda spec, site: _plain(spec, site, spec.active_params(site))
        )
        found["total"] = _replaced(
            architecture, backbone, lambda spec, site: _plain(spec, site, spec.total_params(site))
        )
        if found["total"] == found["active"]:  # all experts are active for every token
            del found["active"]
    return found


def _replaced(
    architecture: Architecture, backbone: Backbone, replacement: Callable[[AdapterSpec, Site], AdapterSpec]
) -> Architecture:
    return Architecture.of(
        {
            name: [replacement(spec, backbone.site(name)) if spec.routed_by else spec for spec in specs]
            for name, specs in architecture.adapters
        }
    )


def _plain(spec: AdapterSpec, site: Site, num_params: int) -> AdapterSpec:
    """Return the expert's type at the largest size with at most `num_params` parameters, but at least size 1."""
    expert = spec.plain

    def sized(size: int) -> AdapterSpec:
        assert expert.size_field is not None
        change: dict[str, Any] = {expert.size_field: size}
        return replace(expert, **change)

    smallest = sized(1).num_params(site)
    increment = sized(2).num_params(site) - smallest
    return sized(1 + max(0, (num_params - smallest) // increment))
