"""One LoRA for each domain of the data, mixed from the matrices of the experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter
from autopeft.search_space.routers.base import Router, one_row_each

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values
    from autopeft.search_space.routers.mixing import RoutedSpec


class Poly(Router):
    """Weighted sums of the experts' matrices A and B for each of the `tasks`, which are the domains of the data.

    The weights are sigmoids of W_r: [E, tasks, heads], scaled to sum to 1 over the experts. With several `heads`, each
    block of the features of x and y has its own weights. One head is Ponti et al. 2022, Polytropon, section 3.
    """

    name: ClassVar[str] = "poly"
    source: ClassVar[str] = "Caccia et al. 2023, Multi-Head Adapter Routing, section 3.1"
    summary: ClassVar[str] = "matrices of LoRAs mixed for each domain"
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
        return 1  # the LoRA that the experts are mixed into

    @override
    def mix(self, mixture: RoutedSpec, p: Values, x: Tensor, y: Tensor | None, call: Call) -> Tensor:
        import torch
        from torch.nn.functional import one_hot

        from autopeft.kernels.mixture_lora import mixture_lora

        owned = call.router.owned_experts[:, :, None, None]
        share = owned.expand_as(p["router"]) if call.router.averaged else p["router"].sigmoid() * owned
        share = share / share.sum(1, keepdim=True)

        def blended(w: Tensor) -> Tensor:
            """Return the weighted sums of w: [K, E, R, D] over the experts, [K, tasks, R, D]."""
            blocks = torch.unflatten(w, -1, (mixture.heads, -1))
            return torch.einsum("keth,kerhd->ktrhd", share, blocks).flatten(-2)

        a, b = blended(p["A"]), blended(p["B"].mT).mT
        # For the kernel, each task is an expert, and each token has one of them.
        texts = one_hot(call.router.tokens.domains_of(mixture.tasks), mixture.tasks).to(x)
        gates = texts.repeat_interleave(call.router.tokens.length, 0).expand(len(x), -1, -1)
        mask = None if call.mask is None else call.mask[:, None].expand(-1, mixture.tasks, -1)
        return mixture_lora(call.dropout(x), a, b, gates, call.constants["scale"], mask, 1)
