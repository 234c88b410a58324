"""MultiLoRA: several low-rank updates of a linear layer, each with a trained scale."""

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
class MultiLora(OutputOperator):
    """y + alpha / R * sum_i s_i * (B_i A_i x), with n branches i and a scale s_i for each output.

    A: [n, R, D_in] and B: [n, D_out, R] are random by the same rule, so that no branch starts with one side at zero.
    s: [n, D_out] starts at zero, so the adapter starts as the identity.
    """

    kind: ClassVar[str] = "multilora"
    size_field: ClassVar[str | None] = "rank"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("alpha", "dropout")
    source: ClassVar[str] = "Wang et al. 2023, MultiLoRA, section 4"
    summary: ClassVar[str] = "several low-rank updates with trained scales"

    rank: int = 8
    alpha: float = 16.0
    branches: int = 3
    dropout: float = 0.0

    def __post_init__(self) -> None:
        OutputOperator.__post_init__(self)
        check_at_least("rank", self.rank, 1)
        check_at_least("branches", self.branches, 1)
        check_probability("dropout", self.dropout)

    @property
    @override
    def label(self) -> str:
        return f"multilora {self.branches} x {self.rank}"

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        n = self.branches
        return {
            "A": Parameter(shape=(n, self.rank, site.in_features), init="kaiming"),
            "B": Parameter(shape=(n, site.out_features, self.rank), init="kaiming"),
            "s": Parameter(shape=(n, site.out_features), decay=False),
        }

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * self.branches * self.rank * (site.in_features + site.out_features)

    @override
    def numbers(self, in_features: int, out_features: int) -> dict[str, float]:
        return {"scale": self.alpha / self.rank}

    @override
    def act(self, p: Values, x: Tensor, y: Tensor, numbers: Numbers, mask: Tensor | None) -> Tensor:
        # The branches side by side are one update of rank n R.
        b = p["B"] * p["s"][..., None] * numbers["scale"][:, None, None, None]
        if mask is not None:
            b = b * mask[:, None, None]
        change: Tensor = x @ p["A"].flatten(1, 2).mT @ b.movedim(1, 2).flatten(2).mT
        return y + change
