"""The adapter types, one file each. `ADAPTERS` is the registry that the CLI, the schema and the tables derive from."""

from __future__ import annotations

from typing import Any

from autopeft.search_space.adapters.base import AdapterSpec, Parameter
from autopeft.search_space.adapters.lora import Lora

ADAPTERS: dict[str, type[AdapterSpec]] = {spec.kind: spec for spec in (Lora,)}


def spec_from_dict(data: dict[str, Any]) -> AdapterSpec:
    """The inverse of `AdapterSpec.to_dict`. Raises ValueError for an unknown kind, field or value."""
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in ADAPTERS:
        raise ValueError(f"unknown adapter kind {kind!r}; known: {', '.join(ADAPTERS)}")
    try:
        return ADAPTERS[kind](**fields)
    except TypeError as error:
        raise ValueError(f"adapter {kind}: {error}") from None


__all__ = ["ADAPTERS", "AdapterSpec", "Lora", "Parameter", "spec_from_dict"]
