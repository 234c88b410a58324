"""SHiRA: a sparse, high-rank update of a weight at chosen places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import AdapterSpec, check_at_least, check_one_of
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Site
from autopeft.search_space.parameter import Parameter, Places

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values

RANDOM = "random"
#: How the places are chosen; all but random ones are ranked by `runtime/factors.py`.
PLACES = (RANDOM, "magnitude", "gradient", "snip", "movement")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shira(AdapterSpec):
    """(W + scale * S) x + b, where S: [D_out, D_in] is sparse.

    S may be nonzero at `rank` * (D_in + D_out) places, as many as a LoRA of that rank has parameters. The values at
    these places start at zero and are trained; they are stored with the indices of the places.

    `places`: "random" (SHiRA-Rand), or those of the largest |W| ("magnitude", SHiRA-WM), of the largest gradient of the
    loss over training rows with respect to W, G ("gradient", SHiRA-Grad), or of the largest |W * G| ("snip").
    "movement" takes the entries that move most in a first training (Ansell et al. 2022, LT-SFT, section 3), which is
    cut short here: one pass of Adam over the rows, with the linears of the layer that read as many inputs and the task
    head. All but random places are the same for all seeds.

    A smaller adapter that reads the bank of a larger one has the first places of the larger one. The forward pass makes
    S dense, so an adapter that is not merged costs as much as W.
    """

    kind: ClassVar[str] = "shira"
    roles: ClassVar[tuple[str, ...]] = LINEAR_ROLES
    default_roles: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    size_field: ClassVar[str | None] = "rank"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("scale",)
    later_fields: ClassVar[tuple[str, ...]] = (*AdapterSpec.later_fields, "places")
    mergeable: ClassVar[bool] = True
    can_be_expert: ClassVar[bool] = False  # a dense weight per expert would enlarge the model
    needs: ClassVar[str] = "linear layers with more weights than a LoRA of its rank"
    source: ClassVar[str] = "Bhardwaj et al. 2024, Sparse High Rank Adapters, section 3.1"
    summary: ClassVar[str] = "sparse change of a weight at chosen places"

    rank: int = 8
    scale: float = 1.0
    places: str = RANDOM

    def __post_init__(self) -> None:
        AdapterSpec.__post_init__(self)
        check_at_least("rank", self.rank, 1)
        check_one_of("places", self.places, PLACES)

    @override
    def fits(self, site: Site) -> bool:
        return self._count(site) <= site.in_features * site.out_features

    def _count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        shape = (self._count(site),)
        init = "places" if self.places == RANDOM else Places(rule=self.places)
        return {
            "S": Parameter(shape=shape, decay=False),
            "places": Parameter(shape=shape, init=init, trainable=False, indices=True),
        }

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * site.in_features * site.out_features

    @override
    def constants(self, site: Site) -> dict[str, Any]:
        return {"scale": float(self.scale)}

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        shape = (y.shape[-1], x.shape[-1])
        change: Tensor = self.dense(p, call, shape[0] * shape[1]).unflatten(1, shape)
        return y + x @ change.mT

    def dense(self, p: Values, call: Call, size: int) -> Tensor:
        """Return scale * S with all of its `size` elements: [K, D_out * D_in]."""
        return scattered(call.constants["scale"][:, None] * p["S"], p["places"], size, call.mask)

    @override
    def merge(self, p: Values, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change = weight.new_zeros(weight.numel()).scatter(0, p["places"].long(), (self.scale * p["S"]).to(weight))
        return weight + change.view_as(weight), bias


def scattered(values: Tensor, places: Tensor, size: int, mask: Tensor | None) -> Tensor:
    """Return `size` elements that are zero but for the values at the places of each slot: [K, size].

    values: [K, N], places: [K, N], mask: [K, R], where a unit of the size owns N / R values.
    """
    if mask is not None:
        values = values * mask.repeat_interleave(values.shape[1] // mask.shape[1], 1)
    # Entries beyond a slot's own size have index 0 and add zero to the first place.
    return values.new_zeros(len(values), size).scatter_add(1, places.long(), values)
