"""Routing between pretrained LoRAs by the directions to which they respond most."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.routers.base import Router

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values
    from autopeft.search_space.routers.mixing import RoutedSpec


class Arrow(Router):
    """Like "token", with z_e = |v_e x|, where v_e is the first right singular vector of the expert's B A.

    The LoRAs are pretrained, and nothing is trained.
    """

    name: ClassVar[str] = "arrow"
    source: ClassVar[str] = "Ostapenko et al. 2024, Towards Modular LLMs, section 4.2"
    summary: ClassVar[str] = "between pretrained LoRAs, by their singular vectors"
    uses: ClassVar[tuple[str, ...]] = ("top_k", "top_p", "router_noise")
    between_given: ClassVar[bool] = True

    @override
    def own_flops_per_token(self, mixture: RoutedSpec, site: Site) -> int:
        return 2 * mixture.experts * site.in_features

    @override
    def logits(self, mixture: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
        cached: dict[str, Tensor] = call.router.cached
        if "arrows" not in cached:  # the LoRAs are frozen
            cached["arrows"] = arrows(p["A"], p["B"])
        return (cached["arrows"].to(x.dtype) @ x.mT).abs()


def arrows(a: Tensor, b: Tensor) -> Tensor:
    """Return the first right singular vector of each B A, or zero if B A = 0.

    a: [..., R, D_in], b: [..., D_out, R]. Returns [..., D_in].
    """
    import torch

    # B A = B L Q, where Q has orthonormal rows: Q maps the singular vectors of the small B L to those of B A.
    q, lower = torch.linalg.qr(a.mT.float())
    _, size, right = torch.linalg.svd(b.float() @ lower.mT, full_matrices=False)
    first = (right[..., :1, :] @ q.mT).squeeze(-2)
    found: Tensor = (first * (size[..., :1] > 0)).to(a.dtype)
    return found
