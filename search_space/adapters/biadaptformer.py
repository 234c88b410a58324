"""Bi-AdaptFormer: bottlenecks whose weights have one bit each."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.bottlenecks import BottleneckForm, Layers
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import NUMBER_BITS, Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Values

#: Half of the values of a normal distribution are this many standard deviations from its mean, or less.
LEVEL = NormalDist().inv_cdf(0.75)


@dataclass(frozen=True, slots=True, kw_only=True)
class BiAdaptFormer(BottleneckForm):
    """y + scale * W_up act(W_down z), where each weight of a unit is m + 0.67 s or m - 0.67 s, by its sign.

    m and s are mean and standard deviation of the D latent weights of the unit, W_down[r, :] or W_up[:, r]; the sign is
    that of a latent weight minus m. The latent weights are trained: their gradient passes the sign unchanged
    (straight-through) and m and s as it should. W_up starts as normal with a standard deviation of 0.001, truncated at
    two: nearly the identity. In the paper, m and s are those of a matrix; those of units let sizes nest.

    `stored_bits` counts a bit for each weight and two numbers for each unit and side, which is what the adapted model
    needs. Files of autopeft have the latent weights as float32, from which training may go on.
    """

    kind: ClassVar[str] = "biadaptformer"
    identity_at_start: ClassVar[bool] = False
    source: ClassVar[str] = "Jie et al. 2023, Revisiting the Parameter Efficiency of Adapters, section 4"
    summary: ClassVar[str] = "two-layer bottleneck with weights of one bit"

    size: int = 32
    form: str = "parallel"

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        into, out = self.width(site), site.out_features
        return {
            "down": Parameter(shape=(self.size, into), init="kaiming", bits=1 + 2 * NUMBER_BITS / into),
            "up": Parameter(shape=(out, self.size), init="tiny_normal", bits=1 + 2 * NUMBER_BITS / out),
        }

    @override
    def layers(self, p: Values) -> Layers:
        down, up = binary(p["down"], -1), binary(p["up"], -2)
        return Layers(down, down.new_zeros(down.shape[:-1]), up, up.new_zeros(up.shape[:-1]))


def binary(latent: Tensor, dim: int) -> Tensor:
    """Return m +- LEVEL * s for each latent weight, with the mean m and the standard deviation s along `dim`."""
    import torch

    mean, deviation = latent.mean(dim, keepdim=True), latent.std(dim, keepdim=True)
    normal = (latent - mean) / (deviation + 1e-5)
    level = torch.full_like(normal, LEVEL).copysign(normal.detach())
    # The difference is zero, with the gradient of `normal`.
    return mean + deviation * (level + (normal - normal.detach()))
