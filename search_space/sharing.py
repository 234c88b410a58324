"""Tensors that the adapters of several sites share (`Parameter.scope`): their keys and shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

#: Prefix of the names of shared tensors; the names of other tensors begin with their site.
SHARED = "shared."


class SharedKey(NamedTuple):
    """Key of a shared tensor. `scope`: "model", or features and perhaps the role of the sites that share it."""

    scope: str
    kind: str
    name: str
    key: int | None = None

    @property
    def path(self) -> str:
        """Name in a state dict. It leaves out `key`, because a tensor with a key is never stored."""
        return f"{SHARED}{self.scope}/{self.kind}/{self.name}"


Shared = Mapping[SharedKey, Parameter]


def key_of(parameter: Parameter, name: str, site: Site, kind: str) -> SharedKey:
    """Return the key of a shared parameter called `name` in an adapter of type `kind` at `site`."""
    features = f"{site.in_features}x{site.out_features}"
    scopes = {"model": "model", "shape": features, "role": f"{site.role}.{features}"}
    return SharedKey(scopes[parameter.scope], kind, name, parameter.key)


def shared_tensors(placed: Iterable[tuple[Site, AdapterSpec]]) -> Shared:
    """Return the shared tensors of the adapters of one model, each once."""
    return merged(
        {key_of(parameter, name, site, spec.kind): parameter}
        for site, spec in placed
        for name, parameter in spec.parameters(site).items()
        if parameter.scope != "site"
    )


def merged(parts: Iterable[Shared]) -> Shared:
    """Return the shared tensors of several parts of one model, each at its largest shape.

    The first part that has a tensor determines its initial values.
    """
    found: dict[SharedKey, Parameter] = {}
    for part in parts:
        for key, parameter in part.items():
            first = found.setdefault(key, parameter)
            found[key] = replace(first, shape=largest([first.shape, parameter.shape]))
    return found


def largest(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the smallest shape that contains all of these."""
    return tuple(max(dims) for dims in zip(*shapes, strict=True))
