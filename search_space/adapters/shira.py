"""SHiRA: a sparse, high-rank update of a weight at random places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import AdapterSpec, check_at_least
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Shira(AdapterSpec):
    """(W + scale * S) x + b, where S: [D_out, D_in] is sparse.

    S may be nonzero at `rank` * (D_in + D_out) random places, as many as a LoRA of that rank has parameters. The values
    at these places start at zero and are trained; they are stored with the indices of the places.

    A smaller adapter that reads the bank of a larger one has the first places of the larger one. The forward pass makes
    S dense, so an adapter that is not merged costs as much as W.
    """

    kind: ClassVar[str] = "shira"
    roles: ClassVar[tuple[str, ...]] = LINEAR_ROLES
    default_roles: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    size_field: ClassVar[str | None] = "rank"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("scale",)
    mergeable: ClassVar[bool] = True
    can_be_expert: ClassVar[bool] = False  # a dense weight per expert would enlarge the model
    needs: ClassVar[str] = "linear layers with more weights than a LoRA of its rank"
    source: ClassVar[str] = "Bhardwaj et al. 2024, Sparse High Rank Adapters, section 3.1 (SHiRA-Rand)"
    summary: ClassVar[str] = "sparse change of a weight at random places"

    rank: int = 8
    scale: float = 1.0

    def __post_init__(self) -> None:
        AdapterSpec.__post_init__(self)
        check_at_least("rank", self.rank, 1)

    @override
    def fits(self, site: Site) -> bool:
        return self._count(site) <= site.in_features * site.out_features

    def _count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        shape = (self._count(site),)
        return {
            "S": Parameter(shape=shape, decay=False),
            "places": Parameter(shape=shape, init="places", trainable=False, indices=True),
        }

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * site.in_features * site.out_features

    @override
    def constants(self, site: Site) -> dict[str, Any]:
        return {"scale": float(self.scale)}

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        values = call.constants["scale"][:, None] * p["S"]
        if call.mask is not None:
            values = values * call.mask.repeat_interleave(values.shape[1] // call.mask.shape[1], 1)
        dense = values.new_zeros(len(values), y.shape[-1] * x.shape[-1])
        # Entries beyond a slot's own size have index 0 and add zero to the first place.
        dense = dense.scatter_add(1, p["places"].long(), values)
        change: Tensor = dense.unflatten(1, (y.shape[-1], x.shape[-1]))
        return y + x @ change.mT

    @override
    def merge(self, p: Values, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change = weight.new_zeros(weight.numel()).scatter(0, p["places"].long(), (self.scale * p["S"]).to(weight))
        return weight + change.view_as(weight), bias
