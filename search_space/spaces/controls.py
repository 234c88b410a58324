"""What a mixture of experts is compared with: the same without its router, and without its experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from autopeft.search_space.adapters import AdapterSpec, Mixture
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone, Site

#: Of an architecture with mixtures, by name: what stands in their place.
CONTROLS: Mapping[str, str] = {
    "average": "the same experts, all weighted alike (Caccia et al. 2023, MHR-mu, but trained so from the start)",
    "active": "a plain adapter with as many parameters as a token meets of the mixture",
    "total": "a plain adapter with as many parameters as the mixture has, those of given experts too",
}


def controls(architecture: Architecture, backbone: Backbone) -> dict[str, Architecture]:
    """Those that there are: none without a mixture, only the average where a type has no size."""
    mixtures = [spec for _, spec in architecture if isinstance(spec, Mixture)]
    if not mixtures:
        return {}
    found = {}
    if any(spec.router != "uniform" for spec in mixtures):
        found["average"] = _with(architecture, backbone, _averaged)
    if all(spec.expert.size_field for spec in mixtures):
        found["active"] = _with(architecture, backbone, lambda spec, site: _plain(spec, site, spec.active_params(site)))
        found["total"] = _with(architecture, backbone, lambda spec, site: _plain(spec, site, spec.total_params(site)))
        if found["total"] == found["active"]:  # every token meets all experts
            del found["active"]
    return found


def _with(
    architecture: Architecture, backbone: Backbone, instead: Callable[[Mixture, Site], AdapterSpec]
) -> Architecture:
    return Architecture.of(
        {
            name: [instead(spec, backbone.site(name)) if isinstance(spec, Mixture) else spec for spec in specs]
            for name, specs in architecture.adapters
        }
    )


def _averaged(spec: Mixture, site: Site) -> AdapterSpec:
    return replace(spec, router="uniform").canonical()


def _plain(spec: Mixture, site: Site, num_params: int) -> AdapterSpec:
    """The experts' type as large as fits into so many parameters, but at least of size 1."""

    def sized(size: int) -> AdapterSpec:
        assert spec.expert.size_field is not None
        change: dict[str, Any] = {spec.expert.size_field: size}
        return replace(spec.expert, **change)

    least = sized(1).num_params(site)
    each = sized(2).num_params(site) - least
    return sized(1 + max(0, (num_params - least) // each))
