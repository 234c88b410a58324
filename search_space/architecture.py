"""Architectures: which adapters sit at which sites. Equal networks have equal keys, however they were built."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autopeft.search_space.adapters import AdapterSpec, spec_from_dict
from autopeft.search_space.backbones.backbone import Backbone, Site
from autopeft.search_space.sharing import Shared, shared_tensors


def canonical_json(data: Any) -> str:
    """Return JSON with sorted keys; a float without a fraction is written as an integer, so 16 and 16.0 are equal."""
    return json.dumps(_canonical(data), sort_keys=True, separators=(",", ":"))


def _canonical(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _canonical(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_canonical(value) for value in data]
    return int(data) if isinstance(data, float) and data.is_integer() else data


def digest(data: Any) -> str:
    """Return the first sixteen hexadecimal digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()[:16]


def site_sort_key(spec: AdapterSpec) -> str:
    """Return the key by which the adapters of one site are sorted."""
    return canonical_json(spec.to_dict())


@dataclass(frozen=True, slots=True)
class Architecture:
    """Adapters by site name, in canonical order. Sites without adapters are left out."""

    adapters: tuple[tuple[str, tuple[AdapterSpec, ...]], ...] = ()

    @classmethod
    def of(cls, adapters: Mapping[str, Sequence[AdapterSpec]]) -> Architecture:
        """Return the architecture with these adapters by site name, in any order."""
        rows = []
        for site in sorted(adapters):
            specs = tuple(adapters[site])
            if len(specs) > 1:  # one needs no key, which would take longer than the rest
                specs = tuple(sorted(specs, key=site_sort_key))
            if specs:
                rows.append((site, specs))
        return cls(tuple(rows))

    def __iter__(self) -> Iterator[tuple[str, AdapterSpec]]:
        """Yield pairs of site name and adapter."""
        return ((site, spec) for site, specs in self.adapters for spec in specs)

    def __bool__(self) -> bool:
        return bool(self.adapters)

    def placed(self, backbone: Backbone) -> Iterator[tuple[Site, AdapterSpec]]:
        """Return pairs of site and adapter. Raises ValueError for a site that the backbone lacks."""
        return ((backbone.site(name), spec) for name, spec in self)

    @property
    def key(self) -> str:
        """Digest that equal architectures share."""
        return digest(self.to_dict())

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the adapter types in use, sorted."""
        return tuple(sorted({spec.kind for _, spec in self}))

    @property
    def mergeable(self) -> bool:
        """Whether every adapter can be merged into the backbone's weights."""
        return all(spec.mergeable for _, spec in self)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able mapping that `from_dict` reads."""
        return {site: [spec.to_dict() for spec in specs] for site, specs in self.adapters}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """Return the architecture that `to_dict` wrote."""
        return cls.of({site: [spec_from_dict(spec) for spec in specs] for site, specs in data.items()})

    # Costs that follow from the declaration alone.

    def shared(self, backbone: Backbone) -> Shared:
        """Return the tensors that several sites share, each once."""
        return shared_tensors(self.placed(backbone))

    def num_params(self, backbone: Backbone) -> int:
        """Return the number of trainable parameters of the adapters, without the task head."""
        shared = sum(parameter.count for parameter in self.shared(backbone).values() if parameter.trainable)
        return shared + sum(spec.num_params(backbone.site(site)) for site, spec in self)

    def total_params(self, backbone: Backbone) -> int:
        """Return the number of parameters, trainable and frozen (pretrained LoRAs, fixed random projections)."""
        shared = sum(parameter.count for parameter in self.shared(backbone).values())
        return shared + sum(spec.total_params(backbone.site(site)) for site, spec in self)

    def active_params(self, backbone: Backbone) -> int:
        """Return the number of parameters active per token: of a mixture, the experts in use and the router."""
        shared = sum(parameter.count for parameter in self.shared(backbone).values())
        return shared + sum(spec.active_params(backbone.site(site)) for site, spec in self)

    def stored_bytes(self, backbone: Backbone) -> int:
        """Return the size of the trained adapters on disk, in bytes."""
        shared = sum(parameter.stored_bits for parameter in self.shared(backbone).values())
        return (shared + sum(spec.stored_bits(backbone.site(site)) for site, spec in self)) // 8

    @property
    def first_pass(self) -> bool:
        """Whether any adapter reads the result of a first forward pass of the bare backbone."""
        return any(spec.first_pass for _, spec in self)

    def flops_per_token(self, backbone: Backbone) -> int:
        """Return the operations that the adapters add to one forward pass, per token.

        See `AdapterSpec.flops_per_token`. A first pass through the backbone counts once, however many adapters read it.
        """
        first = backbone.flops_per_token * self.first_pass
        return first + sum(spec.flops_per_token(backbone.site(site)) for site, spec in self)

    def lowest_layer(self, backbone: Backbone) -> int:
        """Return the index of the lowest adapted layer, or the number of layers if none is adapted.

        Candidates can share the layers below it. An adapter outside the layers counts as layer 0.
        """
        layers = [backbone.site(site).layer for site, _ in self]
        return min((layer if layer is not None else 0 for layer in layers), default=backbone.num_layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """The unit of evaluation: an architecture and its training settings (learning rate and the like)."""

    architecture: Architecture
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Digest that equal candidates share."""
        return digest(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able mapping that `from_dict` reads."""
        return {"architecture": self.architecture.to_dict(), "training": dict(self.training)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candidate:
        """Return the candidate that `to_dict` wrote."""
        return cls(architecture=Architecture.from_dict(data["architecture"]), training=dict(data["training"]))
