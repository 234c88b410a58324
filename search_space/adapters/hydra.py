"""Hydra: a low-rank update beside a linear layer and another one after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import check_at_least
from autopeft.search_space.adapters.linear_operators import Numbers, OutputOperator, bias_of
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Hydra(OutputOperator):
    """y + alpha / R * (B A x + D C W x).

    A: [R, D_in] and C: [R, D_out] are random, B and D: [D_out, R] are zero at the start. The sequential branch D C
    combines features that W has learnt; the parallel branch B A, which is a LoRA, adds new ones. The bias passes both.
    """

    kind: ClassVar[str] = "hydra"
    size_field: ClassVar[str | None] = "rank"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("alpha",)
    source: ClassVar[str] = "Kim et al. 2024, Hydra: Multi-head Low-rank Adaptation, section 3"
    summary: ClassVar[str] = "low-rank updates beside and after a linear layer"

    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        OutputOperator.__post_init__(self)
        check_at_least("rank", self.rank, 1)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        return {
            "A": Parameter(shape=(self.rank, site.in_features), init="kaiming"),
            "B": Parameter(shape=(site.out_features, self.rank)),
            "C": Parameter(shape=(self.rank, site.out_features), init="kaiming"),
            "D": Parameter(shape=(site.out_features, self.rank)),
        }

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * self.rank * (site.in_features + 3 * site.out_features)

    @override
    def numbers(self, in_features: int, out_features: int) -> dict[str, float]:
        return {"scale": self.alpha / self.rank}

    @override
    def act(self, p: Values, x: Tensor, y: Tensor, numbers: Numbers, mask: Tensor | None) -> Tensor:
        factor = numbers["scale"][:, None, None]
        if mask is not None:
            factor = factor * mask[:, None, :]
        return y + (x @ p["A"].mT * factor) @ p["B"].mT + (y @ p["C"].mT * factor) @ p["D"].mT

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        bias = bias_of(call)
        return self.act(p, x, y - bias, call.constants, call.mask) + bias

    @override
    def merge(self, p: Values, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return OutputOperator.merge(self, p, weight, None)[0], bias
