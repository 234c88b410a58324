"""Routing between pretrained LoRAs by the last hidden states of a first pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter
from autopeft.search_space.routers.base import Router, one_bias_each, one_row_each

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values
    from autopeft.search_space.routers.mixing import RoutedSpec


class XLora(Router):
    """softmax(z) over all experts, which are pretrained LoRAs, with z = W_r h + b, W_r: [E, H].

    h is the last hidden state of the token in a first pass through the model without adapters. In peft's terms, this is
    a classifier of depth 1 with layerwise scalings.
    """

    name: ClassVar[str] = "xlora"
    source: ClassVar[str] = "Buehler and Buehler 2024, X-LoRA"
    summary: ClassVar[str] = "between pretrained LoRAs, by the hidden states of a first pass"
    uses: ClassVar[tuple[str, ...]] = ("router_noise",)
    between_given: ClassVar[bool] = True
    first_pass: ClassVar[bool] = True
    can_lead: ClassVar[bool] = False

    @override
    def fits(self, mixture: RoutedSpec, site: Site) -> bool:
        return bool(site.hidden_size)

    @override
    def parameters(self, mixture: RoutedSpec, site: Site) -> dict[str, Parameter]:
        return {"router": one_row_each(mixture, site.hidden_size), "router_bias": one_bias_each(mixture)}

    @override
    def own_flops_per_token(self, mixture: RoutedSpec, site: Site) -> int:
        return 2 * mixture.experts * site.hidden_size

    @override
    def logits(self, mixture: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
        weight = p["router"].to(x.dtype)
        states: Tensor = call.router.tokens.hidden_states().to(x.dtype).flatten(0, 1)
        return weight @ states.mT + p["router_bias"].to(x.dtype)[..., None]
