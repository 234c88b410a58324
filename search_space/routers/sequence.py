"""One choice of experts per text, from the mean of its tokens."""

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


class Sequence(Router):
    """Like "token", with z = W_r times the mean of x over the text without padding."""

    name: ClassVar[str] = "sequence"
    source: ClassVar[str] = "Fedus et al. 2022, Switch Transformers, section 2.1, for the mean of a text"
    summary: ClassVar[str] = "softmax over the experts for each text"
    uses: ClassVar[tuple[str, ...]] = ("top_k", "top_p", "router_noise", "balance", "z_loss")
    per_text: ClassVar[bool] = True
    reads_ahead: ClassVar[bool] = True

    @override
    def parameters(self, mixture: RoutedSpec, site: Site) -> dict[str, Parameter]:
        return {"router": one_row_each(mixture, site.in_features)}

    @override
    def logits(self, mixture: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
        from autopeft.search_space.routers.mixing import product

        texts, mask = call.router.tokens.by_text(x), call.router.tokens.mask
        if mask is None:
            mean = texts.mean(2)
        else:
            counted = mask.to(x)
            mean = (texts * counted[..., None]).sum(2) / counted.sum(-1, keepdim=True).clamp(min=1)
        return product(p["router"].to(x.dtype), mean)
