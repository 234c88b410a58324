"""DeLoRA: a low-rank update whose strength is a trained number apart from its direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import check_at_least, check_probability
from autopeft.search_space.adapters.linear_operators import Numbers, OutputOperator
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Delora(OutputOperator):
    """y + B D A (n * x), where D is diagonal: lambda / (R |a_i| |b_i|) for the i-th row of A and column of B.

    n: [D_in] are the norms of the columns of W and fixed, so lambda: [1], which is trained from `strength` on, bounds
    the change relative to W. A: [R, D_in] is random and B: [D_out, R] zero at the start; norms count as at least 1e-4.
    """

    kind: ClassVar[str] = "delora"
    size_field: ClassVar[str | None] = "rank"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("strength", "dropout")
    source: ClassVar[str] = "Bini et al. 2025, DeLoRA: Decoupling Angles and Strength in Low-Rank Adaptation, section 3"
    summary: ClassVar[str] = "low-rank update of bounded strength"

    rank: int = 8
    strength: float = 15.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        OutputOperator.__post_init__(self)
        check_at_least("rank", self.rank, 1)
        check_at_least("strength", self.strength, 0.0)
        check_probability("dropout", self.dropout)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        return {
            "A": Parameter(shape=(self.rank, site.in_features), init="kaiming"),
            "B": Parameter(shape=(site.out_features, self.rank)),
            "lambda": Parameter(shape=(1,), init=float(self.strength), decay=False),
            "n": Parameter(shape=(site.in_features,), init="column_norm", trainable=False),
        }

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * self.rank * (site.in_features + site.out_features)

    @override
    def numbers(self, in_features: int, out_features: int) -> dict[str, float]:
        return {"rank": float(self.rank)}

    @override
    def act(self, p: Values, x: Tensor, y: Tensor, numbers: Numbers, mask: Tensor | None) -> Tensor:
        norms = p["A"].norm(dim=2).clamp_min(1e-4) * p["B"].norm(dim=1).clamp_min(1e-4)
        scale = p["lambda"] / numbers["rank"][:, None] / norms  # [K, R]
        if mask is not None:
            scale = scale * mask
        inner = (x * p["n"][:, None]) @ p["A"].mT
        change: Tensor = (inner * scale[:, None]) @ p["B"].mT
        return y + change
