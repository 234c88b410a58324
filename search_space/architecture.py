"""An architecture: which adapters sit at which sites. Two equal networks have equal keys, whatever path led to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autopeft.search_space.adapters import AdapterSpec, spec_from_dict
from autopeft.search_space.adapters.base import NUMBER_BITS
from autopeft.search_space.backbones.backbone import Backbone, Site
from autopeft.search_space.sharing import Shared, shared_tensors


def canonical_json(data: Any) -> str:
    """JSON with sorted keys, and without a fraction where there is none: 16 and 16.0 are one number."""
    return json.dumps(_canonical(data), sort_keys=True, separators=(",", ":"))


def _canonical(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _canonical(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_canonical(value) for value in data]
    return int(data) if isinstance(data, float) and data.is_integer() else data


def digest(data: Any) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()[:16]


def order_at_site(spec: AdapterSpec) -> str:
    """By which the adapters of a site are sorted."""
    return canonical_json(spec.to_dict())


@dataclass(frozen=True, slots=True)
class Architecture:
    """Adapters by site name. Sites without adapters do not appear; the order of sites and adapters does not count."""

    adapters: tuple[tuple[str, tuple[AdapterSpec, ...]], ...] = ()

    @classmethod
    def of(cls, adapters: Mapping[str, Sequence[AdapterSpec]]) -> Architecture:
        rows = []
        for site in sorted(adapters):
            specs = sorted(adapters[site], key=order_at_site)
            if specs:
                rows.append((site, tuple(specs)))
        return cls(tuple(rows))

    def __iter__(self) -> Iterator[tuple[str, AdapterSpec]]:
        """Pairs of site name and adapter."""
        return ((site, spec) for site, specs in self.adapters for spec in specs)

    def __bool__(self) -> bool:
        return bool(self.adapters)

    def placed(self, backbone: Backbone) -> Iterator[tuple[Site, AdapterSpec]]:
        return ((backbone.site(name), spec) for name, spec in self)

    @property
    def key(self) -> str:
        return digest(self.to_dict())

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted({spec.kind for _, spec in self}))

    @property
    def mergeable(self) -> bool:
        return all(spec.mergeable for _, spec in self)

    def to_dict(self) -> dict[str, Any]:
        return {site: [spec.to_dict() for spec in specs] for site, specs in self.adapters}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        return cls.of({site: [spec_from_dict(spec) for spec in specs] for site, specs in data.items()})

    # Costs that follow from the declaration alone.

    def shared(self, backbone: Backbone) -> Shared:
        """The tensors that sites share, each once."""
        return shared_tensors(self.placed(backbone))

    def num_params(self, backbone: Backbone) -> int:
        """Trainable parameters of the adapters; the head counts apart."""
        shared = sum(parameter.count for parameter in self.shared(backbone).values() if parameter.trainable)
        return shared + sum(spec.num_params(backbone.site(site)) for site, spec in self)

    def total_params(self, backbone: Backbone) -> int:
        """All that are at work: those that are trained, and those that are not (of LoRAs that are given, or drawn)."""
        shared = sum(parameter.count for parameter in self.shared(backbone).values())
        return shared + sum(spec.total_params(backbone.site(site)) for site, spec in self)

    def active_params(self, backbone: Backbone) -> int:
        """Those that a token meets: of a mixture the experts that it is sent to, and the router."""
        shared = sum(parameter.count for parameter in self.shared(backbone).values())
        return shared + sum(spec.active_params(backbone.site(site)) for site, spec in self)

    def stored_bytes(self, backbone: Backbone) -> int:
        shared = NUMBER_BITS * sum(p.count for p in self.shared(backbone).values() if p.stored)
        return (shared + sum(spec.stored_bits(backbone.site(site)) for site, spec in self)) // 8

    @property
    def first_pass(self) -> bool:
        """Whether any adapter reads a forward pass of the backbone alone."""
        return any(spec.first_pass for _, spec in self)

    def flops_per_token(self, backbone: Backbone) -> int:
        """Operations that the adapters add to one forward pass, per token; see `AdapterSpec.flops_per_token`. Those of
        a first pass through the backbone count once, however many adapters read it.
        """
        first = backbone.flops_per_token * self.first_pass
        return first + sum(spec.flops_per_token(backbone.site(site)) for site, spec in self)

    def lowest_layer(self, backbone: Backbone) -> int:
        """The first layer that is adapted; the number of layers if none is. Everything below can be shared."""
        layers = [backbone.site(site).layer for site, _ in self]
        return min((layer if layer is not None else 0 for layer in layers), default=backbone.num_layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What is evaluated: an architecture and how it is trained (learning rate and the like)."""

    architecture: Architecture
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return digest(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return {"architecture": self.architecture.to_dict(), "training": dict(self.training)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candidate:
        return cls(architecture=Architecture.from_dict(data["architecture"]), training=dict(data["training"]))
