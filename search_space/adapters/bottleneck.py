"""Bottleneck adapters: a small two-layer network after a sub-layer, or beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from autopeft.search_space.adapters.base import (
    AdapterSpec,
    check_at_least,
    check_one_of,
    check_probability,
)
from autopeft.search_space.parameter import Parameter

FORMS = ("serial", "parallel")
ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "none")
#: Rules of the down- and the up-projection.
INITS = {"zero": ("kaiming", "zeros"), "houlsby": ("houlsby", "houlsby"), "kaiming": ("kaiming", "kaiming")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck(AdapterSpec):
    """y + scale * (W_up act(W_down z + b_down) + b_up), with z = y (serial) or z = x (parallel).

    W_down: [R, D], W_up: [D, R]. y leaves the sub-layer's last linear, ahead of the residual sum; x enters
    its first. Published adapters are settings of it:

    - Houlsby et al. 2019 (section 2.1): serial at attn and mlp, init "houlsby" (both projections normal with
      standard deviation 0.01, cut at two of them), nearly the identity.
    - Pfeiffer et al. 2021 (AdapterFusion): serial at mlp alone; theirs reads y after a residual sum and norm.
    - AdapterTune: serial, init "zero" (W_up zero), exactly the identity at the start.
    - He et al. 2022 (section 4.6): parallel at mlp, init "zero", scale 4; with a prefix at attn, MAM.
    - HeBA: init "kaiming", so that both projections have a gradient from the first step; not the identity.

    Activation "silu" is swish. Dropout falls on the update, as in the Adapters library.
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
        check_at_least("size", self.size, 1)
        check_one_of("form", self.form, FORMS)
        check_one_of("activation", self.activation, ACTIVATIONS)
        check_one_of("init", self.init, tuple(INITS))
        check_at_least("scale", self.scale, 0.0)
        check_probability("dropout", self.dropout)

    def width(self, site):
        """Features that the down-projection reads."""
        return site.out_features if self.form == "serial" else site.in_features

    def parameters(self, site):
        down, up = INITS[self.init]
        return {
            "down": Parameter(shape=(self.size, self.width(site)), init=down),
            "down_bias": Parameter(shape=(self.size,), decay=False),
            "up": Parameter(shape=(site.out_features, self.size), init=up),
            "up_bias": Parameter(shape=(site.out_features,), decay=False),
        }

    def flops_per_token(self, site):
        return 2 * self.size * (self.width(site) + site.out_features)

    def constants(self, site):
        return {"scale": self.scale}

    def apply(self, p, x, y, call):
        from autopeft.kernels.packed_bottleneck import packed_bottleneck

        z = y if self.form == "serial" else x
        weights = (p["down"], p["down_bias"], p["up"], p["up_bias"])
        rest = (*weights, call.constants["scale"], call.mask, self.activation)
        if call.drops:
            return y + call.dropout(packed_bottleneck(z, None, *rest))
        return packed_bottleneck(z, y, *rest)

    def mix(self, p, gates, x, y, call):
        import torch.nn.functional as F

        # All experts are one bottleneck of E * R units: z is read once, and what a gate closes is a block of units.
        z = y if self.form == "serial" else x
        hidden = z @ p["down"].flatten(1, 2).mT + p["down_bias"].flatten(1)[:, None]
        if self.activation != "none":
            hidden = getattr(F, self.activation)(hidden)
        hidden = hidden.unflatten(-1, (gates.shape[-1], -1)) * gates[..., None]
        if call.mask is not None:
            hidden = hidden * call.mask[:, None, None]
        change = hidden.flatten(2) @ p["up"].movedim(2, 1).flatten(2).mT + gates @ p["up_bias"]
        return call.dropout(call.constants["scale"][:, None, None] * change)
