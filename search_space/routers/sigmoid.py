"""Sigmoids of the experts for each token, balanced by a bias."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter
from autopeft.search_space.routers.base import one_bias_each
from autopeft.search_space.routers.token import Token

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values
    from autopeft.search_space.routers.mixing import Decision, RoutedSpec


class Sigmoid(Token):
    """sigmoid(z) with the z of `Token`, scaled to sum to 1 over the `top_k` experts with the largest sigmoid(z) + b.

    b is updated from the load of the experts, not from the loss of the task.
    """

    name: ClassVar[str] = "sigmoid"
    source: ClassVar[str] = "Wang et al. 2024, Auxiliary-Loss-Free Load Balancing, section 3"
    summary: ClassVar[str] = "sigmoids for each token, balanced by a bias"

    @override
    def parameters(self, mixture: RoutedSpec, site: Site) -> dict[str, Parameter]:
        return {**super().parameters(mixture, site), "router_bias": one_bias_each(mixture)}

    @override
    def weights(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights = logits.sigmoid()
        return weights, weights / weights.sum(1, keepdim=True)

    @override
    def order(self, p: Values, weights: Tensor, call: Call) -> Tensor:
        from autopeft.search_space.routers.mixing import owned_only

        return owned_only(weights + p["router_bias"].detach()[..., None], call)

    @override
    def shares(self, logits: Tensor, weights: Tensor, sent: Tensor) -> Tensor:
        gates = weights * sent
        return gates / gates.sum(1, keepdim=True)

    @override
    def imbalance(self, p: Values, decision: Decision) -> Tensor:
        # Its gradient with respect to b is load - 1/E: the optimiser lowers b where too much arrives.
        excess = decision.load - decision.owned / decision.count[:, None]
        return (excess * p["router_bias"].to(excess) * decision.owned).sum(-1)
