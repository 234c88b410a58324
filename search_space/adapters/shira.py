"""SHiRA: a sparse change of a weight at random places, which has a high rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from autopeft.search_space.adapters.base import AdapterSpec, check_at_least
from autopeft.search_space.backbones.backbone import LINEAR_ROLES
from autopeft.search_space.parameter import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Shira(AdapterSpec):
    """(W + scale * S) x + b, with S: [D_out, D_in] zero but for `rank` * (D_in + D_out) random places, as many as the
    parameters of a LoRA of that rank. What stands there is trained and starts as zeros; it is stored with the places.

    A smaller one that reads a larger one's has the first of its places. S is made dense: until it is merged, it costs
    what W does.
    """

    kind: ClassVar[str] = "shira"
    roles: ClassVar[tuple[str, ...]] = LINEAR_ROLES
    default_roles: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    size_field: ClassVar[str | None] = "rank"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("scale",)
    mergeable: ClassVar[bool] = True
    can_be_expert: ClassVar[bool] = False  # a dense weight for each expert would be a larger model
    source: ClassVar[str] = "Bhardwaj et al. 2024, Sparse High Rank Adapters, section 3.1 (SHiRA-Rand)"
    summary: ClassVar[str] = "sparse change of a weight at random places"

    rank: int = 8
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_at_least("rank", self.rank, 1)

    def fits(self, site):
        return self._count(site) <= site.in_features * site.out_features

    def _count(self, site):
        return self.rank * (site.in_features + site.out_features)

    def parameters(self, site):
        shape = (self._count(site),)
        return {
            "S": Parameter(shape=shape, decay=False),
            "places": Parameter(shape=shape, init="places", trainable=False, indices=True),
        }

    def flops_per_token(self, site):
        return 2 * site.in_features * site.out_features

    def constants(self, site):
        return {"scale": float(self.scale)}

    def apply(self, p, x, y, call):
        values = call.constants["scale"][:, None] * p["S"]
        if call.mask is not None:
            values = values * call.mask.repeat_interleave(values.shape[1] // call.mask.shape[1], 1)
        change = values.new_zeros(len(values), y.shape[-1] * x.shape[-1])
        # What is beyond a slot's own size adds its zeros to the first place.
        change = change.scatter_add(1, p["places"].long(), values).unflatten(1, (y.shape[-1], x.shape[-1]))
        return y + x @ change.mT

    def merge(self, p, weight, bias):
        change = weight.new_zeros(weight.numel()).scatter(0, p["places"].long(), (self.scale * p["S"]).to(weight))
        return weight + change.view_as(weight), bias
