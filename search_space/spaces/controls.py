"""What a mixture of experts is compared with: the same without its router, and without its experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from autopeft.search_space.adapters import AdapterSpec
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone, Site

#: Of an architecture with mixtures, by name: what stands in their place.
CONTROLS: Mapping[str, str] = {
    "average": "the same experts, all weighted alike (Caccia et al. 2023, MHR-mu, but trained so from the start)",
    "active": "a plain adapter with as many parameters as a token meets of the mixture",
    "total": "a plain adapter with as many parameters as the mixture has, those of given experts too",
}


def controls(architecture: Architecture, backbone: Backbone) -> dict[str, Architecture]:
    """Return the controls by name: none without a mixture, only the average where a type has no size."""
    mixtures = {spec: spec.routed_by for _, spec in architecture if spec.routed_by}
    if not mixtures:
        return {}
    found = {}
    if not all(router.constant for router in mixtures.values()):
        found["average"] = _with(architecture, backbone, lambda spec, site: spec.averaged)
    if all(spec.plain.size_field for spec in mixtures):
        found["active"] = _with(architecture, backbone, lambda spec, site: _plain(spec, site, spec.active_params(site)))
        found["total"] = _with(architecture, backbone, lambda spec, site: _plain(spec, site, spec.total_params(site)))
        if found["total"] == found["active"]:  # every token meets all experts
            del found["active"]
    return found


def _with(
    architecture: Architecture, backbone: Backbone, instead: Callable[[AdapterSpec, Site], AdapterSpec]
) -> Architecture:
    return Architecture.of(
        {
            name: [instead(spec, backbone.site(name)) if spec.routed_by else spec for spec in specs]
            for name, specs in architecture.adapters
        }
    )


def _plain(spec: AdapterSpec, site: Site, num_params: int) -> AdapterSpec:
    """Return the experts' type as large as fits into so many parameters, but at least of size 1."""
    expert = spec.plain

    def sized(size: int) -> AdapterSpec:
        assert expert.size_field is not None
        change: dict[str, Any] = {expert.size_field: size}
        return replace(expert, **change)

    least = sized(1).num_params(site)
    each = sized(2).num_params(site) - least
    return sized(1 + max(0, (num_params - least) // each))
