"""C3A: an update of circulant blocks, which convolutions compute."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
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
class C3a(OutputOperator):
    """y + C x / D_in, where C consists of circulant blocks [B, B]: element (i, j) of a block is w_(j - i mod B).

    w: [D_out / B, D_in / B, B] has the first rows of the blocks and is zero at the start. A block can have full rank
    with only B parameters; the smaller the blocks, the more parameters. The size B is the largest divisor of D_in and
    D_out up to `block_size`. The products are made of Fourier transforms, whose own operations are not counted. Blocks
    of different sizes do not nest, so in a supernet each size has its own weights.
    """

    kind: ClassVar[str] = "c3a"
    source: ClassVar[str] = "Chen et al. 2025, Parameter-Efficient Fine-Tuning via Circular Convolution, section 3"
    summary: ClassVar[str] = "circulant blocks beside a linear layer"

    block_size: int = 256

    def __post_init__(self) -> None:
        OutputOperator.__post_init__(self)
        check_at_least("block_size", self.block_size, 1)

    @property
    @override
    def label(self) -> str:
        return f"c3a {self.block_size}"

    def block(self, site: Site) -> int:
        """Return the size of the blocks at `site`."""
        return max(d for d in divisors(gcd(site.in_features, site.out_features)) if d <= self.block_size)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        size = self.block(site)
        return {"w": Parameter(shape=(site.out_features // size, site.in_features // size, size))}

    @override
    def flops_per_token(self, site: Site) -> int:
        size = self.block(site)
        # For each frequency, a complex product of a vector with a matrix is four real ones.
        return 8 * (size // 2 + 1) * (site.in_features // size) * (site.out_features // size)

    @override
    def act(self, p: Values, x: Tensor, y: Tensor, numbers: Numbers, mask: Tensor | None) -> Tensor:
        import torch

        size = p["w"].shape[-1]
        inputs = torch.fft.rfft(x.unflatten(-1, (-1, size)))  # [K, M, n, F]
        rows = torch.fft.rfft(p["w"]) / x.shape[-1]  # [K, m, n, F]
        # (a + bi) (c - di) = (a c + b d) + (b c - a d) i
        parts = torch.cat([inputs.real, inputs.imag], 2)
        real = torch.cat([rows.real, rows.imag], 2)
        imaginary = torch.cat([-rows.imag, rows.real], 2)
        found = torch.einsum("ktnf,kmnf->ktmf", parts, torch.cat([real, imaginary], 1))
        change: Tensor = torch.fft.irfft(torch.complex(*found.chunk(2, 2)), n=size)
        return y + change.flatten(2)
