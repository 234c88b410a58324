"""Tensors that the adapters of several sites share (`Parameter.scope`): which there are, and how large they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

#: How the names of shared tensors begin, where those of others have their site.
SHARED = "shared."


class SharedKey(NamedTuple):
    """`scope`: "model", or the features of the sites."""

    scope: str
    kind: str
    name: str
    key: int | None = None

    @property
    def path(self) -> str:
        """The name in a state. Tensors of several keys would have one name, but those with a key are in no state."""
        return f"{SHARED}{self.scope}/{self.kind}/{self.name}"


Shared = Mapping[SharedKey, Parameter]


def key_of(parameter: Parameter, name: str, site: Site, kind: str) -> SharedKey:
    scope = parameter.scope if parameter.scope == "model" else f"{site.in_features}x{site.out_features}"
    return SharedKey(scope, kind, name, parameter.key)


def shared_tensors(placed: Iterable[tuple[Site, AdapterSpec]]) -> Shared:
    """Of the adapters of one model, each tensor once."""
    return united(
        {key_of(parameter, name, site, spec.kind): parameter}
        for site, spec in placed
        for name, parameter in spec.parameters(site).items()
        if parameter.scope != "site"
    )


def united(parts: Iterable[Shared]) -> Shared:
    """Those of several parts of one model. How a tensor starts, its first site says."""
    found: dict[SharedKey, Parameter] = {}
    for part in parts:
        for key, parameter in part.items():
            first = found.setdefault(key, parameter)
            found[key] = replace(first, shape=largest([first.shape, parameter.shape]))
    return found


def largest(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that all of these are prefixes of."""
    return tuple(max(dims) for dims in zip(*shapes, strict=True))
