"""FLoRA: an update by a small core matrix between two factors, a Tucker decomposition of two modes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import AdapterSpec, check_at_least, check_one_of, check_probability
from autopeft.search_space.adapters.low_rank import LowRank
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Flora(LowRank):
    """y + scale * B G A x, where the core G: [R, R] is zero at the start.

    A: [R, D_in] and B: [D_out, R] are random, and trained too, or fixed (`factors: frozen`). Fixed ones are drawn from
    `factors_key` and not stored, so that only R^2 numbers per site are trained and stored.
    """

    kind: ClassVar[str] = "flora"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("scale", "dropout")
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
        check_one_of("factors", self.factors, ("trained", "frozen"))
        check_at_least("factors_key", self.factors_key, 0, 2**63 - 1)
        check_probability("dropout", self.dropout)

    @override
    def canonical(self) -> Flora:
        return replace(self, factors_key=0) if self.factors == "trained" else self

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        def factor(*shape: int) -> Parameter:
            trained = self.factors == "trained"
            return Parameter(shape=shape, init="kaiming", trainable=trained, key=None if trained else self.factors_key)

        return {
            "G": Parameter(shape=(self.rank, self.rank)),
            "A": factor(self.rank, site.in_features),
            "B": factor(site.out_features, self.rank),
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
