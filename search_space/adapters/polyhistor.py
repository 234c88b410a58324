"""Polyhistor: bottlenecks of low-rank templates, which shared networks make, stretched by a small kernel per site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import check_at_least
from autopeft.search_space.adapters.bottlenecks import BlockBottleneck, Layers, kronecker
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Polyhistor(BlockBottleneck):
    """A bottleneck of s R units (see `bottlenecks.py`), each projection of which is K kron (P Q).

    K: [s, s], the scaling kernel, and the biases belong to the site. The template P Q has the rank r: two networks,
    which all sites share, make P and Q of the site's embedding e: [t]. They are linear and low-rank by this product:
    [R, r, t] and [r, D / s, t] down, [D / s, r, t] and [r, R, t] up. s is the largest divisor of the features up to
    `blocks`. K starts as orthogonal down and as zero up: the identity.

    The paper feeds embeddings of several tasks, trained at once; here is one task, and e stands for it and for the
    layer. Its other parts are for images: kernels of different size for the scales of a hierarchical model.
    """

    kind: ClassVar[str] = "polyhistor"
    default_roles: ClassVar[tuple[str, ...]] = ("attn", "mlp")
    can_be_expert: ClassVar[bool] = False  # experts would share the networks
    source: ClassVar[str] = "Liu et al. 2022, Polyhistor, section 4"
    summary: ClassVar[str] = "bottleneck of low-rank templates, made by shared networks, and a small kernel per site"

    rank: int = 4
    embedding: int = 16

    def __post_init__(self) -> None:
        BlockBottleneck.__post_init__(self)
        for name in ("rank", "embedding"):
            check_at_least(name, getattr(self, name), 1)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        s, into, out = self.grid(site), self.width(site), site.out_features

        def shared(rows: int, columns: int, init: str) -> Parameter:
            return Parameter(shape=(rows, columns, self.embedding), init=init, scope="model")

        return {
            "e": Parameter(shape=(self.embedding,), init="normal", decay=False),
            "down_kernel": Parameter(shape=(s, s), init="orthogonal"),
            "down_bias": Parameter(shape=(s, self.size), decay=False),
            "up_kernel": Parameter(shape=(s, s)),
            "up_bias": Parameter(shape=(out,), decay=False),
            "down_P": shared(self.size, self.rank, "kaiming"),
            "down_Q": shared(self.rank, into // s, "houlsby"),
            "up_P": shared(out // s, self.rank, "houlsby"),
            "up_Q": shared(self.rank, self.size, "kaiming"),
        }

    @override
    def layers(self, p: Values) -> Layers:
        down, up = (_stretched(p[f"{name}_kernel"], p[f"{name}_P"], p[f"{name}_Q"], p["e"]) for name in ("down", "up"))
        return Layers(down, p["down_bias"].flatten(1), up, p["up_bias"])


def _stretched(kernel: Tensor, p: Tensor, q: Tensor, e: Tensor) -> Tensor:
    """Return kernel kron ((p e) (q e)).

    kernel: [K, s, s], p: [K, A, r, t], q: [K, r, B, t], e: [K, t]. Returns [K, s A, s B].
    """
    import torch

    p, q = (torch.einsum("kxyt,kt->kxy", tensor, e) for tensor in (p, q))
    return kronecker(kernel[:, None], (p @ q)[:, None])
