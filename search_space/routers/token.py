"""A softmax over the experts for each token."""

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


class Token(Router):
    """softmax(z) of the largest `top_k`, scaled to sum to 1, with z = W_r x, W_r: [E, D_in].

    With `top_p` below 1, a token uses the smallest number of these experts whose probabilities sum to `top_p` (Huang et
    al. 2024, Harder Tasks Need More Experts, section 2.2). A single expert has its probability as its gate, so that the
    router has a gradient (Fedus et al. 2022, Switch Transformers, section 2.1). With pretrained LoRAs, this is MeteoRA.
    """

    name: ClassVar[str] = "token"
    source: ClassVar[str] = "Fedus et al. 2022, Switch Transformers, section 2.1"
    summary: ClassVar[str] = "softmax over the experts for each token"
    uses: ClassVar[tuple[str, ...]] = ("top_k", "top_p", "router_noise", "balance", "z_loss")

    @override
    def parameters(self, mixture: RoutedSpec, site: Site) -> dict[str, Parameter]:
        return {"router": one_row_each(mixture, site.in_features)}

    @override
    def own_flops_per_token(self, mixture: RoutedSpec, site: Site) -> int:
        return 2 * mixture.experts * site.in_features

    @override
    def logits(self, mixture: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
        from autopeft.search_space.routers.mixing import product

        return product(p["router"].to(x.dtype), x)
