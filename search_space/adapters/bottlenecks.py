"""Base of bottlenecks: a small two-layer network after a sub-layer, or beside it, whatever its weights are made of."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from typing_extensions import override

from autopeft.search_space.adapters.base import (
    AdapterSpec,
    check_at_least,
    check_one_of,
    check_probability,
)
from autopeft.search_space.adapters.linear_operators import divisors
from autopeft.search_space.backbones.backbone import Site

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values

FORMS = ("serial", "parallel")
ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "none")


class Layers(NamedTuple):
    """The two layers of K bottlenecks of U units, or of E experts of each: [K, E, ...].

    down: [K, U, D_z], down_bias: [K, U], up: [K, D, U], up_bias: [K, D].
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BottleneckForm(AdapterSpec):
    """y + scale * (W_up act(W_down z + b_down) + b_up), with z = y (serial) or z = x (parallel).

    y is the output of the sub-layer's last linear, before the residual sum; x is the input of its first linear. The
    activation "silu" is swish. Dropout applies to the update, as in the Adapters library.
    """

    roles: ClassVar[tuple[str, ...]] = ("attn", "mlp")
    default_roles: ClassVar[tuple[str, ...]] = ("mlp",)
    size_field: ClassVar[str | None] = "size"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("scale", "dropout")

    size: int = 16
    form: str = "serial"
    activation: str = "relu"
    scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        AdapterSpec.__post_init__(self)
        check_at_least("size", self.size, 1)
        check_one_of("form", self.form, FORMS)
        check_one_of("activation", self.activation, ACTIVATIONS)
        check_at_least("scale", self.scale, 0.0)
        check_probability("dropout", self.dropout)

    def width(self, site: Site) -> int:
        """Return the number D_z of input features of the down-projection."""
        return site.out_features if self.form == "serial" else site.in_features

    def units(self, site: Site) -> int:
        """Return the number U of units."""
        return self.size

    @abstractmethod
    def layers(self, p: Values) -> Layers:
        """Return the two layers that the parameters make."""

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * self.units(site) * (self.width(site) + site.out_features)

    @override
    def constants(self, site: Site) -> dict[str, Any]:
        return {"scale": self.scale}

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        if call.drops:
            return y + call.dropout(self.run(p, x, y, None, call))
        return self.run(p, x, y, y, call)

    def run(self, p: Values, x: Tensor, y: Tensor, base: Tensor | None, call: Call, scaled: bool = True) -> Tensor:
        """Return the update, or `base` with it: [K, M, D]. `scaled`: multiply it by the scale."""
        from autopeft.kernels.packed_bottleneck import packed_bottleneck

        layers, scale = self.layers(p), call.constants["scale"]
        factor = scale if scaled else scale.new_ones(len(scale))
        z = y if self.form == "serial" else x
        return packed_bottleneck(z, base, *layers, factor, _of_units(call.mask, layers), self.activation)

    @override
    def mix(self, p: Values, gates: Tensor, x: Tensor, y: Tensor, call: Call) -> Tensor:
        import torch.nn.functional as F

        # All experts form one bottleneck of E * U units: z is read once, and a gate scales a block of U units.
        z, layers = (y if self.form == "serial" else x), self.layers(p)
        hidden = z @ layers.down.flatten(1, 2).mT + layers.down_bias.flatten(1)[:, None]
        if self.activation != "none":
            hidden = getattr(F, self.activation)(hidden)
        hidden = hidden.unflatten(-1, (gates.shape[-1], -1)) * gates[..., None]
        mask = _of_units(call.mask, layers)
        if mask is not None:
            hidden = hidden * mask[:, None, None]
        change = hidden.flatten(2) @ layers.up.movedim(2, 1).flatten(2).mT + gates @ layers.up_bias
        return call.dropout(call.constants["scale"][:, None, None] * change)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockBottleneck(BottleneckForm):
    """A bottleneck of n R units whose projections consist of n x n blocks.

    n is the largest divisor of the features up to `blocks`, R is `size`.
    """

    size: int = 6
    blocks: int = 4

    def __post_init__(self) -> None:
        BottleneckForm.__post_init__(self)
        check_at_least("blocks", self.blocks, 1)

    @property
    @override
    def label(self) -> str:
        return f"{self.kind} {self.blocks} x {self.size}"

    def grid(self, site: Site) -> int:
        """Return the number n of blocks along each side."""
        return max(d for d in divisors(gcd(self.width(site), site.out_features)) if d <= self.blocks)

    @override
    def units(self, site: Site) -> int:
        return self.grid(site) * self.size


def kronecker(a: Tensor, b: Tensor) -> Tensor:
    """Return sum_i a_i kron b_i. a: [K, I, n, m], b: [K, I, P, Q]. Returns [K, n P, m Q]."""
    import torch

    return torch.einsum("kinm,kipq->knpmq", a, b).flatten(3).flatten(1, 2)


def _of_units(mask: Tensor | None, layers: Layers) -> Tensor | None:
    """Return the mask of units [K, U]. Where these are blocks of R units each, the mask of a block is that of R."""
    return None if mask is None else mask.repeat(1, layers.down.shape[-2] // mask.shape[1])
