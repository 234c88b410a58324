"""MiSS: an update that adds all groups of inputs up and expands the sum by one matrix."""

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
class Miss(OutputOperator):
    """y + D s, where s_j is the sum of all inputs x_i with i mod R = j, and D: [D_out, R] is zero at the start.

    The update repeats D along the inputs: its rank is R, with half the parameters of a LoRA or fewer. An adapter of
    another rank adds other inputs up; in a supernet it reads the first columns of D.
    """

    kind: ClassVar[str] = "miss"
    size_field: ClassVar[str | None] = "rank"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("dropout",)
    needs: ClassVar[str] = "linear layers with at least as many input features as its rank"
    source: ClassVar[str] = "Kang and Yin 2025, MiSS: Revisiting the Trade-off in LoRA with Shard Sharing"
    summary: ClassVar[str] = "one matrix that all groups of inputs share"

    rank: int = 16
    dropout: float = 0.0

    def __post_init__(self) -> None:
        OutputOperator.__post_init__(self)
        check_at_least("rank", self.rank, 1)
        check_probability("dropout", self.dropout)

    @override
    def fits(self, site: Site) -> bool:
        return self.rank <= site.in_features

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        return {"D": Parameter(shape=(site.out_features, self.rank))}

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * self.rank * site.out_features

    @override
    def numbers(self, in_features: int, out_features: int) -> dict[str, float]:
        return {"rank": float(self.rank)}

    @override
    def act(self, p: Values, x: Tensor, y: Tensor, numbers: Numbers, mask: Tensor | None) -> Tensor:
        import torch
        import torch.nn.functional as F

        rank = p["D"].shape[-1]
        if mask is None:
            sums: Tensor = F.pad(x, (0, -x.shape[-1] % rank)).unflatten(-1, (-1, rank)).sum(-2)
        else:  # slots have ranks of their own
            places = torch.arange(x.shape[-1], device=x.device) % numbers["rank"].long()[:, None]
            sums = x.new_zeros(*x.shape[:2], rank).scatter_add(-1, places[:, None].expand_as(x), x)
        return y + sums @ p["D"].mT
