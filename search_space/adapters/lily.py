"""Lily: low-rank updates with a projection of each site, and expansions that sites share and that a router mixes."""

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
class Lily(AdapterSpec):
    """y + scale * sum_e g_e B_e h, with h = A x and the gates g = softmax(G h) of each token.

    A: [R, D_in] and the router G: [E, R] belong to the site (peft's `stride_A` of 1). The expansions B: [E, D_out, R],
    zero at the start, are shared by all sites of the same role and features, so each layer can use what others learn.

    peft averages the gates over the tokens of all texts of a batch; with that, a prediction depends on the other texts
    and on later tokens. Here each token has its own gates, which is the same for one token.
    """

    kind: ClassVar[str] = "lily"
    roles: ClassVar[tuple[str, ...]] = LINEAR_ROLES
    default_roles: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    size_field: ClassVar[str | None] = "rank"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("scale",)
    can_be_expert: ClassVar[bool] = False  # it mixes experts itself, and the experts would share them
    source: ClassVar[str] = "Zhong et al. 2024, Low-Rank Interconnected Adaptation Across Layers (Lily), section 3"
    summary: ClassVar[str] = "low-rank update whose second factor is mixed of experts that layers share"

    rank: int = 16
    expansions: int = 4
    scale: float = 1.0

    def __post_init__(self) -> None:
        AdapterSpec.__post_init__(self)
        check_at_least("rank", self.rank, 1)
        check_at_least("expansions", self.expansions, 1)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        return {
            "A": Parameter(shape=(self.rank, site.in_features), init="kaiming"),
            "G": Parameter(shape=(self.expansions, self.rank), init="kaiming"),
            "B": Parameter(shape=(self.expansions, site.out_features, self.rank), scope="role"),
        }

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * self.rank * (site.in_features + self.expansions * (1 + site.out_features))

    @override
    def constants(self, site: Site) -> dict[str, Any]:
        return {"scale": float(self.scale)}

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        inner = x @ p["A"].mT  # [K, M, R]
        if call.mask is not None:
            inner = inner * call.mask[:, None]
        gates = (inner @ p["G"].mT).softmax(-1) * call.constants["scale"][:, None, None]  # [K, M, E]
        expansions = p["B"].mT.flatten(1, 2)  # [K, E R, D_out]
        return y + (gates[..., None] * inner[:, :, None]).flatten(2) @ expansions
