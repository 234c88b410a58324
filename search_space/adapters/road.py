"""RoAd: rotations and scales of pairs of a linear layer's output features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import check_at_least
from autopeft.search_space.adapters.linear_operators import Numbers, OutputOperator, nearest_divisor
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Road(OutputOperator):
    """c * y + s * y', where y = W x + b and y' has -y_j at place i and y_i at place j for each pair (i, j) of outputs.

    c = alpha cos(theta) and s = alpha sin(theta). theta starts at zero and alpha at one, which is the identity. The
    variant says how many of both a pair has: 1, which makes it a rotation and a scale; 2, one for each of its outputs;
    or 4, one for each of its elements in c and s. The outputs are divided into groups, and a group's first half is
    paired with its second. The size of the groups is the even divisor of D_out nearest to `group_size`.
    """

    kind: ClassVar[str] = "road"
    needs: ClassVar[str] = "linear layers with an even number of output features"
    source: ClassVar[str] = "Liao and Monz 2024, 3-in-1: 2D Rotary Adaptation, equation 4"
    summary: ClassVar[str] = "rotations and scales of pairs of outputs"

    variant: int = 1
    group_size: int = 64

    def __post_init__(self) -> None:
        OutputOperator.__post_init__(self)
        if self.variant not in (1, 2, 4):
            raise ValueError(f"variant must be 1, 2 or 4, got {self.variant!r}")
        check_at_least("group_size", self.group_size, 2)

    @property
    @override
    def label(self) -> str:
        return f"road {self.variant}"

    def group(self, out_features: int) -> int:
        """Return the size of the groups; 0 if the features cannot be paired."""
        return nearest_divisor(out_features, self.group_size, 2)

    @override
    def fits(self, site: Site) -> bool:
        return self.group(site.out_features) > 0

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        shape = (self.variant * site.out_features // 2,)
        return {"theta": Parameter(shape=shape, decay=False), "alpha": Parameter(shape=shape, init="ones", decay=False)}

    @override
    def flops_per_token(self, site: Site) -> int:
        return 0

    @override
    def act(self, p: Values, x: Tensor, y: Tensor, numbers: Numbers, mask: Tensor | None) -> Tensor:
        import torch

        half = self.group(y.shape[-1]) // 2
        # [K, groups, of c or s, half of the group, element]; one number stands for all that the variant does not tell.
        shape = (-1, 2 if self.variant == 4 else 1, 1 if self.variant == 1 else 2, half)
        theta, alpha = (p[name].unflatten(1, shape) for name in ("theta", "alpha"))
        cosines: Tensor = (alpha * theta.cos())[:, :, 0].expand(-1, -1, 2, -1).flatten(1)
        sines: Tensor = (alpha * theta.sin())[:, :, -1].expand(-1, -1, 2, -1).flatten(1)
        first, second = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        turned: Tensor = torch.stack((-second, first), -2).flatten(2)
        return y * cosines[:, None] + turned * sines[:, None]
