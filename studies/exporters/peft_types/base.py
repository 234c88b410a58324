"""What an adapter type is in HF peft: the class of its configuration, the arguments, and how its tensors are filled."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autopeft.search_space.adapters import AdapterSpec
from autopeft.search_space.backbones.backbone import Site

if TYPE_CHECKING:
    from torch import Tensor

#: Name of the adapter in peft's modules.
ADAPTER = "default"
#: Usual reasons of `PeftType.transposed` and `PeftType.quantised`.
NO_TRANSPOSED = "peft does not support transposed weights"
NO_QUANTISED = "peft computes with the weight itself"

Placed = Sequence[tuple[Site, AdapterSpec]]
#: Arguments of a configuration, and a line for each loss.
Arguments = tuple[dict[str, Any], list[str]]


def nothing(placed: Placed) -> list[str]:
    """Return no obstacles."""
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftType:
    """One adapter type.

    - `config`: name of the class in `peft`.
    - `arguments`: its arguments for adapters of this type, and what they lose.
    - `fill`: writes the trained tensors of one adapter into peft's module: (module, tensors by name, adapter).
    - `obstacles`: a line for each adapter that one configuration cannot hold together with the others.
    - `transposed`, `quantised`: why peft cannot adapt weights stored as [D_in, D_out], or in 4 or 8 bits.
    - `decayed`: what of it other trainers decay and the study does not.
    - `flat`: peft's name of a vector that has two dimensions there, which the study does not decay.
    """

    config: str
    arguments: Callable[[Placed], Arguments]
    fill: Callable[[Any, Mapping[str, Tensor], Any], None]
    obstacles: Callable[[Placed], list[str]] = nothing
    transposed: str = ""
    quantised: str = ""
    decayed: str = ""
    flat: str = ""


def without_arguments(placed: Placed) -> Arguments:
    """Return no arguments and no losses."""
    return {}, []


def most_common(values: Iterable[Any]) -> Any:
    """Return the most frequent value; of several, the first."""
    return Counter(values).most_common(1)[0][0]


def patterns(by_module: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Return the value of most modules, and the other values by a pattern that matches their module alone."""
    default = most_common(by_module.values())
    return default, {anchored(module): value for module, value in by_module.items() if value != default}


def anchored(module: str) -> str:
    """Return a pattern for this module alone; without the anchor, peft also matches the end of longer names."""
    return f"^{re.escape(module)}"


def whole(number: float) -> float:
    """Return 16.0 as 16, because peft and tools that read its files expect integers."""
    return int(number) if number == int(number) else number


def common_values(placed: Placed, *names: str) -> dict[str, Any]:
    """Return the most frequent value of each field, for fields that peft has once for all sites."""
    return {name: most_common(getattr(spec, name) for _, spec in placed) for name in names}


def lost_values(placed: Placed, common: Mapping[str, Any]) -> list[str]:
    """Return a line for each field of a site that differs from the `common` value, which peft gets."""
    return [
        f"{site.name} {spec.kind}: {name} {own} becomes {value}, one for all sites (affects only training)"
        for site, spec in placed
        for name, value in common.items()
        if (own := getattr(spec, name)) != value
    ]


def one_for_all(placed: Placed, name: str, of: Callable[[Site, Any], object]) -> list[str]:
    """Return a line for each adapter with another value than most, of a quantity that peft has once."""
    values = [of(site, spec) for site, spec in placed]
    common = most_common(values)
    return [
        f"{site.name} {spec.kind}: {name} {value}, but peft supports one {name} for all, here {common}"
        for (site, spec), value in zip(placed, values, strict=True)
        if value != common
    ]
