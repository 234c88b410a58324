"""VL-PET: bottlenecks whose output, with that of the sub-layer, a trained gate multiplies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import check_one_of
from autopeft.search_space.adapters.bottlenecks import BottleneckForm, Layers
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values

GRANULARITIES = ("feature", "token", "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class VlPet(BottleneckForm):
    """G * h, where h is y with the update of a bottleneck of R units (`BottleneckForm`) whose W_up starts at zero.

    The granularity of the gate G is a factor for each

    - "feature": G = 1 + g with g: [D] (VL-PET-middleY in the paper),
    - "token": G = 2 sigmoid(w (x + h) + c) with w: [1, D] (VL-PET-middleX),
    - "both": G = 2 sigmoid(V gelu(U x + b) + c) with U: [R, D_in], V: [D, R] (VL-PET-large).

    g, w and V start at zero: the identity. The factor 2 is the paper's scale s. VL-PET-small is left out, because it
    reads all tokens of a text, and so are the designs for the decoder of an encoder-decoder model.
    """

    kind: ClassVar[str] = "vlpet"
    default_roles: ClassVar[tuple[str, ...]] = ("attn", "mlp")
    needs: ClassVar[str] = "sub-layers with as many inputs as outputs"
    source: ClassVar[str] = "Hu et al. 2023, VL-PET, section 3"
    summary: ClassVar[str] = "two-layer bottleneck and a gate after a sub-layer"

    activation: str = "gelu"
    granularity: str = "feature"

    def __post_init__(self) -> None:
        BottleneckForm.__post_init__(self)
        check_one_of("granularity", self.granularity, GRANULARITIES)

    @override
    def fits(self, site: Site) -> bool:
        return site.in_features == site.out_features  # for any granularity, so that a space may have several

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        r, d = self.size, site.out_features
        gates = {
            "feature": {"g": Parameter(shape=(d,), decay=False)},
            "token": {"w": Parameter(shape=(1, d)), "c": Parameter(shape=(1,), decay=False)},
            "both": {
                "U": Parameter(shape=(r, d), init="kaiming"),
                "b": Parameter(shape=(r,), decay=False),
                "V": Parameter(shape=(d, r)),
                "c": Parameter(shape=(d,), decay=False),
            },
        }
        return {
            "down": Parameter(shape=(r, d), init="kaiming"),
            "down_bias": Parameter(shape=(r,), decay=False),
            "up": Parameter(shape=(d, r)),
            "up_bias": Parameter(shape=(d,), decay=False),
            **gates[self.granularity],
        }

    @override
    def layers(self, p: Values) -> Layers:
        return Layers(p["down"], p["down_bias"], p["up"], p["up_bias"])

    @override
    def flops_per_token(self, site: Site) -> int:
        gate = {"feature": 0, "token": 2, "both": 4 * self.size}[self.granularity] * site.out_features
        return BottleneckForm.flops_per_token(self, site) + gate

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        h = BottleneckForm.apply(self, p, x, y, call)
        if self.granularity == "feature":
            return h * (1.0 + p["g"][:, None])
        import torch.nn.functional as F

        if self.granularity == "token":
            gate = (x + h) @ p["w"].mT
        else:
            hidden = F.gelu(x @ p["U"].mT + p["b"][:, None])
            gate = (hidden if call.mask is None else hidden * call.mask[:, None]) @ p["V"].mT
        return h * (2.0 * (gate + p["c"][:, None]).sigmoid())
