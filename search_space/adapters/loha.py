"""LoHa: an update that is the product, element by element, of two low-rank matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import check_at_least
from autopeft.search_space.adapters.linear_operators import Numbers, OutputOperator
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Loha(OutputOperator):
    """y + alpha / R * ((B1 A1) * (B2 A2)) x, where * is the product by elements; its rank is R^2 at most.

    B1, B2: [D_out, R] and A1: [R, D_in] are random, A2: [R, D_in] is zero at the start. The forward pass makes the
    update dense, so an adapter that is not merged costs as much as W.
    """

    kind: ClassVar[str] = "loha"
    size_field: ClassVar[str | None] = "rank"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("alpha",)
    can_be_expert: ClassVar[bool] = False  # a dense weight per expert would enlarge the model
    source: ClassVar[str] = "Hyeon-Woo et al. 2022, FedPara, proposition 1; Yeh et al. 2024, LyCORIS"
    summary: ClassVar[str] = "product of two low-rank updates by elements"

    rank: int = 8
    alpha: float = 8.0

    def __post_init__(self) -> None:
        OutputOperator.__post_init__(self)
        check_at_least("rank", self.rank, 1)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        out, inner = (site.out_features, self.rank), (self.rank, site.in_features)
        return {
            "B1": Parameter(shape=out, init="kaiming"),
            "A1": Parameter(shape=inner, init="kaiming"),
            "B2": Parameter(shape=out, init="kaiming"),
            "A2": Parameter(shape=inner),
        }

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * site.in_features * site.out_features

    @override
    def numbers(self, in_features: int, out_features: int) -> dict[str, float]:
        return {"scale": self.alpha / self.rank}

    @override
    def act(self, p: Values, x: Tensor, y: Tensor, numbers: Numbers, mask: Tensor | None) -> Tensor:
        first, second = p["B1"] * numbers["scale"][:, None, None], p["B2"]
        if mask is not None:
            first, second = first * mask[:, None, :], second * mask[:, None, :]
        return y + x @ ((first @ p["A1"]) * (second @ p["A2"])).mT
