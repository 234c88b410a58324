"""One LoRA for every domain of the data, mixed from the matrices of the experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter
from autopeft.search_space.routers.base import Router, one_row_each

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call
    from autopeft.search_space.routers.mixing import RoutedSpec, Values


class Poly(Router):
    """LoRAs' A and B themselves are mixed for each of the `tasks`, which are the data's domains.

    The shares are sigmoids of W_r: [E, tasks, heads], scaled to sum to 1 over the experts. With several `heads`, blocks
    of x and y have shares of their own. One head: Ponti et al. 2022, Polytropon, section 3.
    """

    name: ClassVar[str] = "poly"
    source: ClassVar[str] = "Caccia et al. 2023, Multi-Head Adapter Routing, section 3.1"
    summary: ClassVar[str] = "matrices of LoRAs mixed for every domain"
    uses: ClassVar[tuple[str, ...]] = ("tasks", "heads")
    has_gates: ClassVar[bool] = False
    can_lead: ClassVar[bool] = False
    mixes_parameters: ClassVar[bool] = True

    @override
    def fits(self, mixture: RoutedSpec, site: Site) -> bool:
        return site.in_features % mixture.heads == 0 and site.out_features % mixture.heads == 0

    @override
    def parameters(self, mixture: RoutedSpec, site: Site) -> dict[str, Parameter]:
        return {"router": one_row_each(mixture, mixture.tasks, mixture.heads)}

    @override
    def num_chosen(self, mixture: RoutedSpec) -> int:
        return 1  # the one that they are mixed into

    @override
    def mix(self, mixture: RoutedSpec, p: Values, x: Tensor, y: Tensor | None, call: Call) -> Tensor:
        import torch
        from torch.nn.functional import one_hot

        from autopeft.kernels.mixture_lora import mixture_lora

        owned = call.router.owned_experts[:, :, None, None]
        share = owned.expand_as(p["router"]) if call.router.averaged else p["router"].sigmoid() * owned
        share = share / share.sum(1, keepdim=True)

        def blended(w: Tensor) -> Tensor:
            """Return w: [K, E, R, D] as [K, tasks, R, D], each block of D with the shares of its head."""
            blocks = torch.unflatten(w, -1, (mixture.heads, -1))
            return torch.einsum("keth,kerhd->ktrhd", share, blocks).flatten(-2)

        a, b = blended(p["A"]), blended(p["B"].mT).mT
        # The kernel takes the tasks for experts, of which each token has one.
        texts = one_hot(call.router.tokens.domains_of(mixture.tasks), mixture.tasks).to(x)
        gates = texts.repeat_interleave(call.router.tokens.length, 0).expand(len(x), -1, -1)
        mask = None if call.mask is None else call.mask[:, None].expand(-1, mixture.tasks, -1)
        return mixture_lora(call.dropout(x), a, b, gates, call.constants["scale"], mask, 1)
