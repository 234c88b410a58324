"""VeRA: a low-rank update of random matrices that all sites share, and vectors that scale it at each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from autopeft.search_space.adapters.base import AdapterSpec, check_at_least, check_probability
from autopeft.search_space.backbones.backbone import LINEAR_ROLES
from autopeft.search_space.parameter import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Vera(AdapterSpec):
    """y + b * B (d * A x) with random A: [R, D_in] and B: [D_out, R], which stay as they are; d: [R] starts as
    `d_initial`, b: [D_out] as zeros.

    There is one A and one B for the model, as large as its largest site needs; the others read the first rows and
    columns, as in peft. They follow from `projection_key`, not from a slot's seed: they are the same for all slots, and
    no part of what is stored.
    """

    kind: ClassVar[str] = "vera"
    roles: ClassVar[tuple[str, ...]] = LINEAR_ROLES
    default_roles: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    size_field: ClassVar[str | None] = "rank"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("dropout", "d_initial")
    mergeable: ClassVar[bool] = True
    repeatable: ClassVar[bool] = False  # a second one would be a copy: nothing of it is random but what they share
    can_be_expert: ClassVar[bool] = False  # for the same reason
    source: ClassVar[str] = "Kopiczko et al. 2024, VeRA, section 3.1"
    summary: ClassVar[str] = "scales of a random low-rank update that all sites share"

    rank: int = 256
    dropout: float = 0.0
    d_initial: float = 0.1
    projection_key: int = 0

    def __post_init__(self) -> None:
        check_at_least("rank", self.rank, 1)
        check_probability("dropout", self.dropout)
        check_at_least("projection_key", self.projection_key, 0)

    def parameters(self, site):
        def shared(*shape: int) -> Parameter:
            return Parameter(shape=shape, init="he", trainable=False, scope="model", key=self.projection_key)

        return {
            "d": Parameter(shape=(self.rank,), init=float(self.d_initial), decay=False),
            "b": Parameter(shape=(site.out_features,), decay=False),
            "A": shared(self.rank, site.in_features),
            "B": shared(site.out_features, self.rank),
        }

    def flops_per_token(self, site):
        return 2 * self.rank * (site.in_features + site.out_features)

    def apply(self, p, x, y, call):
        # Where slots differ in size, A and B are zero beyond a slot's own, or a supernet's, which the mask cuts.
        d = p["d"] if call.mask is None else p["d"] * call.mask
        inner = call.dropout(x) @ p["A"].mT * d[:, None]
        return y + inner @ p["B"].mT * p["b"][:, None]

    def merge(self, p, weight, bias):
        return weight + (p["b"][:, None] * p["B"]) @ (p["d"][:, None] * p["A"]), bias
