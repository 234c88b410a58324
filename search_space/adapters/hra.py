"""HRA: a product of reflections of a linear layer's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import check_at_least
from autopeft.search_space.adapters.linear_operators import InputOperator
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Hra(InputOperator):
    """W H_1 H_2 ... H_R x + b, where H_i = I - 2 u_i u_i^T / |u_i|^2 reflects the input.

    The product is orthogonal, and differs from the identity by a matrix of rank R. U: [D_in, R] has the u_i as columns.
    R = 2 * `pairs`, because the reflections start in equal pairs, which cancel out. The product is made at once: with
    columns of length 1 and N = U^T U, it is I - U T U^T, where T^-1 is the upper triangle of N with half its diagonal
    (Joffrain et al. 2006, Accumulating Householder Transformations, Revisited).
    """

    kind: ClassVar[str] = "hra"
    size_field: ClassVar[str | None] = "pairs"
    source: ClassVar[str] = "Yuan et al. 2024, Bridging the Gap between LoRA and Orthogonal Fine-Tuning, section 3"
    summary: ClassVar[str] = "reflections of the input"

    pairs: int = 4

    def __post_init__(self) -> None:
        InputOperator.__post_init__(self)
        check_at_least("pairs", self.pairs, 1)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        return {"U": Parameter(shape=(site.in_features, 2 * self.pairs), init="pairs")}

    @override
    def flops_per_token(self, site: Site) -> int:
        return 8 * self.pairs * site.in_features

    @override
    def turn(self, p: Values, x: Tensor, mask: Tensor | None) -> Tensor:
        import torch
        import torch.nn.functional as F

        u = F.normalize(p["U"], dim=1)
        if mask is not None:
            u = u * mask.repeat_interleave(2, 1)[:, None]  # a column of zeros reflects nothing
        half = torch.eye(u.shape[-1], device=u.device, dtype=u.dtype) / 2
        inverse = torch.triu(u.mT @ u, 1) + half
        # T U^T, which does not depend on the tokens
        back: Tensor = torch.linalg.solve_triangular(inverse, u.mT, upper=True)
        return x - x @ back.mT @ u.mT
