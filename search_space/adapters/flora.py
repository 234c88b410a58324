"""FLoRA: an update by a small core matrix between two factors, a Tucker decomposition of two modes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

from autopeft.search_space.adapters.base import AdapterSpec, check_at_least, check_one_of, check_probability
from autopeft.search_space.adapters.low_rank import LowRank
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Factor, Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values


#: The value of `factors` that reads the weight.
OF_WEIGHT = "svd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flora(LowRank):
    """y + scale * B G A x, where the core G: [R, R] is zero at the start.

    A: [R, D_in] and B: [D_out, R] are random, and trained too, or fixed (`factors: frozen`). Fixed ones are drawn from
    `factors_key` and not stored, so that only R^2 numbers per site are trained and stored.

    With `factors: svd` they are fixed at the leading part of W = U S V: A = V and B = U S (Bałazy et al. 2024, LoRA-XS,
    section 3). These are stored with the core, because signs of singular vectors differ between machines.
    """

    kind: ClassVar[str] = "flora"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("scale", "dropout")
    needs: ClassVar[str] = "with factors svd, linear layers with at least as many inputs and outputs as its rank"
    source: ClassVar[str] = "Si et al. 2025, Maintaining Structural Integrity in Parameter Spaces (FLoRA), section 3"
    summary: ClassVar[str] = "core matrix between two trained or fixed factors"

    rank: int = 8
    scale: float = 1.0
    factors: str = "trained"
    factors_key: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        AdapterSpec.__post_init__(self)
        check_at_least("rank", self.rank, 1)
        check_one_of("factors", self.factors, ("trained", "frozen", OF_WEIGHT))
        check_at_least("factors_key", self.factors_key, 0, 2**63 - 1)
        check_probability("dropout", self.dropout)

    @override
    def canonical(self) -> Flora:
        return self if self.factors == "frozen" else replace(self, factors_key=0)

    @classmethod
    @override
    def strictest(cls, offered: Mapping[str, Collection[object]]) -> dict[str, Any]:
        return {"factors": OF_WEIGHT} if OF_WEIGHT in offered.get("factors", ()) else {}

    @override
    def fits(self, site: Site) -> bool:
        return self.factors != OF_WEIGHT or self.rank <= min(site.in_features, site.out_features)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        def factor(side: Literal["A", "B"], *shape: int) -> Parameter:
            drawn = self.factors != OF_WEIGHT
            return Parameter(
                shape=shape,
                init="kaiming" if drawn else Factor(rule=OF_WEIGHT, side=side, scale=1.0),
                trainable=self.factors == "trained",
                key=self.factors_key if self.factors == "frozen" else None,
            )

        return {
            "G": Parameter(shape=(self.rank, self.rank)),
            "A": factor("A", self.rank, site.in_features),
            "B": factor("B", site.out_features, self.rank),
        }

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * self.rank * (site.in_features + self.rank + site.out_features)

    @property
    @override
    def update_scale(self) -> float:
        return float(self.scale)

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        core = p["G"] * call.constants["scale"][:, None, None]
        if call.mask is not None:
            core = core * call.mask[:, :, None] * call.mask[:, None, :]
        return y + call.dropout(x) @ p["A"].mT @ core.mT @ p["B"].mT

    @override
    def matrices(self, p: Values) -> tuple[Tensor, Tensor]:
        return p["G"] @ p["A"], p["B"]
