"""HiRA: a product of a weight with a low-rank matrix, element by element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import AdapterSpec, check_at_least, check_one_of, check_probability
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Hira(AdapterSpec):
    """y + (W * (B A)) x, where * is the product by elements.

    At the start, A: [R, D_in] is random and B: [D_out, R] is zero. The change can have the full rank of W. The forward
    pass makes it dense, so an adapter that is not merged costs as much as W, and a quantised W is dequantised.
    """

    kind: ClassVar[str] = "hira"
    roles: ClassVar[tuple[str, ...]] = LINEAR_ROLES
    default_roles: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    size_field: ClassVar[str | None] = "rank"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("dropout", "init")
    mergeable: ClassVar[bool] = True
    can_be_expert: ClassVar[bool] = False  # a dense weight per expert would enlarge the model
    reads_weight: ClassVar[bool] = True
    source: ClassVar[str] = "Huang et al. 2025, HiRA: Parameter-Efficient Hadamard High-Rank Adaptation"
    summary: ClassVar[str] = "low-rank factor of every element of a weight"

    rank: int = 32
    dropout: float = 0.0
    init: str = "kaiming"

    def __post_init__(self) -> None:
        AdapterSpec.__post_init__(self)
        check_at_least("rank", self.rank, 1)
        check_probability("dropout", self.dropout)
        check_one_of("init", self.init, ("kaiming", "gaussian"))

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        return {
            "A": Parameter(shape=(self.rank, site.in_features), init=self.init),
            "B": Parameter(shape=(site.out_features, self.rank)),
        }

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * site.in_features * site.out_features

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        from autopeft.search_space.backbones.linear import weight_of

        b = p["B"] if call.mask is None else p["B"] * call.mask[:, None, :]
        return y + call.dropout(x) @ (weight_of(call.base).to(x.dtype) * (b @ p["A"])).mT

    @override
    def merge(self, p: Values, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + weight * (p["B"] @ p["A"]), bias
