"""GraLoRA: a grid of small low-rank updates, one for each block of a weight."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import check_at_least, check_probability
from autopeft.search_space.adapters.linear_operators import Numbers, OutputOperator, divisors
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Gralora(OutputOperator):
    """y + alpha / (n R) * C x, where the block (i, j) of the n x n blocks of C is B_ij A_ij, of rank R.

    A: [n, n, R, D_in / n] is random and B: [n, n, D_out / n, R] zero at the start. It has the parameters and operations
    of a LoRA of rank n R; the rank of C is n^2 R at most. n is the largest divisor of D_in and D_out up to `blocks`.
    """

    kind: ClassVar[str] = "gralora"
    size_field: ClassVar[str | None] = "rank"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("alpha", "dropout")
    source: ClassVar[str] = "Jung et al. 2025, GraLoRA: Granular Low-Rank Adaptation"
    summary: ClassVar[str] = "low-rank updates of the blocks of a weight"

    rank: int = 8
    alpha: float = 32.0
    blocks: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        OutputOperator.__post_init__(self)
        check_at_least("rank", self.rank, 1)
        check_at_least("blocks", self.blocks, 1)
        check_probability("dropout", self.dropout)

    @property
    @override
    def label(self) -> str:
        return f"gralora {self.blocks} x {self.rank}"

    def grid(self, in_features: int, out_features: int) -> int:
        """Return the number n of blocks along each side."""
        return max(d for d in divisors(gcd(in_features, out_features)) if d <= self.blocks)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        n = self.grid(site.in_features, site.out_features)
        return {
            "A": Parameter(shape=(n, n, self.rank, site.in_features // n), init="kaiming"),
            "B": Parameter(shape=(n, n, site.out_features // n, self.rank)),
        }

    @override
    def flops_per_token(self, site: Site) -> int:
        n = self.grid(site.in_features, site.out_features)
        return 2 * n * self.rank * (site.in_features + site.out_features)

    @override
    def numbers(self, in_features: int, out_features: int) -> dict[str, float]:
        return {"scale": self.alpha / (self.grid(in_features, out_features) * self.rank)}

    @override
    def act(self, p: Values, x: Tensor, y: Tensor, numbers: Numbers, mask: Tensor | None) -> Tensor:
        import torch

        scale = numbers["scale"][:, None, None, None, None]
        b = p["B"] * (scale if mask is None else scale * mask[:, None, None, None])
        inner = torch.einsum("kmjd,kijrd->kmijr", x.unflatten(-1, (p["A"].shape[2], -1)), p["A"])
        return y + torch.einsum("kmijr,kijer->kmie", inner, b).flatten(2)
