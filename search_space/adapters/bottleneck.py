"""Bottleneck adapters: a small two-layer network after a sub-layer, or beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import (
    AdapterSpec,
    check_at_least,
    check_one_of,
    check_probability,
)
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values

FORMS = ("serial", "parallel")
ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "none")
#: Rules of the down- and the up-projection.
INITS = {"zero": ("kaiming", "zeros"), "houlsby": ("houlsby", "houlsby"), "kaiming": ("kaiming", "kaiming")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck(AdapterSpec):
    """y + scale * (W_up act(W_down z + b_down) + b_up), with z = y (serial) or z = x (parallel).

    W_down: [R, D], W_up: [D, R]. y is the output of the sub-layer's last linear, before the residual sum; x is the
    input of its first linear. Published adapters are special cases:

    - Houlsby et al. 2019 (section 2.1): serial at attn and mlp, init "houlsby" (both projections normal with
      standard deviation 0.01, truncated at two standard deviations), nearly the identity.
    - Pfeiffer et al. 2021 (AdapterFusion): serial at mlp alone; in the paper it reads y after a residual sum and norm.
    - AdapterTune: serial, init "zero" (W_up zero), exactly the identity at the start.
    - He et al. 2022 (section 4.6): parallel at mlp, init "zero", scale 4; with a prefix at attn, MAM.
    - HeBA: init "kaiming", so that both projections have a gradient from the first step; not the identity.

    The activation "silu" is swish. Dropout applies to the update, as in the Adapters library.
    """

    kind: ClassVar[str] = "bottleneck"
    roles: ClassVar[tuple[str, ...]] = ("attn", "mlp")
    default_roles: ClassVar[tuple[str, ...]] = ("mlp",)
    size_field: ClassVar[str | None] = "size"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("init", "scale", "dropout")
    identity_at_start: ClassVar[bool] = False  # with init "zero" alone
    source: ClassVar[str] = "Houlsby et al. 2019, section 2.1; parallel: He et al. 2022, section 4.6"
    summary: ClassVar[str] = "two-layer bottleneck after or beside a sub-layer"

    size: int = 16
    form: str = "serial"
    activation: str = "relu"
    init: str = "zero"
    scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        AdapterSpec.__post_init__(self)
        check_at_least("size", self.size, 1)
        check_one_of("form", self.form, FORMS)
        check_one_of("activation", self.activation, ACTIVATIONS)
        check_one_of("init", self.init, tuple(INITS))
        check_at_least("scale", self.scale, 0.0)
        check_probability("dropout", self.dropout)

    def width(self, site: Site) -> int:
        """Return the number of input features of the down-projection."""
        return site.out_features if self.form == "serial" else site.in_features

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        down, up = INITS[self.init]
        return {
            "down": Parameter(shape=(self.size, self.width(site)), init=down),
            "down_bias": Parameter(shape=(self.size,), decay=False),
            "up": Parameter(shape=(site.out_features, self.size), init=up),
            "up_bias": Parameter(shape=(site.out_features,), decay=False),
        }

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * self.size * (self.width(site) + site.out_features)

    @override
    def constants(self, site: Site) -> dict[str, Any]:
        return {"scale": self.scale}

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        from autopeft.kernels.packed_bottleneck import packed_bottleneck

        z = y if self.form == "serial" else x
        weights = (p["down"], p["down_bias"], p["up"], p["up_bias"])
        rest = (*weights, call.constants["scale"], call.mask, self.activation)
        if call.drops:
            return y + call.dropout(packed_bottleneck(z, None, *rest))
        return packed_bottleneck(z, y, *rest)

    @override
    def mix(self, p: Values, gates: Tensor, x: Tensor, y: Tensor, call: Call) -> Tensor:
        import torch.nn.functional as F

        # All experts form one bottleneck of E * R units: z is read once, and a gate scales a block of R units.
        z = y if self.form == "serial" else x
        hidden = z @ p["down"].flatten(1, 2).mT + p["down_bias"].flatten(1)[:, None]
        if self.activation != "none":
            hidden = getattr(F, self.activation)(hidden)
        hidden = hidden.unflatten(-1, (gates.shape[-1], -1)) * gates[..., None]
        if call.mask is not None:
            hidden = hidden * call.mask[:, None, None]
        change = hidden.flatten(2) @ p["up"].movedim(2, 1).flatten(2).mT + gates @ p["up_bias"]
        return call.dropout(call.constants["scale"][:, None, None] * change)
