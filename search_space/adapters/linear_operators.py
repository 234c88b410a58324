"""Bases of types that act linearly on the input or the output of a linear layer; merging follows from what they do.

A linear operation is known by what it makes of unit vectors. Both bases run the type's own function on these to fold it
into a weight, so a type states its formula once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Site

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values

#: Numbers per slot, each [K]; see `OutputOperator.numbers`.
Numbers = Mapping[str, "Tensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputOperator(AdapterSpec):
    """W T(x) + b, with a linear T."""

    roles: ClassVar[tuple[str, ...]] = LINEAR_ROLES
    default_roles: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    mergeable: ClassVar[bool] = True

    @abstractmethod
    def turn(self, p: Values, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return T(x). x: [K, M, D_in], mask: [K, R]. Returns [K, M, D_in]."""

    @override
    def apply_input(self, p: Values, x: Tensor, call: Call) -> Tensor:
        return self.turn(p, x, call.mask)

    @override
    def merge(self, p: Values, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        units = _unit_vectors(p, weight)
        return weight.to(units.dtype) @ self.turn(_one_slot(p), units, None)[0].mT, bias


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOperator(AdapterSpec):
    """T(x, W x + b), with a linear T."""

    roles: ClassVar[tuple[str, ...]] = LINEAR_ROLES
    default_roles: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    mergeable: ClassVar[bool] = True

    @abstractmethod
    def act(self, p: Values, x: Tensor, y: Tensor, numbers: Numbers, mask: Tensor | None) -> Tensor:
        """Return T(x, y). x: [K, M, D_in], y: [K, M, D_out], mask: [K, R]. Returns [K, M, D_out]."""

    def numbers(self, in_features: int, out_features: int) -> dict[str, float]:
        """Return the numbers that `act` reads at a linear of this size."""
        return {}

    @override
    def constants(self, site: Site) -> dict[str, Any]:
        return self.numbers(site.in_features, site.out_features)

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        return self.act(p, call.dropout(x), y, call.constants, call.mask)

    @override
    def merge(self, p: Values, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        units, values = _unit_vectors(p, weight), _one_slot(p)
        out_features, in_features = weight.shape
        numbers = {name: units.new_tensor([value]) for name, value in self.numbers(in_features, out_features).items()}
        merged = self.act(values, units, weight.mT[None].to(units.dtype), numbers, None)[0].mT
        if bias is None:
            return merged, None
        nothing = units.new_zeros(1, 1, in_features)
        return merged, self.act(values, nothing, bias[None, None].to(units.dtype), numbers, None)[0, 0]


def _one_slot(p: Values) -> dict[str, Tensor]:
    return {name: value[None] for name, value in p.items()}


def _unit_vectors(p: Values, weight: Tensor) -> Tensor:
    """Return the unit vectors of the input, [1, D_in, D_in], in the type of the adapter's values."""
    import torch

    return torch.eye(weight.shape[1], device=weight.device, dtype=next(iter(p.values())).dtype)[None]


def bias_of(call: Call) -> Tensor | float:
    """Return the bias of the backbone's linear, or 0 if it has none."""
    base: Any = call.base
    bias: Tensor | None = base.bias
    return 0.0 if bias is None else bias.detach()


def divisors(number: int) -> list[int]:
    """Return the divisors of a number of features, in ascending order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return [*small, *(number // d for d in reversed(small) if d * d != number)]


def nearest_divisor(number: int, wanted: int, multiple_of: int = 1) -> int:
    """Return the divisor of `number` nearest to `wanted`, the smaller of two; 0 if none is such a multiple."""
    found = [d for d in divisors(number) if d > 1 and d % multiple_of == 0]
    return min(found, key=lambda d: (abs(d - wanted), d), default=0)
