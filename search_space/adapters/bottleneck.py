"""Bottleneck adapters: a small two-layer network after a sub-layer, or beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import check_one_of
from autopeft.search_space.adapters.bottlenecks import BottleneckForm, Layers
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from autopeft.search_space.call import Values

#: Rules of the down- and the up-projection.
INITS = {"zero": ("kaiming", "zeros"), "houlsby": ("houlsby", "houlsby"), "kaiming": ("kaiming", "kaiming")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck(BottleneckForm):
    """y + scale * (W_up act(W_down z + b_down) + b_up), with z = y (serial) or z = x (parallel).

    W_down: [R, D], W_up: [D, R]. y is the output of the sub-layer's last linear, before the residual sum; x is the
    input of its first linear. Published adapters are special cases:

    - Houlsby et al. 2019 (section 2.1): serial at attn and mlp, init "houlsby" (both projections normal with
      standard deviation 0.01, truncated at two standard deviations), nearly the identity.
    - Pfeiffer et al. 2021 (AdapterFusion): serial at mlp alone; in the paper it reads y after a residual sum and norm.
    - AdapterTune: serial, init "zero" (W_up zero), exactly the identity at the start.
    - He et al. 2022 (section 4.6): parallel at mlp, init "zero", scale 4; with a prefix at attn, MAM.
    - HeBA: init "kaiming", so that both projections have a gradient from the first step; not the identity.
    """

    kind: ClassVar[str] = "bottleneck"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("init", "scale", "dropout")
    identity_at_start: ClassVar[bool] = False  # with init "zero" alone
    source: ClassVar[str] = "Houlsby et al. 2019, section 2.1; parallel: He et al. 2022, section 4.6"
    summary: ClassVar[str] = "two-layer bottleneck after or beside a sub-layer"

    init: str = "zero"

    def __post_init__(self) -> None:
        BottleneckForm.__post_init__(self)
        check_one_of("init", self.init, tuple(INITS))

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
    def layers(self, p: Values) -> Layers:
        return Layers(p["down"], p["down_bias"], p["up"], p["up_bias"])
