"""OFT: orthogonal rotations of blocks of a linear layer's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import check_at_least
from autopeft.search_space.adapters.linear_operators import InputOperator, nearest_divisor
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Oft(InputOperator):
    """W diag(R_1, ..., R_n)^T x + b, where R_i = (I - S_i) (I + S_i)^-1: [B, B] is orthogonal and S_i skew-symmetric.

    Q: [n, B (B - 1) / 2] has the elements of the S_i above the diagonal. They start at zero, which is the identity. The
    size B of the blocks is the divisor of D_in nearest to `block_size`, as in peft; more than 1. Larger blocks have
    more parameters. Blocks of different sizes do not nest, so in a supernet each size has its own weights.
    """

    kind: ClassVar[str] = "oft"
    source: ClassVar[str] = "Qiu et al. 2023, Controlling Text-to-Image Diffusion by Orthogonal Finetuning, section 3.3"
    summary: ClassVar[str] = "orthogonal rotations of blocks of the input"

    block_size: int = 32

    def __post_init__(self) -> None:
        InputOperator.__post_init__(self)
        check_at_least("block_size", self.block_size, 2)

    @property
    @override
    def label(self) -> str:
        return f"oft {self.block_size}"

    def block(self, site: Site) -> int:
        """Return the size of the blocks at `site`."""
        return nearest_divisor(site.in_features, self.block_size)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        size = self.block(site)
        return {"Q": Parameter(shape=(site.in_features // size, size * (size - 1) // 2))}

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * site.in_features * self.block(site)

    @override
    def turn(self, p: Values, x: Tensor, mask: Tensor | None) -> Tensor:
        import torch

        blocks = p["Q"].shape[1]
        size = x.shape[-1] // blocks
        rows, columns = torch.triu_indices(size, size, 1, device=x.device)
        upper = x.new_zeros(len(x), blocks, size, size)
        upper[..., rows, columns] = p["Q"]
        return turn_blocks(x, cayley(upper - upper.mT))


def cayley(skew: Tensor) -> Tensor:
    """Return the orthogonal matrices (I - S) (I + S)^-1 of skew-symmetric ones. skew: [..., B, B]."""
    import torch

    unit = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype)
    rotations: Tensor = torch.linalg.solve(unit + skew, unit - skew, left=False)
    return rotations


def turn_blocks(x: Tensor, rotations: Tensor) -> Tensor:
    """Return the product of each block of the rows x: [K, M, D] with its matrix. rotations: [K, n, B, B]."""
    import torch

    parts = x.unflatten(-1, rotations.shape[1:3])
    turned: Tensor = torch.einsum("kmnb,knbc->kmnc", parts, rotations)
    return turned.flatten(2)
