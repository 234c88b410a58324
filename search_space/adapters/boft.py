"""BOFT: a product of block rotations of a linear layer's input between permutations, as in a butterfly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import check_at_least
from autopeft.search_space.adapters.linear_operators import InputOperator, bias_of, nearest_divisor
from autopeft.search_space.adapters.oft import cayley, turn_blocks
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Boft(InputOperator):
    """s * (W T x) + b, where T is the transpose of the product C_m ... C_2 C_1 of `factors` orthogonal matrices.

    C_i = P_i diag(R_1, ..., R_n) P_i^T, with R as in OFT, from the skew-symmetric part of its R: [m, n, B, B]. P_i
    moves the features so that a block has two halves of B / 2 neighbours, 2^(i-2) * B features apart (i = 1: the
    identity). After m factors each feature reads 2^(m-1) * B others. R starts at zero and s: [D_out] at one, which is
    the identity. The size B of the blocks is the divisor of D_in nearest to `block_size`, even for several factors; as
    many factors are used as D_in can be divided for. With one factor it is OFT with twice the parameters, and s.
    """

    kind: ClassVar[str] = "boft"
    can_be_expert: ClassVar[bool] = False  # a router would have to weight the input and the output alike
    needs: ClassVar[str] = "linear layers with an even number of input features, for several factors"
    source: ClassVar[str] = "Liu et al. 2024, Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization"
    summary: ClassVar[str] = "butterfly of rotations of the input, and a scale of the output"

    block_size: int = 4
    factors: int = 1

    def __post_init__(self) -> None:
        InputOperator.__post_init__(self)
        check_at_least("block_size", self.block_size, 2)
        check_at_least("factors", self.factors, 1, 20)

    @property
    @override
    def label(self) -> str:
        return f"boft {self.block_size}" + (f" x {self.factors}" if self.factors > 1 else "")

    def block(self, site: Site) -> int:
        """Return the size of the blocks at `site`; 0 if the features cannot be divided."""
        return nearest_divisor(site.in_features, self.block_size, 1 if self.factors == 1 else 2)

    def num_factors(self, site: Site) -> int:
        """Return the number of factors at `site`."""
        block = self.block(site)
        return max(m for m in range(1, self.factors + 1) if site.in_features % (block << (m - 1)) == 0)

    @override
    def fits(self, site: Site) -> bool:
        return self.block(site) > 0

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        block = self.block(site)
        return {
            "R": Parameter(shape=(self.num_factors(site), site.in_features // block, block, block)),
            "s": Parameter(shape=(site.out_features,), init="ones", decay=False),
        }

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * site.in_features * self.block(site) * self.num_factors(site)

    @override
    def turn(self, p: Values, x: Tensor, mask: Tensor | None) -> Tensor:
        rotations = cayley(0.5 * (p["R"] - p["R"].mT))
        for i in reversed(range(p["R"].shape[1])):
            order = _butterfly(x, p["R"].shape[-1], i)
            x = turn_blocks(x.index_select(-1, order.argsort()), rotations[:, i]).index_select(-1, order)
        return x

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        return y + (y - bias_of(call)) * (p["s"] - 1.0)[:, None, :]

    @override
    def merge(self, p: Values, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return InputOperator.merge(self, p, weight, bias)[0] * p["s"][:, None], bias


def _butterfly(x: Tensor, block: int, level: int) -> Tensor:
    """Return the order of the features x: [..., D] that P of a level has: in each group, even half blocks, then odd."""
    import torch

    features = torch.arange(x.shape[-1], device=x.device)
    if level == 0:
        return features
    # [groups, half blocks / 2, even or odd, B / 2]
    return features.view(-1, 1 << level, 2, block // 2).transpose(1, 2).flatten()
