"""LoKr: an update that is the Kronecker product of a small matrix and a low-rank one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import check_at_least
from autopeft.search_space.adapters.linear_operators import Numbers, OutputOperator, divisors
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Lokr(OutputOperator):
    """y + alpha / R * (C kron (B A)) x.

    C: [O, I] is zero, B: [D_out / O, R] and A: [R, D_in / I] are random at the start. O and I are `factor` where it
    divides the features; else, as for -1, the largest divisor up to the square root (and to a positive `factor`). The
    product is never made: x is divided into I parts, on each of which B A acts, and C mixes the results.
    """

    kind: ClassVar[str] = "lokr"
    size_field: ClassVar[str | None] = "rank"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("alpha",)
    source: ClassVar[str] = "Yeh et al. 2024, Navigating Text-To-Image Customization (LyCORIS)"
    summary: ClassVar[str] = "Kronecker product of a small and a low-rank matrix"

    rank: int = 8
    alpha: float = 8.0
    factor: int = -1

    def __post_init__(self) -> None:
        OutputOperator.__post_init__(self)
        check_at_least("rank", self.rank, 1)
        if self.factor != -1:
            check_at_least("factor", self.factor, 1)

    def parts(self, features: int) -> int:
        """Return the number of parts that features are divided into."""
        if self.factor > 0 and features % self.factor == 0:
            return self.factor
        most = int(features**0.5) if self.factor == -1 else min(self.factor, int(features**0.5))
        return max(d for d in divisors(features) if d <= most)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        out, inner = self.parts(site.out_features), self.parts(site.in_features)
        return {
            "C": Parameter(shape=(out, inner)),
            "B": Parameter(shape=(site.out_features // out, self.rank), init="kaiming"),
            "A": Parameter(shape=(self.rank, site.in_features // inner), init="kaiming"),
        }

    @override
    def flops_per_token(self, site: Site) -> int:
        out, inner = self.parts(site.out_features), self.parts(site.in_features)
        factors = site.in_features + inner * site.out_features // out
        return 2 * (self.rank * factors + inner * site.out_features)

    @override
    def numbers(self, in_features: int, out_features: int) -> dict[str, float]:
        return {"scale": self.alpha / self.rank}

    @override
    def act(self, p: Values, x: Tensor, y: Tensor, numbers: Numbers, mask: Tensor | None) -> Tensor:
        import torch

        scale = numbers["scale"][:, None, None]
        b = p["B"] * (scale if mask is None else scale * mask[:, None, :])
        parts = x.unflatten(-1, (p["C"].shape[-1], -1)).flatten(1, 2)  # [K, M * I, D_in / I]
        inner = (parts @ p["A"].mT @ b.mT).unflatten(1, (x.shape[1], -1))  # [K, M, I, D_out / O]
        return y + torch.einsum("kmib,koi->kmob", inner, p["C"]).flatten(2)
