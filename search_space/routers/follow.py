"""Routing by the gates of the mixture at another site."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.routers.base import Router

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values
    from autopeft.search_space.routers.mixing import RoutedSpec


class Follow(Router):
    """Gates of the mixture at the site `leader`, which runs earlier: several sites share one router.

    At a site with several mixtures, "site#2" names the second one in the order of the `Architecture`.
    """

    name: ClassVar[str] = "follow"
    source: ClassVar[str] = "a router of this package; see the source of the leader's router"
    summary: ClassVar[str] = "the gates of another site of the layer"
    uses: ClassVar[tuple[str, ...]] = ("top_k", "leader")

    @override
    def decide(self, mixture: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
        leaders = [spec.leader for spec in call.bank.specs]
        gates: Tensor = call.router.tokens.gates_of(leaders, call.bank, call.router.owned_experts.shape[-1])
        return gates
